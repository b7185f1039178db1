"""decide: turns a command into events, given the state of its package.

First come the limits that it enforces, and the commands: what callers ask the registry to write. A command's `grants`
are the sender's rights, which the package's writer checks. `principal` is the sender if they act in the actor's name by
the right to delegate; None if the actor sends the command.

After `decide` come the answer to a command whose events are recorded (`acknowledge`), and the check before an upload
(`check_ingest`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from artifact_store.canonical import is_jcs_object
from artifact_store.errors import (
    AnswerExpiredError,
    CommandReusedError,
    DuplicateRelativePathError,
    ForbiddenError,
    IllegalPackageStateError,
    InvalidRequestError,
    PackageAbandonedError,
    PathConflictError,
    PushBackError,
    TooLargeError,
)
from artifact_store.events import (
    FILE_INGESTED,
    NO_DIGEST,
    PACKAGE_CREATED,
    PACKAGE_FINALIZED,
    Event,
    PackageCreated,
    PackageFinalized,
    type_with,
)
from artifact_store.manifest import ContentAddress, content_key, manifest_digest
from artifact_store.models import Acknowledgement, IngestedFile
from artifact_store.rules import (
    MAX_NUMBER,
    MAX_PAIRS,
    MAX_PATH_BYTES,
    add_folders,
    check_metadata_size,
    check_paths,
    check_text,
    folders_above,
)
from schemas import identifiers
from schemas.digests import DIGEST_BYTES, items_digest, payload_digest
from schemas.runs import CommandFiles, FileRun, StoredFile, file_ids
from services.core.access import EVERYTHING, Grants, Right, no_package, require, scope
from services.core.lifecycle import MICROS_PER_DAY, retention_class
from services.core.state import ABANDONED, CREATED, CommandState, PackageState, manifest_item, manifest_of

INLINE_MANIFEST_BYTES = 512 * 1024
"""A larger manifest is stored as a blob, and its event holds only the blob's key: a claim check."""

EVENT_OVERHEAD_BYTES = 16 * 1024
"""Room for all of an event except metadata and manifest: six texts of 256 characters, a path, digests, headers."""

ANSWERS_KEPT_MICROS = 24 * 3600 * 1_000_000
"""How long after a package's finalization retries of its commands are answered, by the time of the partition's newest
event."""

MAX_IDLE_MICROS = 365 * 24 * 3600 * 1_000_000
"""How long an open package accepts commands after its last event. After that, the writer need not keep its files."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one deployment. Sizes are in bytes; `max_event_bytes` is the log's limit for one record."""

    max_file_bytes: int = 5 << 40
    max_files_per_package: int = 100_000
    max_metadata_bytes: int = 64 << 10
    max_event_bytes: int = 1_000_000
    inline_manifest_bytes: int = INLINE_MANIFEST_BYTES
    max_idle_micros: int = MAX_IDLE_MICROS


@dataclass(frozen=True, slots=True)
class CreatePackage:
    """Create a package. `metadata` is a JSON object in JCS form; `identifiers.package_id` gives `package_id`."""

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


@dataclass(frozen=True, slots=True)
class IngestCheck:
    """Asks whether files with these paths could be ingested now. Rights are those that the command would have."""

    package_id: UUID
    relative_paths: Sequence[str]
    command_id: UUID | None
    grants: Grants = EVERYTHING
    principal: str | None = None


def decide(state: PackageState | None, command: Command | IngestTogether, now: int, limits: Limits) -> Sequence[Event]:
    """Return the events that the command becomes. `now` is in µs since 1970, not before the partition's last event.

    A retry, whose events the package already has, becomes no events. If the package has only some of them, the command
    becomes the rest. If the events need a manifest in the blob store (see `claim_check`), store it before appending.

    Raises:
        RejectedError: one of its subclasses; nothing is recorded.
        PushBackError: only a part of another command of the package is recorded so far.
        ValueError: a file has a value that no record can hold.
    """
    if isinstance(command, IngestTogether):
        return _ingest_together(state, command, now, limits)
    require_write(state, command)
    known = None if state is None else _known(state, command)
    done = 0 if known is None else known.done
    if known is not None and done == known.count:
        return ()
    _require_whole(state, command.command_id)
    if isinstance(command, CreatePackage):
        return _create(state, command, now, limits)
    opened = _require_open(state, command.package_id, command.command_id, now, limits)
    if isinstance(command, FinalizePackage):
        return _finalize(opened, command, now, limits)
    return _ingest(opened, [command], done, now, limits)


