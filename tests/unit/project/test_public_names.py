"""The Python names that outside programs use: removing or renaming one breaks them."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest
from sqlalchemy import Table

from artifact_store import Client, DurableConsumer, FileStream, PositionTable, SyncClient
from services.config import Settings
from services.registry import Registry
from services.views import tables

EXPORTED = {
    "services.registry": {
        *("Registry", "open_registry", "open_events", "find_frozen"),
        *("PackageNotFoundError", "DuplicateRelativePathError", "IllegalPackageStateError"),
    },
    "artifact_store": {
        *("Client", "SyncClient", "FileStream", "Registry", "RetryPolicy", "push", "Pushed", "pull", "Pulled"),
        *("BodySource", "BytesSource", "FileSource", "Declared", "Acknowledgement"),
        *(
            "EventFilter",
            "Package",
            "PackageFilter",
            "Page",
            "File",
            "Manifest",
            "ContentAddress",
            "Position",
            "RecordedEvent",
        ),
        *("DurableConsumer", "EventSource", "PositionStore", "PositionTable"),
        *("ArtifactStoreError", "RejectedError", "PushBackError", "UnavailableError", "CorruptError"),
        *("UnauthenticatedError", "ForbiddenError"),
        *("ConfigurationError", "PackageNotFoundError", "DuplicateRelativePathError", "IllegalPackageStateError"),
    },
    "projector": {
        *("replay", "ReplayResult", "RebuildOptions", "DigestMismatchError", "abandon"),
        *("run_projection", "run_projectors"),
    },
}
OPERATIONS = {
    "create_package": ("name", "producer", "subject", "retention_class", "actor", "metadata"),
    "ingest_file": ("package_id", "relative_path", "media_type", "stream", "actor"),
    "finalize_package": ("package_id", "actor"),
    "get_manifest_bytes": ("package_id", "format"),
    "get_file": ("file_id",),
    "tail_events": ("since_sequence", "poll_interval_seconds", "package_id", "since", "where"),
}
TABLES = {
    *("artifact_packages", "artifact_files", "artifact_manifests", "storage_locations"),
    *("retention_state", "retention_classes", "usage_totals"),
}


@pytest.mark.parametrize("module", EXPORTED)
def test_a_module_exports_these_names(module: str) -> None:
    found = import_module(module)
    assert set(found.__all__) == EXPORTED[module]
    assert [name for name in found.__all__ if not hasattr(found, name)] == []


def test_settings_and_manifests_are_read_by_these_names() -> None:
    assert callable(Settings.from_env)
    manifest = import_module("services.manifest")
    assert inspect.get_annotations(manifest.decode)["return"] == manifest.Manifest.__name__


@pytest.mark.parametrize("owner", [Registry, Client])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_of_the_registry_takes_these_arguments(operation: str, owner: type[Registry]) -> None:
    assert set(OPERATIONS[operation]) <= set(inspect.signature(getattr(owner, operation)).parameters)


@pytest.mark.parametrize("operation", [*OPERATIONS, "stream", "get_package", "list_packages", "list_files"])
def test_the_client_without_a_loop_takes_the_same_arguments(operation: str) -> None:
    blocking, asynchronous = (inspect.signature(getattr(owner, operation)) for owner in (SyncClient, Client))
    assert list(blocking.parameters) == list(asynchronous.parameters)


def test_a_durable_consumer_is_made_and_run_by_these_names() -> None:
    made = inspect.signature(DurableConsumer)
    assert list(made.parameters) == ["source", "begin", "positions", "where", "since"]
    assert list(inspect.signature(DurableConsumer.run).parameters) == ["self", "handle", "follow"]
    assert list(inspect.signature(PositionTable.sqlite3).parameters) == ["consumer", "options"]
    assert list(inspect.signature(Client.events).parameters) == ["self", "since", "where", "follow"]


def test_a_stream_is_opened_and_filled_by_these_names() -> None:
    assert list(inspect.signature(Client.stream).parameters) == ["self", "package_id", "actor", "spool", "max_bytes"]
    assert list(inspect.signature(FileStream.add).parameters) == ["self", "relative_path", "data", "media_type"]
    assert list(inspect.signature(FileStream.flush).parameters) == ["self"]


def test_the_tables_of_the_views_have_these_names() -> None:
    assert {name for name in TABLES if getattr(tables, name).name == name} == TABLES
    assert all(isinstance(getattr(tables, name), Table) for name in TABLES)
