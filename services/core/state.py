"""The state of one package, as the writer needs it to decide."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from uuid import UUID

from artifact_store.canonical import ordered_cbor
from artifact_store.events import PackageCreated
from artifact_store.rules import Unportable, add_folders, unportable
from schemas.runs import StoredFile

CREATED = "created"
FINALIZED = "finalized"
ABANDONED = "abandoned"
"""An open package that takes no more commands, so that its files are no longer kept here: see `MAX_IDLE_MICROS`."""


class FileState(NamedTuple):
    """What the state keeps of one file: its place in the chain, and its two manifest items, already encoded.

    Encoding them early spreads the cost of a manifest over the ingests: finalizing only sorts and joins.
    """

    sequence: int
    event_digest: bytes
    manifest_item: bytes
    receipt_item: bytes


def manifest_item(file_id: str, file: StoredFile) -> bytes:
    """The canonical CBOR of a file's entry in `files`."""
    return ordered_cbor(
        {
            "blake3": file.blake3.hex(),
            "sha256": file.sha256.hex(),
            "file_id": file_id,
            "media_type": file.media_type,
            "size_bytes": file.size_bytes,
            "relative_path": file.relative_path,
        }
    )


def receipt_item(file_id: str, location_id: str, file: StoredFile) -> bytes:
    """The canonical CBOR of a file's entry in `storage_receipts`."""
    return ordered_cbor(
        {
            "key": file.key,
            "length": file.length,
            "offset": file.offset,
            "file_id": file_id,
            "stored_at": file.stored_at,
            "backend_id": file.backend_id,
            "location_id": location_id,
        }
    )


class Answered(NamedTuple):
    """What the state keeps of consecutive files of one command, once their package is finalized, to answer retries."""

    items_digest: bytes
    """BLAKE3 over their items in the manifest."""
    event_digests: bytes
    """One after the other."""


@dataclass(slots=True)
class CommandState:
    """What a command has become so far: `done` of `count` events, the last of which has the sequence `last_sequence`.

    The events of a command are consecutive: until it is complete, its package takes no other command.
    """

    event_type: str
    """In version 1."""
    actor: str
    count: int
    done: int = 0
    last_sequence: int = 0
    last_digest: bytes = b""
    paths: list[str] = field(default_factory=list)
    answered: tuple[Answered, ...] = ()
    """Replaces `paths`, and the package's `files`, once the package is finalized and no longer in memory."""
    principal: str | None = None
    """Who sent it in the actor's name; None: the actor."""


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
    unportable: Unportable | None = field(default=None, compare=False)
    """The result of `find_unportable`; None until it is called."""
    files: dict[str, FileState] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    """The folders that the files lie in, derived from `files`. Only `add_files` changes the two."""
    commands: dict[UUID, CommandState] = field(default_factory=dict)
    forgotten: bool = False
    """Whether the package's commands and files are no longer kept, because retries are no longer answered."""
    unfinished: UUID | None = None
    """The command that is only partly recorded, if there is one; until it is complete, only its retry is taken."""

    @property
    def entries(self) -> int:
        """How many files, folders and commands it holds, each of which takes memory."""
        return len(self.files) + len(self.folders) + len(self.commands)

    def add_files(self, paths: Sequence[str], files: Iterable[FileState]) -> None:
        """Add files by their paths, with the folders that they lie in.

        Raises ValueError: there are not as many files as paths.
        """
        self.files.update(zip(paths, files, strict=True))
        add_folders(self.folders, paths)
        self.unportable = None

    def remains(self) -> PackageState:
        """The package as it is kept once its commands are no longer answered: without files and commands."""
        return PackageState(
            self.package_id,
            self.created,
            self.created_at,
            self.last_event_at,
            self.sequence,
            self.digest,
            FINALIZED if self.status == FINALIZED else ABANDONED,
            self.total_bytes,
            self.manifest_digest,
            forgotten=True,
        )

    def find_unportable(self) -> Unportable:
        """Which of its files cannot be unpacked on every system. Only the first call takes as long as `unportable`."""
        if self.unportable is None:
            self.unportable = unportable(self.files, self.folders)
        return self.unportable