def require_write(state: PackageState | None, asked: Command | IngestCheck) -> None:
    """Raise unless the sender may write to the package and, if they act in another's name, may delegate.

    Raises:
        ForbiddenError: the sender lacks the right for packages of this producer and subject, or for this package, which
            they may read.
        PackageNotFoundError: the sender may not even learn whether the package exists.
    """
    if asked.grants is EVERYTHING:
        return
    if isinstance(asked, CreatePackage):
        origin, packages = (asked.producer, asked.subject), "packages of this producer and subject"
        if not scope(asked.grants, Right.WRITE).includes(*origin):
            raise ForbiddenError(f"the right to write does not hold for {packages}")
    else:
        if state is None:
            raise no_package(asked.package_id)
        origin, packages = (state.created.producer, state.created.subject), f"package {asked.package_id}"
        require(asked.grants, Right.WRITE, asked.package_id, origin)
    if asked.principal is not None and not scope(asked.grants, Right.DELEGATE).includes(*origin):
        raise ForbiddenError(f"the right to delegate does not hold for {packages}")


def claim_check(state: PackageState, events: Sequence[Event]) -> bytes | None:
    """The manifest to store under its content key before these events are appended; None if they need none."""
    last = None if isinstance(events, FileRun) or not events else events[-1]
    if last is not None and isinstance(last.payload, PackageFinalized) and last.payload.manifest is None:
        return manifest_of(state, last.created_at)
    return None


def acknowledge(state: PackageState, command: Command) -> Acknowledgement:
    """The answer to a command whose events are all in the state."""
    done = state.commands[command.command_id]
    last = command.package_id, done.last_sequence, done.last_digest
    match command:
        case IngestFiles():
            return Acknowledgement(*last, _ingested(state, done, command))
        case FinalizePackage():
            return Acknowledgement(*last, (), state.manifest_digest, *state.find_unportable())
    return Acknowledgement(*last)


def may_answer(given: Acknowledgement, command: Command) -> bool:
    """Whether an acknowledgement from another process can be the one for this command.

    Compares the values that the command itself contains. Only the log shows whether its events are recorded.
    """
    files = _identified(command) if isinstance(command, IngestFiles) else []
    first = given.sequence - max(0, len(files) - 1)
    digests = [given.event_digest, *(file.event_digest for file in given.files)]
    manifest = given.manifest_digest
    return (
        given.package_id == command.package_id
        and (first == 1 if isinstance(command, CreatePackage) else 1 < first <= given.sequence <= MAX_NUMBER)
        and all(len(digest) == DIGEST_BYTES for digest in digests)
        and (not files or digests[-1] == given.event_digest)
        and (manifest is not None and len(manifest) == DIGEST_BYTES) == isinstance(command, FinalizePackage)
        and len(given.unportable_paths) <= MAX_PAIRS
        and len(given.unportable_paths) <= given.unportable_count <= MAX_NUMBER
        and [file[:6] for file in given.files]
        == [
            (file_id, file.relative_path, file.size_bytes, file.blake3, file.sha256, sequence)
            for sequence, (file_id, file) in enumerate(files, first)
        ]
    )


