"""evolve: the state of a package after one more event."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

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
from schemas.digests import event_digest
from schemas.runs import CommandFiles, FileRun, commands_of
from services.core.state import CREATED, FINALIZED, CommandState, FileState, PackageState, manifest_item, receipt_item


def evolve(state: PackageState | None, event: Event | FileRun) -> PackageState:
    """Apply the event to the state, which is changed in place and returned; None is the state before the first event.

    Raises:
        CorruptError: the event cannot follow the state: a gap in the sequence, a broken chain, an impossible order.
            The state is unchanged.
    """
    if isinstance(event, Event) and isinstance(event.payload, FileIngested):
        event = FileRun.of(event, event.payload)
    event_type = first_version(event.event_type)
    if state is None:
        state = _created(event)
    elif event_type == PACKAGE_CREATED:
        raise CorruptError(f"package {event.package_id} is created twice")
    _check_follows(state, event)
    commands = commands_of(event)
    _check_commands(state, event, commands)
    if isinstance(event, FileRun):
        _add_files(state, event)
        digests = event.digests
    else:
        digests = (event_digest(event),)
        if isinstance(event.payload, PackageFinalized):
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
    """The state after all of these events. Raises as `evolve`; ValueError if there is neither an event nor a state."""
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

    It has an event with this sequence, and the two are compared as far as the state allows: for an open package that is
    every event, for a finalized one only the last.

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
