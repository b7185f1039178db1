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
"""Of an open package whose files are not kept any more, because it takes no command: see `MAX_IDLE_MICROS`."""


class FileState(NamedTuple):
    """What is kept of one file: its place in the chain and its two manifest items, ready encoded.

    Keeping the encoded items spreads the cost of a manifest over the ingests, so that finalizing is a sort and a join.
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
    """What is kept of files of a finalized package, for retries of their command: those of one command, in order."""

    items_digest: bytes
    """BLAKE3 over their items in the manifest."""
    event_digests: bytes
    """One after the other."""


@dataclass(slots=True)
class CommandState:
    """What a command has become so far: `done` of `count` events, the last of which is number `last_sequence`.

    Its events follow each other: while one is not whole, no other of the package is taken.
    """

    event_type: str
    actor: str
    count: int
    done: int = 0
    last_sequence: int = 0
    last_digest: bytes = b""
    paths: list[str] = field(default_factory=list)
    answered: tuple[Answered, ...] = ()
    """In place of `paths` and the package's files, once it is finalized and no longer in memory."""


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
    """What `find_unportable` found, once it was asked."""
    files: dict[str, FileState] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    """The folders that the files lie in. They follow from `files`, which only `add_files` changes."""
    commands: dict[UUID, CommandState] = field(default_factory=dict)
    forgotten: bool = False
    """Whether the package's commands are not known any more, because the time in which they are answered is over."""
    unfinished: UUID | None = None
    """A command of which the log holds fewer events than it counts; only its retry is taken until it is whole."""

    @property
    def entries(self) -> int:
        """How many files, folders and commands it holds, each of which takes memory."""
        return len(self.files) + len(self.folders) + len(self.commands)

    def add_files(self, paths: Sequence[str], files: Iterable[FileState]) -> None:
        """Add files by their paths, with the folders that they lie in. Raises ValueError: they are not as many."""
        self.files.update(zip(paths, files, strict=True))
        add_folders(self.folders, paths)
        self.unportable = None

    def remains(self) -> PackageState:
        """What is kept of the package once its commands are not answered any more."""
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
        """What of its files cannot be unpacked everywhere; takes as long as `unportable`, the first time."""
        if self.unportable is None:
            self.unportable = unportable(self.files, self.folders)
        return self.unportable