def check_ingest(
    state: PackageState | None,
    package_id: UUID,
    relative_paths: Sequence[str],
    command_id: UUID | None,
    now: int,
    limits: Limits,
) -> str:
    """Raise what `decide` would raise for files with these paths, before any byte of them is read.

    Returns the package's retention class. Nothing is raised for a command id that the package already has: only the
    bytes can show whether the request is the same.
    """
    if state is not None and command_id in state.commands:
        return state.created.retention_class
    state = _require_open(state, package_id, command_id, now, limits)
    _check_paths(state, relative_paths, limits)
    _check_tree(state, relative_paths, limits)
    return state.created.retention_class


def _create(state: PackageState | None, command: CreatePackage, now: int, limits: Limits) -> list[Event]:
    if state is not None:
        if state.forgotten:
            raise _abandoned(state) if state.status == ABANDONED else _expired(state, command.command_id)
        raise CommandReusedError("another request has created a package with this id")
    for name in ("name", "producer", "subject"):
        check_text(name, getattr(command, name))
    _check_who([command])
    check_metadata_size(command.metadata, limits.max_metadata_bytes)
    if not is_jcs_object(command.metadata):  # another gateway may have sent it; readers would stop at its event
        raise InvalidRequestError("metadata must be a JSON object in JCS form")
    if len(command.metadata.encode()) + EVENT_OVERHEAD_BYTES > limits.max_event_bytes:
        raise TooLargeError("the event would be larger than the log takes; send less metadata")
    kept = retention_class(command.retention_class)
    payload = PackageCreated(
        command.name, command.producer, command.subject, command.retention_class, kept.days, command.metadata
    )
    return _only_event(command, payload, payload_digest(payload), now, None)


def _ingest_together(state: PackageState | None, together: IngestTogether, now: int, limits: Limits) -> Sequence[Event]:
    """The events that these commands would become one after the other. Each of them must be new."""
    for command in together.commands:
        require_write(state, command)
    opened = _require_open(state, together.package_id, None, now, limits)
    _require_whole(opened, None)
    new = {command.command_id for command in together.commands}
    if len(new) < len(together.commands) or not opened.commands.keys().isdisjoint(new):
        raise CommandReusedError("a command that may be a retry is decided by itself")
    return _ingest(opened, together.commands, 0, now, limits)


def _ingest(state: PackageState, commands: Sequence[IngestFiles], done: int, now: int, limits: Limits) -> FileRun:
    """The events for the commands' files. The first `done` files of a single command have their events already."""
    parts = [
        CommandFiles(
            command.command_id, command.actor, done, len(command.files), command.files[done:], command.principal
        )
        for command in commands
    ]
    files = [file for part in parts for file in part.files]
    _check_who(commands)
    if not all(part.files for part in parts):
        raise InvalidRequestError("a command must ingest at least one file")
    for media_type in {file.media_type for file in files}:
        check_text("media_type", media_type)
    largest = max([file.size_bytes for file in files])
    if largest > limits.max_file_bytes:
        raise TooLargeError(f"a file has {largest:,} bytes; the limit is {limits.max_file_bytes:,}")
    for file in files:
        _check_receipt(file)
    paths = [file.relative_path for file in files]
    _check_paths(state, paths, limits)
    # The rest of a partly recorded command was accepted with its first events, perhaps under older rules.
    if not done:
        _check_tree(state, paths, limits)
    return FileRun.of_files(state.package_id, parts, sequence=state.sequence + 1, created_at=now, previous=state.digest)


def _check_who(commands: Sequence[Command]) -> None:
    for actor in {command.actor for command in commands}:
        check_text("actor", actor)
    for principal in {command.principal for command in commands}:
        if principal is not None:
            check_text("principal", principal)


_MAX_KEY_CHARACTERS = 512
_BLOB_KEY = re.compile(r"(?:blobs|uploads)(?:/[A-Za-z0-9_-][A-Za-z0-9._-]*)+")


