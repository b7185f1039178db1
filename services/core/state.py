"""The state of one package, as far as the writer needs it to decide.

`evolve` gives the state after one more event, and `manifest_of` the manifest under which the package is frozen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple
from uuid import UUID

from artifact_store.canonical import canonical_cbor, cbor_array_head, ordered_cbor
from artifact_store.errors import CorruptError
from artifact_store.events import (
    NO_DIGEST,
    PACKAGE_CREATED,
    Event,
    FileIngested,
    PackageCreated,
    PackageFinalized,
    first_version,
)
from artifact_store.manifest import MANIFEST_VERSION
from artifact_store.rules import Unportable, add_folders, unportable
from schemas.digests import event_digest
from schemas.runs import CommandFiles, FileRun, StoredFile, commands_of

CREATED = "created"
FINALIZED = "finalized"
ABANDONED = "abandoned"
"""The status of an open package that accepts no more commands, so its files are not kept: see `MAX_IDLE_MICROS`."""


class FileState(NamedTuple):
    """The state of one file: its place in the chain, and its two manifest items, already encoded.

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
    """The state of consecutive files of one command in a finalized package, kept to answer retries."""

    items_digest: bytes
    """BLAKE3 over their items in the manifest."""
    event_digests: bytes
    """The digests of their events, concatenated."""


@dataclass(slots=True)
class CommandState:
    """The progress of a command: `done` of its `count` events are recorded, the last with sequence `last_sequence`.

    The events of a command are consecutive: until it is complete, its package accepts no other command.
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
    """The sender who acted in the actor's name; None if the actor sent it."""


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
    """The command that is only partly recorded, if any; until it is complete, only its retry is accepted."""

    @property
    def entries(self) -> int:
        """The number of files, folders and commands in it, each of which takes memory."""
        return len(self.files) + len(self.folders) + len(self.commands)

    def add_files(self, paths: Sequence[str], files: Iterable[FileState]) -> None:
        """Add files by their paths, with their folders.

        Raises ValueError: there are not as many files as paths.
        """
        self.files.update(zip(paths, files, strict=True))
        add_folders(self.folders, paths)
        self.unportable = None

    def remains(self) -> PackageState:
        """The package without files and commands, as it is kept when retries are no longer answered."""
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
        """The files that cannot be unpacked on every system. Only the first call takes as long as `unportable`."""
        if self.unportable is None:
            self.unportable = unportable(self.files, self.folders)
        return self.unportable


def evolve(state: PackageState | None, event: Event | FileRun) -> PackageState:
    """Apply the event to the state, change it in place, and return it. None is the state before the first event.

    Raises:
        CorruptError: the event cannot follow the state: a gap in the sequence, a broken chain, an impossible order.
            The state is unchanged.
    """
    if isinstance(event, Event) and isinstance(event.payload, FileIngested):
        event = FileRun.of(event, event.payload)
    digests: Sequence[bytes]
    if isinstance(event, FileRun):
        event_type, digests = event.event_type, event.digests
    else:
        event_type, digests = first_version(event.event_type), (event_digest(event),)
    if state is None:
        state = _created(event)
    elif event_type == PACKAGE_CREATED:
        raise CorruptError(f"package {event.package_id} is created twice")
    _check_follows(state, event)
    commands = commands_of(event)
    _check_commands(state, event, commands)
    if isinstance(event, FileRun):
        _add_files(state, event)
    elif isinstance(event.payload, PackageFinalized):
        state.status = FINALIZED
        state.manifest_digest = event.payload_digest
    for command in commands:
        known = state.commands.get(command.command_id)
        if known is None:
            known = CommandState(event_type, command.actor, command.command_count, principal=command.principal)
            state.commands[command.command_id] = known
        state.sequence += len(command)
        known.done += len(command)
        known.last_sequence, known.last_digest = state.sequence, digests[state.sequence - event.sequence]
        known.paths += [file.relative_path for file in command.files]
        state.unfinished = None if known.done == known.count else command.command_id
    state.digest = digests[-1]
    state.last_event_at = event.created_at
    return state


def evolve_all(state: PackageState | None, events: Sequence[Event]) -> PackageState:
    """The state after all these events. Raises as `evolve`; ValueError if there is neither an event nor a state."""
    for event in (events,) if isinstance(events, FileRun) else events:  # a run is folded as one event
        state = evolve(state, event)
    if state is None:
        raise ValueError("there is no event")
    return state


