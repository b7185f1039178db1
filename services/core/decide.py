"""decide: what a command becomes, given the state of its package; and the answer once it has become that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from uuid import UUID

import cbor2

from artifact_store.errors import (
    AnswerExpiredError,
    CommandReusedError,
    CorruptError,
    DuplicateRelativePathError,
    IllegalPackageStateError,
    InvalidRequestError,
    PackageAbandonedError,
    PackageNotFoundError,
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
    Payload,
)
from artifact_store.manifest import ContentAddress, content_key, manifest_digest
from artifact_store.models import Acknowledgement, IngestedFile
from artifact_store.rules import Unportable, add_folders, check_metadata_size, check_paths, check_text, folders_above
from schemas import identifiers
from schemas.codec import EncodedEvents, decode, encode
from schemas.digests import DIGEST_BYTES, event_digest, items_digest, payload_digest
from schemas.ingested import EncodedIngested, PackagePieces, ingested
from services.core.commands import Command, CreatePackage, FinalizePackage, IngestFiles, StoredFile
from services.core.evolve import evolve
from services.core.freezing import item_file_id, manifest_of
from services.core.lifecycle import MICROS_PER_DAY, retention_class
from services.core.limits import ANSWERS_KEPT_MICROS, EVENT_OVERHEAD_BYTES, MAX_IDLE_MICROS, Limits
from services.core.state import ABANDONED, CREATED, CommandState, PackageState, file_states


@dataclass(slots=True)
class Decision:
    """What commands of one package become: events to append, none when the log has them all already; all of one type.

    `created_at` is their time, `package_id` and `command_ids` are text. `claim_check` is a manifest that must be
    durable under its content-addressed key before.
    """

    event_type: str = ""
    created_at: int = 0
    package_id: bytes = b""
    commands: Sequence[Command] = ()
    command_ids: Sequence[bytes] = ()
    done: int = 0
    """How many events of the command, which is the only one then, the log has already."""
    appended: EncodedEvents | None = None
    event: Event | None = None
    """What is appended, if it is one event that ingests no file."""
    claim_check: bytes | None = None
    unportable: Unportable | None = None
    """What the answer to a finalization says of the package's paths."""

    @property
    def events(self) -> tuple[Event, ...]:
        """The events, those that ingest files read from their records."""
        return tuple(map(decode, self.values)) if self.event is None else (self.event,)

    @property
    def counts(self) -> Sequence[int]:
        """How many events each command becomes in all."""
        return [len(_files(command)) or 1 for command in self.commands]

    @property
    def event_ids(self) -> Sequence[bytes]:
        """Their identifiers, as text."""
        return () if self.appended is None else self.appended.event_ids

    @property
    def values(self) -> Sequence[bytes]:
        """Their records' values."""
        return () if self.appended is None else self.appended.values

    @property
    def digests(self) -> tuple[bytes, ...]:
        """Their chain digests."""
        return () if self.appended is None else tuple(self.appended.digests)


def decide(state: PackageState | None, command: Command, now: int, limits: Limits) -> Decision:
    """Decide what the command becomes; `now` in µs since 1970, not before the partition's last event.

    A command whose events the state holds already becomes nothing: it is a retry. One of which the state holds a part
    becomes the rest.

    Raises:
        RejectedError: one of its classes; nothing is recorded.
        PushBackError: another command of the package is unfinished.
    """
    known = None if state is None else _known(state, command)
    if known is not None and known.done == known.count:
        return Decision()
    if state is not None and state.unfinished is not None and state.unfinished != command.command_id:
        raise PushBackError(f"package {command.package_id} waits for the retry of a command that is not whole", 1.0)
    match command:
        case IngestFiles():
            done = known.done if known is not None else 0
            opened = _require_open(state, command.package_id, command.command_id, now, limits)
            return _ingest(opened, [command], done, now, limits)
        case CreatePackage():
            return _create(state, command, now, limits)
        case FinalizePackage():
            opened = _require_open(state, command.package_id, command.command_id, now, limits)
            return _finalize(opened, command, now, limits)


def decide_together(state: PackageState, commands: Sequence[IngestFiles], now: int, limits: Limits) -> Decision | None:
    """What commands of one package become that `decide` would take one after the other, in a third of the time.

    None if one of them is a retry, or others wait for one. Raises as `decide` when one of them, whichever it is, would
    be refused. Then each is to be decided by itself.
    """
    new = {command.command_id for command in commands}
    if len(new) < len(commands) or state.unfinished is not None or not state.commands.keys().isdisjoint(new):
        return None
    return _ingest(_require_open(state, state.package_id, None, now, limits), commands, 0, now, limits)