def _check_receipt(file: StoredFile) -> None:
    """Raise InvalidRequestError for a receipt that none of our stores issues: another gateway may have sent it.

    Readers fetch whatever an event names, so a receipt must name bytes of a blob, exactly as many as the file has.
    """
    if (
        len(file.key) > _MAX_KEY_CHARACTERS
        or not _BLOB_KEY.fullmatch(file.key)
        or file.offset < 0
        or file.size_bytes < 0
        or file.length != file.size_bytes
        or len(file.blake3) != DIGEST_BYTES
        or len(file.sha256) != DIGEST_BYTES
    ):
        raise InvalidRequestError(f"the receipt of {file.relative_path!r} does not name bytes of a blob")
    check_text("backend_id", file.backend_id)


def _finalize(state: PackageState, command: FinalizePackage, now: int, limits: Limits) -> list[Event]:
    _check_who([command])
    now = max(now, state.last_event_at)
    manifest = manifest_of(state, now)
    digest = manifest_digest(manifest)
    inline = len(manifest) <= min(limits.inline_manifest_bytes, limits.max_event_bytes - EVENT_OVERHEAD_BYTES)
    payload = PackageFinalized(
        manifest=manifest if inline else None,
        manifest_key=None if inline else content_key(digest),
        file_count=len(state.files),
        total_bytes=state.total_bytes,
    )
    return _only_event(command, payload, digest, now, state)


def _only_event(
    command: Command, payload: PackageCreated | PackageFinalized, digest: bytes, now: int, state: PackageState | None
) -> list[Event]:
    """The only event of the command, which follows `state`. `digest` is the digest of the payload."""
    sequence, previous = (1, NO_DIGEST) if state is None else (state.sequence + 1, state.digest)
    event_type = PACKAGE_CREATED if isinstance(payload, PackageCreated) else PACKAGE_FINALIZED
    return [
        Event(
            event_id=identifiers.event_id(command.package_id, sequence),
            event_type=type_with(event_type, command.principal),
            package_id=command.package_id,
            sequence=sequence,
            created_at=now,
            actor=command.actor,
            principal=command.principal,
            command_id=command.command_id,
            command_index=0,
            command_count=1,
            payload_digest=digest,
            previous_digest=previous,
            payload=payload,
        )
    ]


def _require_whole(state: PackageState | None, command_id: UUID | None) -> None:
    """Raise PushBackError while another command of the package is only partly recorded: its retry must come first."""
    if state is not None and state.unfinished not in (None, command_id):
        raise PushBackError(
            f"package {state.package_id} waits for the retry of a command that is recorded in part", 1.0
        )


def _require_open(
    state: PackageState | None, package_id: UUID, command_id: UUID | None, now: int, limits: Limits
) -> PackageState:
    """The package, if it accepts this new command. Raises RejectedError."""
    if state is None:
        raise no_package(package_id)
    if state.status == ABANDONED or (state.status == CREATED and now - state.last_event_at > limits.max_idle_micros):
        raise _abandoned(state)
    if state.forgotten and command_id is not None:
        raise _expired(state, command_id)
    if state.status != CREATED:
        raise IllegalPackageStateError(f"package {package_id} is {state.status}; only an open package can be changed")
    return state


def _expired(state: PackageState, command_id: UUID) -> AnswerExpiredError:
    """The error for a command that may be a retry of one whose answer is no longer kept."""
    package_id, manifest = state.package_id, ContentAddress.of_digest(state.manifest_digest or NO_DIGEST)
    return AnswerExpiredError(
        f"package {package_id} was finalized more than {ANSWERS_KEPT_MICROS // 3_600_000_000} hours ago, with the "
        f"manifest {manifest}, and takes no new command. Whether command {command_id} was recorded before that is no "
        f"longer known here: the package's events name their commands, and its manifest lists its files",
        facts={"package_id": str(package_id), "finalized_at": state.last_event_at, "manifest_digest": manifest},
    )


def _abandoned(state: PackageState) -> PackageAbandonedError:
    return PackageAbandonedError(
        f"package {state.package_id} is open, but its last event is more than {MAX_IDLE_MICROS // MICROS_PER_DAY} days "
        f"old, so it takes no more commands: create another package. Its events show which commands were recorded",
        facts={"package_id": str(state.package_id)},
    )


