"""Commands: what callers ask the registry to write. `decide` turns each into events or rejects it.

`grants` are the sender's rights. The package's writer checks them. `principal` is the sender, when they act in the
actor's name by the right to delegate; None when the actor sends the command.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from schemas.runs import StoredFile
from services.core.access import EVERYTHING, Grants

__all__ = ["Command", "CreatePackage", "FinalizePackage", "IngestFiles", "IngestTogether", "StoredFile"]


@dataclass(frozen=True, slots=True)
class CreatePackage:
    """Create a package. `metadata` is a JSON object in JCS form; `package_id` is that of `identifiers.package_id`."""

    package_id: UUID
    command_id: UUID
    actor: str
    name: str
    producer: str
    subject: str
    retention_class: str
    metadata: str
    grants: Grants = EVERYTHING
    principal: str | None = None


@dataclass(frozen=True, slots=True)
class IngestFiles:
    """Add files to a package, all or none, in this order."""

    package_id: UUID
    command_id: UUID
    actor: str
    files: tuple[StoredFile, ...]
    grants: Grants = EVERYTHING
    principal: str | None = None


@dataclass(frozen=True, slots=True)
class IngestTogether:
    """Several commands that add files to one package, decided together: all or none. None of them may be a retry."""

    package_id: UUID
    commands: tuple[IngestFiles, ...]


@dataclass(frozen=True, slots=True)
class FinalizePackage:
    """Freeze a package under its manifest."""

    package_id: UUID
    command_id: UUID
    actor: str
    grants: Grants = EVERYTHING
    principal: str | None = None


Command = CreatePackage | IngestFiles | FinalizePackage
