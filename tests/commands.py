"""Commands for tests: valid by default, with one thing changed at a time."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID, uuid5

from artifact_store.manifest import content_key
from schemas import identifiers
from schemas.runs import StoredFile
from services.core.decide import CreatePackage, FinalizePackage, IngestFiles

_IDS = UUID("00000000-0000-0000-0000-00000000c0de")


def command_id(name: str | int) -> UUID:
    """The same id for the same name, so that tests can repeat a command."""
    return uuid5(_IDS, str(name))


def create(name: str | int = "create", actor: str = "ada", **changes: str) -> CreatePackage:
    """A valid creation."""
    id_ = command_id(name)
    made = CreatePackage(
        identifiers.package_id(actor, id_), id_, actor, "run 1", "lab", "sample 7", "report", '{"k":"v"}'
    )
    return replace(made, **changes)  # type: ignore[arg-type] # only text fields are changed


def stored(path: str, content: bytes = b"x" * 32, media_type: str = "text/plain") -> StoredFile:
    """A stored file whose digests are derived from `content` without hashing it: only their identity counts here."""
    mark = (content + bytes(32))[:32]
    return StoredFile(path, media_type, len(content), mark, mark[::-1], "local", content_key(mark), 0, len(content), 7)


def ingest(package_id: UUID, *paths: str, name: str | int = "ingest", actor: str = "ada") -> IngestFiles:
    """An ingest of these paths as one command."""
    return IngestFiles(package_id, command_id(name), actor, tuple(stored(path) for path in paths))


def finalize(package_id: UUID, name: str | int = "finalize", actor: str = "ada") -> FinalizePackage:
    """A finalization."""
    return FinalizePackage(package_id, command_id(name), actor)