def _check_paths(state: PackageState, relative_paths: Sequence[str], limits: Limits) -> None:
    check_paths(relative_paths)
    files, new = state.files, set(relative_paths)
    # `isdisjoint` walks its argument: the few new paths, never the package's files.
    if len(new) < len(relative_paths) or not files.keys().isdisjoint(new):
        seen: set[str] = set()
        for path in relative_paths:
            if path in files or path in seen:
                raise DuplicateRelativePathError(f"package {state.package_id} already holds {path!r}")
            seen.add(path)
    if len(files) + len(new) > limits.max_files_per_package:
        raise TooLargeError(f"a package holds at most {limits.max_files_per_package:,} files")


def _check_tree(state: PackageState, relative_paths: Sequence[str], limits: Limits) -> None:
    """Raise PathConflictError if a path would be both a file and a folder: such a package cannot be unpacked."""
    folders, files, new = set[str](), state.files, set(relative_paths)
    add_folders(folders, relative_paths)
    known = state.folders
    if not (known.isdisjoint(new) and folders.isdisjoint(new) and files.keys().isdisjoint(folders)):
        for path in relative_paths:
            if path in known or path in folders:
                raise PathConflictError(
                    f"package {state.package_id}: {path!r} cannot be a file: it is a folder of other files"
                )
            for folder in folders_above(path):
                if folder in files:
                    raise PathConflictError(
                        f"package {state.package_id}: {path!r} cannot lie in {folder!r}, which is a file"
                    )
    # Four for each file, plus those of the deepest possible path: a path of 1,024 bytes may have 511 folders. The limit
    # exists because the writer keeps the name of each folder.
    most = 4 * limits.max_files_per_package + MAX_PATH_BYTES // 2
    if len(known) + len(folders) > most and len(known) + len(folders - known) > most:
        raise TooLargeError(f"a package has at most {most:,} folders")


def _known(state: PackageState, command: Command) -> CommandState | None:
    """The state of an earlier attempt of the command; None if there was none.

    Raises CommandReusedError: the earlier attempt was a different request.
    """
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
            same = same and _same_files(state, known, command)
        case FinalizePackage():
            same = known.event_type == PACKAGE_FINALIZED
    if not same or (known.actor, known.principal) != (command.actor, command.principal):
        raise CommandReusedError(f"command id {command.command_id} was used before with another request")
    return known


def _same_files(state: PackageState, known: CommandState, command: IngestFiles) -> bool:
    """Whether these are the files of the earlier attempt, as far as it was recorded."""
    try:
        items = [manifest_item(str(file_id), file) for file_id, file in _identified(command)]
    except ValueError:  # no record can hold these values, so they were not recorded
        return False
    at = 0
    for answered in known.answered:
        end = at + len(answered.event_digests) // DIGEST_BYTES
        if items_digest(items[at:end]) != answered.items_digest:
            return False
        at = end
    return all(state.files[path].manifest_item == item for path, item in zip(known.paths, items, strict=False))


def _ingested(state: PackageState, done: CommandState, command: IngestFiles) -> tuple[IngestedFile, ...]:
    """The recorded files of a command. Its events are consecutive, so the last sequence gives all the others."""
    digests = [state.files[path].event_digest for path in done.paths]
    for answered in done.answered:
        joined = answered.event_digests
        digests += [joined[at : at + DIGEST_BYTES] for at in range(0, len(joined), DIGEST_BYTES)]
    rows = zip(_identified(command), digests, strict=True)
    return tuple(
        IngestedFile(file_id, file.relative_path, file.size_bytes, file.blake3, file.sha256, sequence, digest)
        for sequence, ((file_id, file), digest) in enumerate(rows, done.last_sequence - done.count + 1)
    )


def _identified(command: IngestFiles) -> list[tuple[UUID, StoredFile]]:
    """The command's files, each with its identifier."""
    ids = file_ids(command.package_id, [file.relative_path for file in command.files])
    return list(zip(ids, command.files, strict=True))