def accept(state: PackageState | None, decision: Decision) -> PackageState:
    """The state after the events of a decision that was made on it: what `evolve` would give for one after the other.

    The state is changed in place and returned. Raises CorruptError when the decision was made on another one.
    """
    appended = decision.appended
    if not isinstance(appended, EncodedIngested):
        if appended is not None and decision.event is not None:
            return evolve(state, decision.event, appended.digests[0], decision.unportable)
        if state is None:
            raise CorruptError("a command without a package became nothing")
        return state
    package = decision.package_id.decode()
    if state is None:
        raise CorruptError(f"package {package}: event {appended.first_sequence} precedes its creation")
    if appended.first_sequence != state.sequence + 1:
        raise CorruptError(f"package {package}: event {appended.first_sequence} follows event {state.sequence}")
    digests, paths = appended.digests, list[str]()
    for command in decision.commands:
        files = _files(command)[decision.done :]
        own = [file.relative_path for file in files]
        paths += own
        state.total_bytes += sum([file.size_bytes for file in files])
        known = state.commands.get(command.command_id)
        if known is None:
            known = state.commands[command.command_id] = CommandState(FILE_INGESTED, command.actor, len(files))
        known.done = known.count
        known.last_sequence, known.last_digest = state.sequence + len(paths), digests[len(paths) - 1]
        known.paths += own
    kept = zip(count(appended.first_sequence), digests, appended.manifest_items, appended.receipt_items, strict=False)
    state.add_files(paths, file_states(kept))
    state.sequence, state.digest = state.sequence + len(paths), digests[-1]
    state.unfinished = None
    state.last_event_at = decision.created_at
    return state


def acknowledge(state: PackageState, command: Command) -> Acknowledgement:
    """The answer to a command all of whose events the state holds."""
    done = state.commands[command.command_id]
    if isinstance(command, IngestFiles):
        files = _answered(state, done, command) if done.answered else _ingested(state, command)
        return Acknowledgement(command.package_id, done.last_sequence, done.last_digest, files)
    if isinstance(command, FinalizePackage):
        of_package = (), state.manifest_digest, *state.unportable
        return Acknowledgement(command.package_id, done.last_sequence, done.last_digest, *of_package)
    return Acknowledgement(command.package_id, done.last_sequence, done.last_digest)


def check_ingest(
    state: PackageState | None,
    package_id: UUID,
    relative_paths: Sequence[str],
    command_id: UUID | None,
    now: int,
    limits: Limits,
) -> str:
    """Raise what `decide` would for files of these paths, before any byte of them is read.

    A command id that the package knows passes: only the bytes can tell whether the request is the same. Returns the
    package's retention class.
    """
    if state is not None and command_id in state.commands:
        return state.created.retention_class
    state = _require_open(state, package_id, command_id, now, limits)
    _check_paths(state, relative_paths, limits)
    _check_tree(state, relative_paths, limits)
    return state.created.retention_class


def _create(state: PackageState | None, command: CreatePackage, now: int, limits: Limits) -> Decision:
    if state is not None:
        if state.forgotten:
            raise _abandoned(state) if state.status == ABANDONED else _expired(state, command.command_id)
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


def _ingest(state: PackageState, commands: Sequence[IngestFiles], done: int, now: int, limits: Limits) -> Decision:
    left = [command.files[done:] if done else command.files for command in commands]
    files = list(chain.from_iterable(left))
    for actor in {command.actor for command in commands}:
        check_text("actor", actor)
    if not all(command.files for command in commands):
        raise InvalidRequestError("a command must ingest at least one file")
    for media_type in {file.media_type for file in files}:
        check_text("media_type", media_type)
    largest = max([file.size_bytes for file in files])
    if largest > limits.max_file_bytes:
        raise TooLargeError(f"a file is {largest:,} bytes; the limit is {limits.max_file_bytes:,}")
    paths = [file.relative_path for file in files]
    _check_paths(state, paths, limits)
    # The rest of a command that is torn was accepted with its first events, perhaps by older rules.
    if not done:
        _check_tree(state, paths, limits)
    pieces = state.pieces
    if pieces is None:
        pieces = state.pieces = PackagePieces(state.package_id)
    command_ids = [str(command.command_id).encode() for command in commands]
    appended = ingested(
        pieces,
        [(text, c.actor, own, len(c.files)) for text, c, own in zip(command_ids, commands, left, strict=True)],
        created_at=now,
        sequence=state.sequence,
        digest=state.digest,
    )
    return Decision(FILE_INGESTED, now, pieces.text, commands, command_ids, done, appended)


def _finalize(state: PackageState, command: FinalizePackage, now: int, limits: Limits) -> Decision:
    check_text("actor", command.actor)
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
    decision = _single(command, PACKAGE_FINALIZED, payload, digest, now, state.sequence, state.digest)
    decision.claim_check = None if inline else manifest
    decision.unportable = state.find_unportable()
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
    event_id, package_id, command_id = (
        str(identifier).encode() for identifier in (event.event_id, event.package_id, event.command_id)
    )
    appended = EncodedEvents(event.sequence, [event_id], [encode(event)], [event_digest(event)])
    return Decision(event_type, now, package_id, [command], [command_id], 0, appended, event)


def _require_open(
    state: PackageState | None, package_id: UUID, command_id: UUID | None, now: int, limits: Limits
) -> PackageState:
    """The package, for this command, which it does not know."""
    if state is None:
        raise PackageNotFoundError(f"there is no package {package_id}")
    if state.status == ABANDONED or (state.status == CREATED and now - state.last_event_at > limits.max_idle_micros):
        raise _abandoned(state)
    if state.forgotten and command_id is not None:
        raise _expired(state, command_id)
    if state.status != CREATED:
        raise IllegalPackageStateError(f"package {package_id} is {state.status}; only a package that is open changes")
    return state