def _created(event: Event | FileRun) -> PackageState:
    if isinstance(event, FileRun) or not isinstance(event.payload, PackageCreated):
        raise CorruptError(f"package {event.package_id}: {event.event_type} {event.sequence} precedes its creation")
    return PackageState(event.package_id, event.payload, event.created_at, event.created_at, 0, NO_DIGEST)


def _check_follows(state: PackageState, event: Event | FileRun) -> None:
    if event.sequence != state.sequence + 1 or event.previous_digest != state.digest:
        raise CorruptError(
            f"package {event.package_id}: event {event.sequence} does not follow event {state.sequence} in the chain"
        )
    if state.status == FINALIZED:
        raise CorruptError(f"package {event.package_id}: {event.event_type} follows its finalization")
    if state.forgotten:
        raise CorruptError(f"package {event.package_id}: {event.event_type} follows files that are no longer kept")


def _check_commands(state: PackageState, event: Event | FileRun, commands: Sequence[CommandFiles]) -> None:
    """Raise CorruptError unless the events of each command are consecutive and in order."""
    unfinished = state.unfinished
    for command in commands:
        known = state.commands.get(command.command_id)
        done = 0 if known is None else known.done
        if command.command_index != done or unfinished not in (None, command.command_id):
            raise CorruptError(f"package {event.package_id}: event {event.sequence} is out of order within its command")
        whole = done + len(command) == command.command_count
        unfinished = None if whole else command.command_id


def _add_files(state: PackageState, run: FileRun) -> None:
    files = run.files
    paths = [file.relative_path for file in files]
    if len({*paths}) < len(paths) or not state.files.keys().isdisjoint(paths):
        raise CorruptError(f"package {run.package_id}: event {run.sequence} ingests a path again")
    file_ids, location_ids = map(bytes.decode, run.file_ids), map(bytes.decode, run.location_ids)
    kept = [
        FileState(sequence, digest, manifest_item(file_id, file), receipt_item(file_id, location_id, file))
        for sequence, digest, file, file_id, location_id in zip(
            count(run.sequence), run.digests, files, file_ids, location_ids, strict=False
        )
    ]
    state.add_files(paths, kept)
    state.total_bytes += sum([file.size_bytes for file in files])


def repeats(state: PackageState | None, event: Event) -> bool:
    """Whether the package already has this event.

    If the package has an event with this sequence, the two are compared as far as the state allows: in an open package,
    every event can be compared; in a finalized one, only the last.

    Raises:
        CorruptError: the package has another event with this sequence, or the sequence is below 1.
    """
    if state is None or event.sequence > state.sequence:
        return False
    if event.sequence < 1 or _is_another(state, event):
        raise CorruptError(
            f"package {event.package_id}: it already has another event {event.sequence}, with different content"
        )
    return True


def _is_another(state: PackageState, event: Event) -> bool:
    digest, payload = event_digest(event), event.payload
    if event.sequence == state.sequence:
        return digest != state.digest
    if state.status != CREATED or state.forgotten:
        return False
    match payload:
        case FileIngested():
            known = state.files.get(payload.relative_path)
            return known is None or (known.sequence, known.event_digest) != (event.sequence, digest)
        case PackageCreated():
            return (event.sequence, payload, event.created_at) != (1, state.created, state.created_at)
    return True


def manifest_of(state: PackageState, finalized_at: int) -> bytes:
    """The manifest of the package in its present state, in canonical CBOR; `finalized_at` is in µs since 1970.

    The map's keys come in canonical order: by the length of their text, then by its bytes.
    """
    created = state.created
    package = {
        "id": str(state.package_id),
        "name": created.name,
        "producer": created.producer,
        "subject": created.subject,
        "retention_class": created.retention_class,
        "metadata": json.loads(created.metadata),
        "status": FINALIZED,
        "created_at": state.created_at,
        "finalized_at": finalized_at,
    }
    # UTF-8 keeps the order of code points, and Python compares strings by code points.
    files = [state.files[path] for path in sorted(state.files)]
    head = cbor_array_head(len(files))
    pieces = [_FILES, head]
    pieces += [file.manifest_item for file in files]
    pieces += _PACKAGE, canonical_cbor(package), _VERSION_AND_RECEIPTS, head
    pieces += [file.receipt_item for file in files]
    return b"".join(pieces)


_FILES = b"\xa4" + canonical_cbor("files")
_PACKAGE = canonical_cbor("package")
_VERSION_AND_RECEIPTS = b"".join(map(canonical_cbor, ("manifest_version", MANIFEST_VERSION, "storage_receipts")))
