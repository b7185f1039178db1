"""evolve: the state of a package after one more event."""

from __future__ import annotations

from artifact_store.errors import CorruptError
from artifact_store.events import Event, FileIngested, PackageCreated, PackageFinalized
from artifact_store.rules import Unportable
from schemas.digests import event_digest
from services.core.freezing import manifest_items
from services.core.state import CREATED, FINALIZED, CommandState, FileState, PackageState


def evolve(
    state: PackageState | None, event: Event, digest: bytes | None = None, unportable: Unportable | None = None
) -> PackageState:
    """Apply the event; `state` is None before the first. The state is changed in place and returned.

    `digest` is the event's chain digest, and `unportable` what a finalization finds in the package, for a caller that
    has just computed them.

    Raises:
        CorruptError: the event cannot follow the state: a gap in the sequence, a broken chain, an impossible order.
            The state is as it was.
    """
    digest = digest or event_digest(event)
    payload = event.payload
    if state is None:
        if not isinstance(payload, PackageCreated) or event.sequence != 1:
            raise CorruptError(f"package {event.package_id}: {event.event_type} {event.sequence} precedes its creation")
        state = PackageState(event.package_id, payload, event.created_at, event.created_at, 0, bytes(32))
    elif isinstance(payload, PackageCreated):
        raise CorruptError(f"package {event.package_id} is created twice")
    if event.sequence != state.sequence + 1 or event.previous_digest != state.digest:
        raise CorruptError(
            f"package {event.package_id}: event {event.sequence} does not follow event {state.sequence} in the chain"
        )
    if state.status == FINALIZED:
        raise CorruptError(f"package {event.package_id}: {event.event_type} follows its finalization")
    if state.forgotten:
        raise CorruptError(f"package {event.package_id}: {event.event_type} follows files that are not kept any more")
    command = state.commands.get(event.command_id)
    done = 0 if command is None else command.done
    if event.command_index != done or (state.unfinished not in (None, event.command_id)):
        raise CorruptError(f"package {event.package_id}: event {event.sequence} is out of its command's order")
    match payload:
        case FileIngested():
            if payload.relative_path in state.files:
                raise CorruptError(f"package {event.package_id}: event {event.sequence} ingests a path again")
            item, receipt = manifest_items(payload)
            state.add_files([payload.relative_path], [FileState(event.sequence, digest, item, receipt)])
            state.total_bytes += payload.size_bytes
        case PackageFinalized():
            state.status = FINALIZED
            state.manifest_digest = event.payload_digest
            state.unportable = state.find_unportable() if unportable is None else unportable
    _note_command(state, event, digest)
    state.sequence = event.sequence
    state.digest = digest
    state.last_event_at = event.created_at
    return state


def repeats(state: PackageState | None, event: Event) -> bool:
    """Whether the package has the event already: its number is taken, and by this event as far as the state tells.

    Of an open package the state tells it of every event, of a finalized one of the last.

    Raises:
        CorruptError: the number is that of another event, or none.
    """
    if state is None or event.sequence > state.sequence:
        return False
    if event.sequence < 1 or _is_another(state, event):
        raise CorruptError(
            f"package {event.package_id}: event {event.sequence} is there already, and its content is another one"
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


def _note_command(state: PackageState, event: Event, digest: bytes) -> None:
    command = state.commands.get(event.command_id)
    if command is None:
        command = CommandState(event.event_type, event.actor, event.command_count)
        state.commands[event.command_id] = command
    command.done += 1
    command.last_sequence = event.sequence
    command.last_digest = digest
    if isinstance(event.payload, FileIngested):
        command.paths.append(event.payload.relative_path)
    state.unfinished = None if command.done == command.count else event.command_id
