"""The state of one package, as the writer needs it to decide."""

from __future__ import annotations

from dataclasses import dataclass, field
from uuid import UUID

from schemas.events import PackageCreated
from schemas.ingested import PackagePieces

CREATED = "created"
FINALIZED = "finalized"


@dataclass(slots=True)
class FileState:
    """What is kept of one file: its place in the chain and its two manifest items, ready encoded.

    Keeping the encoded items spreads the cost of a manifest over the ingests, so that finalizing is a sort and a join.
    """

    command_id: UUID
    sequence: int
    event_digest: bytes
    manifest_item: bytes
    receipt_item: bytes


@dataclass(slots=True)
class CommandState:
    """What a command has become so far: `done` of `count` events, the last of which is number `last_sequence`."""

    event_type: str
    actor: str
    count: int
    done: int = 0
    last_sequence: int = 0
    last_digest: bytes = b""
    paths: list[str] = field(default_factory=list)


@dataclass(slots=True)
class PackageState:
    """One package. `sequence` and `digest` are those of its last event; `created_at` in µs since 1970.

    Mutable: `evolve` changes it in place, because a package may hold 100,000 files.
    """

    package_id: UUID
    created: PackageCreated
    created_at: int
    last_event_at: int
    sequence: int
    digest: bytes
    status: str = CREATED
    total_bytes: int = 0
    manifest_digest: bytes | None = None
    files: dict[str, FileState] = field(default_factory=dict)
    commands: dict[UUID, CommandState] = field(default_factory=dict)
    unfinished: UUID | None = None
    """A command of which the log holds fewer events than it counts; only its retry is taken until it is whole."""
    pieces: PackagePieces | None = field(default=None, compare=False, repr=False)
    """What the package's events share, once it was needed."""