def _expired(state: PackageState, command_id: UUID) -> AnswerExpiredError:
    """What is known when a command may be a retry of one that the package has forgotten."""
    package_id, manifest = state.package_id, ContentAddress.of_digest(state.manifest_digest or NO_DIGEST)
    return AnswerExpiredError(
        f"package {package_id} was finalized more than {ANSWERS_KEPT_MICROS // 3_600_000_000} hours ago, with the "
        f"manifest {manifest}, and takes no new command. Whether command {command_id} was recorded before that cannot "
        f"be told here any more: the package's events name their commands, and its manifest lists its files",
        facts={"package_id": str(package_id), "finalized_at": state.last_event_at, "manifest_digest": manifest},
    )


def _abandoned(state: PackageState) -> PackageAbandonedError:
    return PackageAbandonedError(
        f"package {state.package_id} is open, and its last event lies more than "
        f"{MAX_IDLE_MICROS // MICROS_PER_DAY} days back, so that it takes no command any more: create another package. "
        f"Which commands were recorded before, its events tell",
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
                raise DuplicateRelativePathError(f"package {state.package_id} holds {path!r} already")
            seen.add(path)
    if len(files) + len(new) > limits.max_files_per_package:
        raise TooLargeError(f"a package holds at most {limits.max_files_per_package:,} files")


def _check_tree(state: PackageState, relative_paths: Sequence[str], limits: Limits) -> None:
    """Raise PathConflictError when a path would be both a file and a folder: nothing could unpack the package."""
    folders, files, new = set[str](), state.files, set(relative_paths)
    add_folders(folders, relative_paths)
    known = state.folders
    if not (known.isdisjoint(new) and folders.isdisjoint(new) and files.keys().isdisjoint(folders)):
        for path in relative_paths:
            if path in known or path in folders:
                raise PathConflictError(f"package {state.package_id}: {path!r} cannot be a file, other files lie in it")
            for folder in folders_above(path):
                if folder in files:
                    raise PathConflictError(f"package {state.package_id}: {path!r} cannot lie in {folder!r}, a file")
    most = limits.max_folders_per_package
    if len(known) + len(folders) > most and len(known) + len(folders - known) > most:
        raise TooLargeError(f"the files of a package lie in at most {most:,} folders")


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
            same = same and _same_files(state, known, command)
        case FinalizePackage():
            same = known.event_type == PACKAGE_FINALIZED
    if not same or known.actor != command.actor:
        raise CommandReusedError(f"command id {command.command_id} was used before with another request")
    return known


def _same_files(state: PackageState, known: CommandState, command: IngestFiles) -> bool:
    """Whether they are those of the command that is known, as far as it came."""
    at = 0
    for answered in known.answered:
        files = command.files[at : at + len(answered.event_digests) // DIGEST_BYTES]
        try:
            same = items_digest(_items(state, files)) == answered.items_digest
        except ValueError:  # they are such that no record can hold
            same = False
        if not same:
            return False
        at += len(files)
    return all(_same_file(state, path, file) for path, file in zip(known.paths, command.files, strict=False))


def _items(state: PackageState, files: Sequence[StoredFile]) -> Sequence[bytes]:
    """Their items in the manifest."""
    pieces = PackagePieces(state.package_id)
    return ingested(pieces, [(b"", "", files, len(files))], created_at=0, sequence=0, digest=NO_DIGEST).manifest_items


def _same_file(state: PackageState, path: str, file: StoredFile) -> bool:
    was = cbor2.loads(state.files[path].manifest_item)
    return bool(
        path == file.relative_path
        and was["media_type"] == file.media_type
        and was["blake3"] == file.blake3.hex()
        and was["sha256"] == file.sha256.hex()
        and was["size_bytes"] == file.size_bytes
    )


def _ingested(state: PackageState, command: IngestFiles) -> tuple[IngestedFile, ...]:
    """What became of the files, which is the same in the command as in the log."""
    of_package, found = state.files, []
    for file in command.files:
        path = file.relative_path
        sequence, event_digest, item, _ = of_package[path]
        values = item_file_id(item), path, file.size_bytes, file.blake3, file.sha256, sequence, event_digest
        found.append(IngestedFile(*values))
    return tuple(found)


def _answered(state: PackageState, done: CommandState, command: IngestFiles) -> tuple[IngestedFile, ...]:
    """The same, from what is left of them."""
    digests = b"".join(answered.event_digests for answered in done.answered)
    return tuple(
        IngestedFile(
            identifiers.file_id(state.package_id, file.relative_path),
            file.relative_path,
            file.size_bytes,
            file.blake3,
            file.sha256,
            done.last_sequence - done.count + place + 1,
            digests[place * DIGEST_BYTES : (place + 1) * DIGEST_BYTES],
        )
        for place, file in enumerate(command.files)
    )


def _files(command: Command) -> tuple[StoredFile, ...]:
    return command.files if isinstance(command, IngestFiles) else ()
