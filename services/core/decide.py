"""decide: what a command becomes, given the state of its package; and the answer once it has become that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

import cbor2

from schemas import identifiers
from schemas.digests import event_digest, manifest_digest, payload_digest
from schemas.events import (
    FILE_INGESTED,
    NO_DIGEST,
    PACKAGE_CREATED,
    PACKAGE_FINALIZED,
    Event,
    FileIngested,
    PackageCreated,
    PackageFinalized,
    Payload,
    StorageReceipt,
)
from schemas.identifiers import Identifier
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
from services.core.fields import check_metadata_size, check_text
from services.core.limits import EVENT_OVERHEAD_BYTES, Limits
from services.core.manifest import manifest_pieces
from services.core.paths import check_path
from services.core.retention import retention_class
from services.core.state import CREATED, CommandState, PackageState
from services.errors import (
    CommandReusedError,
    DuplicateRelativePathError,
    IllegalPackageStateError,
    InvalidRequestError,
    PackageNotFoundError,
    PushBackError,
    TooLargeError,
)


@dataclass(frozen=True, slots=True)
class Decision:
    """The events to append, none when the log has them all already, and the chain digest of each.

    `claim_check` is a manifest that must be durable under its content-addressed key before the events are appended.
    """

    events: tuple[Event, ...] = ()
    digests: tuple[bytes, ...] = ()
    claim_check: bytes | None = None


def decide(state: PackageState | None, command: Command, now: int, limits: Limits) -> Decision:
    """Decide what the command becomes; `now` in µs since 1970, not before the partition's last event.

    A command whose events the state holds already becomes nothing: it is a retry. One of which the state holds a part
    becomes the rest.

    Raises:
        RejectedError: one of its classes, as DESIGN has them; nothing is recorded.
        PushBackError: another command of the package is unfinished.
    """
    known = _known(state, command)
    if known is not None and known.done == known.count:
        return Decision()
    if state is not None and state.unfinished not in (None, command.command_id):
        raise PushBackError(f"package {command.package_id} waits for the retry of a command that is not whole", 1.0)
    match command:
        case CreatePackage():
            return _create(state, command, now, limits)
        case IngestFiles():
            return _ingest(_require_open(state, command.package_id), command, known, now, limits)
        case FinalizePackage():
            return _finalize(_require_open(state, command.package_id), command, now, limits)


def acknowledge(state: PackageState, command: Command) -> Acknowledgement:
    """The answer to a command all of whose events the state holds."""
    done = state.commands[command.command_id]
    return Acknowledgement(
        package_id=command.package_id,
        sequence=done.last_sequence,
        event_digest=done.last_digest,
        files=tuple(_ingested(state, file) for file in command.files) if isinstance(command, IngestFiles) else (),
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
    chain = _Chain(command.package_id, command, now, 0, NO_DIGEST)
    chain.add(PACKAGE_CREATED, payload, payload_digest(payload))
    return chain.decision()


def _ingest(
    state: PackageState, command: IngestFiles, known: CommandState | None, now: int, limits: Limits
) -> Decision:
    done = known.done if known else 0
    check_text("actor", command.actor)
    if not command.files:
        raise InvalidRequestError("a command must ingest at least one file")
    for file in command.files:
        check_text("media_type", file.media_type)
        if file.size_bytes > limits.max_file_bytes:
            raise TooLargeError(f"a file is {file.size_bytes:,} bytes; the limit is {limits.max_file_bytes:,}")
    left = command.files[done:]
    _check_paths(state, [file.relative_path for file in left], limits)
    chain = _Chain(state.package_id, command, now, state.sequence, state.digest, done, len(command.files))
    for file in left:
        payload = _file_payload(command.package_id, file)
        chain.add(FILE_INGESTED, payload, payload_digest(payload))
    return chain.decision()


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
    chain = _Chain(state.package_id, command, now, state.sequence, state.digest)
    chain.add(PACKAGE_FINALIZED, payload, digest)
    return chain.decision(None if inline else manifest)


class _Chain:
    """The events of one command, each linked to the one before it; `index` of `count` comes next."""

    def __init__(
        self,
        package_id: UUID,
        command: Command,
        now: int,
        sequence: int,
        digest: bytes,
        index: int = 0,
        count: int = 1,
    ) -> None:
        self._package_id = Identifier.of(package_id)
        self._command_id = Identifier.of(command.command_id)
        self._actor = command.actor
        self._now = now
        self._sequence = sequence
        self._digest = digest
        self._index = index
        self._count = count
        self._events: list[Event] = []
        self._digests: list[bytes] = []

    def add(self, event_type: str, payload: Payload, digest: bytes) -> None:
        """The next event; `digest` is that of the payload."""
        self._sequence += 1
        event = Event(
            event_id=identifiers.event_id(self._package_id, self._sequence),
            event_type=event_type,
            package_id=self._package_id,
            sequence=self._sequence,
            created_at=self._now,
            actor=self._actor,
            command_id=self._command_id,
            command_index=self._index,
            command_count=self._count,
            payload_digest=digest,
            previous_digest=self._digest,
            payload=payload,
        )
        self._index += 1
        self._digest = event_digest(event)
        self._events.append(event)
        self._digests.append(self._digest)

    def decision(self, claim_check: bytes | None = None) -> Decision:
        """All of them."""
        return Decision(tuple(self._events), tuple(self._digests), claim_check)


def _file_payload(package_id: UUID, file: StoredFile) -> FileIngested:
    file_id = identifiers.file_id(package_id, file.relative_path)
    location = identifiers.location_id(file_id, file.backend_id, file.key, file.offset, file.length)
    receipt = StorageReceipt(location, file.backend_id, file.key, file.offset, file.length, file.stored_at)
    return FileIngested(
        file_id, file.relative_path, file.media_type, file.size_bytes, file.blake3, file.sha256, receipt
    )


def _require_open(state: PackageState | None, package_id: UUID) -> PackageState:
    if state is None:
        raise PackageNotFoundError(f"there is no package {package_id}")
    if state.status != CREATED:
        raise IllegalPackageStateError(f"package {package_id} is {state.status}; only a package that is open changes")
    return state


def _check_paths(state: PackageState, relative_paths: Sequence[str], limits: Limits) -> None:
    seen: set[str] = set()
    for path in relative_paths:
        check_path(path)
        if path in state.files or path in seen:
            raise DuplicateRelativePathError(f"package {state.package_id} holds {path!r} already")
        seen.add(path)
    if len(state.files) + len(seen) > limits.max_files_per_package:
        raise TooLargeError(f"a package holds at most {limits.max_files_per_package:,} files")


def _known(state: PackageState | None, command: Command) -> CommandState | None:
    """What the command has become before, once it is sure that it was the same request."""
    known = state.commands.get(command.command_id) if state is not None else None
    if state is None or known is None:
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


def _ingested(state: PackageState, file: StoredFile) -> IngestedFile:
    """What became of the file, which is the same in the command as in the log."""
    recorded = state.files[file.relative_path]
    return IngestedFile(
        file_id=identifiers.file_id(state.package_id, file.relative_path),
        relative_path=file.relative_path,
        size_bytes=file.size_bytes,
        blake3=file.blake3,
        sha256=file.sha256,
        sequence=recorded.sequence,
        event_digest=recorded.event_digest,
    )
