"""Readers of a parked package get its mark if there is something to show, and never that it does not exist."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from uuid import UUID

import pytest

from artifact_store import Client
from artifact_store.errors import FileNotFoundInRegistryError, PackageNotFoundError, PackageParkedError
from services.config import Settings
from tests.integration.http_gateway import RunningGateway, running_gateway

_WANTED = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch"}


@pytest.fixture
async def gateway(embedded_settings: Settings) -> AsyncIterator[RunningGateway]:
    async with running_gateway(embedded_settings, wait_seconds=0.5) as running:
        yield running


async def package(gateway: RunningGateway, *files: str) -> UUID:
    async with gateway.session.post("/v1/packages", json=_WANTED) as answer:
        package_id = UUID((await answer.json())["package_id"])
    for name in files:
        async with gateway.session.put(f"/v1/packages/{package_id}/files/{name}", data=b"content") as answer:
            assert answer.status == 201
    return package_id


def spoil(settings: Settings, package_id: UUID, sequence: int) -> None:
    """Make an event of the log unreadable, before any view has seen it."""
    with closing(sqlite3.connect(settings.log_url.removeprefix("sqlite:///"))) as file, file:
        which = (package_id.bytes, sequence)
        assert file.execute("UPDATE events SET value = x'00' WHERE package_id = ? AND sequence = ?", which).rowcount


async def test_a_parked_package_carries_its_mark_alone_and_in_listings(
    gateway: RunningGateway, embedded_settings: Settings
) -> None:
    parked_id = await package(gateway, "a", "b", "c")
    whole_id = await package(gateway, "a")
    spoil(embedded_settings, parked_id, 3)
    async with gateway.session.get(f"/v1/packages/{parked_id}") as answer:
        shown = await answer.json()
    assert (shown["last_event_sequence"], shown["parked"]["events"]) == (2, 2)
    assert "cannot be read" in shown["parked"]["cause"]
    async with Client(gateway.url) as client:
        listed = {item.package_id: item.parked for item in (await client.list_packages()).items}
        assert listed[whole_id] is None
        assert listed[parked_id] == (await client.get_package(parked_id)).parked is not None
        assert (await client.get_file_at(parked_id, "a")).relative_path == "a"


async def test_what_a_parked_package_lacks_is_not_said_to_be_absent(
    gateway: RunningGateway, embedded_settings: Settings
) -> None:
    parked_id, unseen_id, whole_id = (
        await package(gateway, "a", "b"),
        await package(gateway, "a"),
        await package(gateway),
    )
    spoil(embedded_settings, parked_id, 3)
    spoil(embedded_settings, unseen_id, 1)
    for path in (
        f"/v1/packages/{parked_id}/files/b",
        f"/v1/packages/{parked_id}/manifest",
        f"/v1/packages/{parked_id}?wait_sequence=3",
        f"/v1/packages/{unseen_id}",
        f"/v1/packages/{unseen_id}/files",
    ):
        async with gateway.session.get(path) as answer:
            problem = json.loads(await answer.read())
            assert (path, answer.status, problem["type"]) == (path, 500, "urn:artifact-store:problem:package-parked")
    async with Client(gateway.url) as client:
        with pytest.raises(PackageParkedError, match=str(unseen_id)):
            await client.get_package(unseen_id)
        with pytest.raises(FileNotFoundInRegistryError):
            await client.get_file_at(whole_id, "b")
        with pytest.raises(PackageNotFoundError):
            await client.get_package(UUID(int=7))
