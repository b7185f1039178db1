"""decide: what a command becomes, given the state of its package; and the answer once it has become that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

import cbor2

from schemas import identifiers
from schemas.codec import EncodedEvent, decode, encode
from schemas.digests import event_digest, manifest_digest, payload_digest
from schemas.events import (
    FILE_INGESTED,
    NO_DIGEST,
    PACKAGE_CREATED,
    PACKAGE_FINALIZED,
    Event,
    PackageCreated,
    PackageFinalized,
    Payload,
)
from schemas.ingested import EncodedIngested, PackagePieces, ingested
from services.core.commands import (
    Acknowledgement,
    Command,
    CreatePackage,
    FinalizePackage,
    IngestedFile,
    IngestFiles,
    StoredFile,
)
from services.core.content_address import content_key
from services.core.evolve import evolve
from services.core.fields import check_metadata_size, check_text
from services.core.limits import EVENT_OVERHEAD_BYTES, Limits
from services.core.manifest import item_file_id, manifest_pieces
from services.core.paths import check_path
from services.core.retention import retention_class
from services.core.state import CREATED, CommandState, FileState, PackageState
from services.errors import (
    CommandReusedError,
    CorruptError,
    DuplicateRelativePathError,
    IllegalPackageStateError,
    InvalidRequestError,
    PackageNotFoundError,
    PushBackError,
    TooLargeError,
)


@dataclass(slots=True)
class Decision:
    """The events to append, none when the log has them all already; all of one type.

    `created_at` is their time, `package_id` and `command_id` are text. `ingested` are the same events if they ingest
    files. `claim_check` is a manifest that must be durable under its content-addressed key before.
    """

    appended: Sequence[EncodedEvent] = ()
    event_type: str = ""
    created_at: int = 0
    package_id: bytes = b""
    command_id: bytes = b""
    count: int = 0
    ingested: Sequence[EncodedIngested] = ()
    claim_check: bytes | None = None

    @property
    def events(self) -> tuple[Event, ...]:
        """The events, read from their records."""
        return tuple(decode(appended.value) for appended in self.appended)

    @property
    def digests(self) -> tuple[bytes, ...]:
        """Their chain digests."""
        return tuple(appended.digest for appended in self.appended)


def decide(state: PackageState | None, command: Command, now: int, limits: Limits) -> Decision:
    """Decide what the command becomes; `now` in µs since 1970, not before the partition's last event.

    A command whose events the state holds already becomes nothing: it is a retry. One of which the state holds a part
    becomes the rest.

    Raises:
        RejectedError: one of its classes, as DESIGN has them; nothing is recorded.
        PushBackError: another command of the package is unfinished.
    """
    known = None if state is None else _known(state, command)
    if known is not None and known.done == known.count:
        return Decision()
    if state is not None and state.unfinished is not None and state.unfinished != command.command_id:
        raise PushBackError(f"package {command.package_id} waits for the retry of a command that is not whole", 1.0)
    match command:
        case IngestFiles():
            return _ingest(_require_open(state, command.package_id), command, known, now, limits)
        case CreatePackage():
            return _create(state, command, now, limits)
        case FinalizePackage():
            return _finalize(_require_open(state, command.package_id), command, now, limits)


def accept(state: PackageState | None, command: Command, decision: Decision) -> PackageState:
    """The state after the events of a decision that was made on it: what `evolve` would give for one after the other.

    The state is changed in place and returned. Raises CorruptError when the decision was made on another one.
    """
    appended = decision.appended
    if not appended:
        if state is None:
            raise CorruptError("a command without a package became nothing")
        return state
    if state is None or not isinstance(command, IngestFiles):
        return evolve(state, decode(appended[0].value), appended[0].digest)
    first, last = appended[0], appended[-1]
    if first.sequence != state.sequence + 1:
        raise CorruptError(f"package {command.package_id}: event {first.sequence} follows event {state.sequence}")
    known = state.commands.get(command.command_id)
    if known is None:
        known = state.commands[command.command_id] = CommandState(FILE_INGESTED, command.actor, decision.count)
    files, paths = state.files, known.paths
    for file, event in zip(command.files[known.done :], decision.ingested, strict=True):
        path = file.relative_path
        files[path] = FileState(
            command.command_id, event.sequence, event.digest, event.manifest_item, event.receipt_item
        )
        paths.append(path)
        state.total_bytes += file.size_bytes
    known.done = known.count
    known.last_sequence = state.sequence = last.sequence
    known.last_digest = state.digest = last.digest
    state.unfinished = None
    state.last_event_at = decision.created_at
    return state


def acknowledge(state: PackageState, command: Command) -> Acknowledgement:
    """The answer to a command all of whose events the state holds."""
    done = state.commands[command.command_id]
    if isinstance(command, IngestFiles):
        kept = state.files
        files = tuple([_ingested(kept[file.relative_path], file) for file in command.files])
        return Acknowledgement(command.package_id, done.last_sequence, done.last_digest, files)
    return Acknowledgement(
        command.package_id,
        done.last_sequence,
        done.last_digest,
        manifest_digest=state.manifest_digest if isinstance(command, FinalizePackage) else None,
    )


def check_ingest(
    state: PackageState | None, package_id: UUID, relative_paths: Sequence[str], command_id: UUID | None, limits: Limits
) -> None:
    """Raise what `decide` would for files of these paths, before any byte of them is read.

    A command id that the package knows passes: only the bytes can tell whether the request is the same.
    """
    if state is not None and command_id in state.commands:
        return
    _check_paths(_require_open(state, package_id), relative_paths, limits)


def _create(state: PackageState | None, command: CreatePackage, now: int, limits: Limits) -> Decision:
    if state is not None:
        raise CommandReusedError("a package of this id exists, made by another request")
    for name in ("name", "producer", "subject", "actor"):
        check_text(name, getattr(command, name))
    check_metadata_size(command.metadata, limits.max_metadata_bytes)
    if len(command.metadata.encode()) + EVENT_OVERHEAD_BYTES > limits.max_event_bytes:
        raise TooLargeError("the event would be larger than the log takes; send less metadata")
    kept = retention_class(command.retention_class)
    payload = PackageCreated(
        command.name, command.producer, command.subject, command.retention_class, kept.days, command.metadata
    )
    return _single(command, PACKAGE_CREATED, payload, payload_digest(payload), now, 0, NO_DIGEST)


def _ingest(
    state: PackageState, command: IngestFiles, known: CommandState | None, now: int, limits: Limits
) -> Decision:
    done = known.done if known is not None else 0
    check_text("actor", command.actor)
    files, count = command.files, len(command.files)
    if not files:
        raise InvalidRequestError("a command must ingest at least one file")
    for file in files:
        check_text("media_type", file.media_type)
        if file.size_bytes > limits.max_file_bytes:
            raise TooLargeError(f"a file is {file.size_bytes:,} bytes; the limit is {limits.max_file_bytes:,}")
    left = files[done:] if done else files
    _check_paths(state, [file.relative_path for file in left], limits)
    pieces = state.pieces
    if pieces is None:
        pieces = state.pieces = PackagePieces(state.package_id)
    command_text = str(command.command_id).encode()
    events = ingested(
        pieces,
        left,
        actor=command.actor,
        command_id=command_text,
        created_at=now,
        index=done,
        count=count,
        sequence=state.sequence,
        digest=state.digest,
    )
    return Decision(events, FILE_INGESTED, now, pieces.text, command_text, count, events)


def _finalize(state: PackageState, command: FinalizePackage, now: int, limits: Limits) -> Decision:
    check_text("actor", command.actor)
    now = max(now, state.last_event_at)
    manifest = b"".join(manifest_pieces(state, now))
    digest = manifest_digest(manifest)
    inline = len(manifest) <= min(limits.inline_manifest_bytes, limits.max_event_bytes - EVENT_OVERHEAD_BYTES)
    payload = PackageFinalized(
        manifest=manifest if inline else None,
        manifest_key=None if inline else content_key(digest),
        file_count=len(state.files),
        total_bytes=state.total_bytes,
    )
    decision = _single(command, PACKAGE_FINALIZED, payload, digest, now, state.sequence, state.digest)
    decision.claim_check = None if inline else manifest
    return decision


def _single(
    command: Command, event_type: str, payload: Payload, digest: bytes, now: int, sequence: int, previous: bytes
) -> Decision:
    """A command's only event, which follows the one of this sequence and chain digest; `digest` is the payload's."""
    event = Event(
        event_id=identifiers.event_id(command.package_id, sequence + 1),
        event_type=event_type,
        package_id=command.package_id,
        sequence=sequence + 1,
        created_at=now,
        actor=command.actor,
        command_id=command.command_id,
        command_index=0,
        command_count=1,
        payload_digest=digest,
        previous_digest=previous,
        payload=payload,
    )
    appended = EncodedEvent(str(event.event_id).encode(), 0, event.sequence, encode(event), event_digest(event))
    package_id, command_id = str(event.package_id).encode(), str(event.command_id).encode()
    return Decision([appended], event_type, now, package_id, command_id, 1)


def _require_open(state: PackageState | None, package_id: UUID) -> PackageState:
    if state is None:
        raise PackageNotFoundError(f"there is no package {package_id}")
    if state.status != CREATED:
        raise IllegalPackageStateError(f"package {package_id} is {state.status}; only a package that is open changes")
    return state


def _check_paths(state: PackageState, relative_paths: Sequence[str], limits: Limits) -> None:
    files = state.files
    seen: set[str] = set()
    for path in relative_paths:
        check_path(path)
        if path in files or path in seen:
            raise DuplicateRelativePathError(f"package {state.package_id} holds {path!r} already")
        seen.add(path)
    if len(files) + len(seen) > limits.max_files_per_package:
        raise TooLargeError(f"a package holds at most {limits.max_files_per_package:,} files")


def _known(state: PackageState, command: Command) -> CommandState | None:
    """What the command has become before, once it is sure that it was the same request."""
    known = state.commands.get(command.command_id)
    if known is None:
        return None
    match command:
        case CreatePackage():
            created = state.created
            asked = (command.name, command.producer, command.subject, command.retention_class, command.metadata)
            was = (created.name, created.producer, created.subject, created.retention_class, created.metadata)
            same = known.event_type == PACKAGE_CREATED and asked == was
        case IngestFiles():
            same = known.event_type == FILE_INGESTED and known.count == len(command.files)
            same = same and all(
                _same_file(state, path, file) for path, file in zip(known.paths, command.files, strict=False)
            )
        case FinalizePackage():
            same = known.event_type == PACKAGE_FINALIZED
    if not same or known.actor != command.actor:
        raise CommandReusedError(f"command id {command.command_id} was used before with another request")
    return known


def _same_file(state: PackageState, path: str, file: StoredFile) -> bool:
    was = cbor2.loads(state.files[path].manifest_item)
    return bool(
        path == file.relative_path
        and was["media_type"] == file.media_type
        and was["blake3"] == file.blake3.hex()
        and was["sha256"] == file.sha256.hex()
        and was["size_bytes"] == file.size_bytes
    )


def _ingested(kept: FileState, file: StoredFile) -> IngestedFile:
    """What became of the file, which is the same in the command as in the log."""
    return IngestedFile(
        item_file_id(kept.manifest_item),
        file.relative_path,
        file.size_bytes,
        file.blake3,
        file.sha256,
        kept.sequence,
        kept.event_digest,
    )
