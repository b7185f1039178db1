"""What a writer's state can be restored from: its own file, a snapshot, or nothing, which means the log from zero.

None is believed before it was seen to stand on the log, so the next best one follows for the case that it does not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from services.log.kafka.snapshots import Snapshot, SnapshotError, Snapshots
from services.log.kafka.state import PartitionState
from services.log.kafka.state_file import Place, StateFile, StateFileError, remove
from services.log.kafka.state_slots import Slot

FROM_FILE = "file"
FROM_SNAPSHOT = "snapshot"
FROM_LOG = "log"

WORTH_OFFSETS = 50_000
"""How far a snapshot must be ahead of the file for it to be fetched instead."""

_FETCHED = ".fetched"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class States:
    """Where the writers of a process keep their states, and where they may find one of others."""

    folder: Path
    snapshots: Snapshots | None = None


def candidates(
    slot: Slot, file: StateFile | None, place: Place, states: States, end: int, stopping: Callable[[], bool]
) -> Iterator[tuple[str, PartitionState]]:
    """States to go on from, the best first, none of them beyond `end`, each with where it comes from.

    The caller ends a state that it does not take by `discard`. Blocks. Raises StateFileError; PartitionNotOwnedError
    when `stopping` came true.
    """
    if file is not None and file.standing.position > end:
        _LOG.warning("the state file of partition %d is beyond the log's end and discarded", place.partition)
        file.close()
        remove(file.path)
        file = None
    tried: set[Snapshot] = set()
    try:
        while (snapshot := _better(states.snapshots, place, file, end, tried, stopping)) is not None:
            tried.add(snapshot)
            if _fetched(states.snapshots, snapshot, place, slot, end, stopping):
                if file is not None:
                    file.close()
                file = None
                yield FROM_SNAPSHOT, _moved_in(slot, place)
    except BaseException:
        if file is not None:
            file.close()
        raise
    if file is not None:
        yield FROM_FILE, PartitionState(file)
    yield FROM_LOG, PartitionState(StateFile.create(slot.path, place))


def _better(
    snapshots: Snapshots | None,
    place: Place,
    file: StateFile | None,
    end: int,
    tried: set[Snapshot],
    stopping: Callable[[], bool],
) -> Snapshot | None:
    """The newest snapshot that was not tried, if it is worth more than the file."""
    at_least = 0 if file is None else file.standing.position + WORTH_OFFSETS
    if snapshots is None or at_least > end:
        return None
    try:
        found = snapshots.newest(place, tried, stopping)
    except SnapshotError as error:
        _LOG.warning("no snapshot of partition %d can be looked for: %s", place.partition, error.detail)
        return None
    return found if found is not None and found.position >= at_least else None


def _fetched(
    snapshots: Snapshots | None, snapshot: Snapshot, place: Place, slot: Slot, end: int, stopping: Callable[[], bool]
) -> bool:
    """Bring a snapshot beside the slot's file; False, and a line in the log, when it is of no use."""
    path = _beside(slot)
    if snapshots is None:
        return False
    try:
        remove(path)
        if snapshot.position > end:
            raise SnapshotError("it is beyond the log's end")
        snapshots.fetch(snapshot, place, path, stopping)
        found = StateFile.open(path, place)
        position = found.standing.position
        found.close()
        if position != snapshot.position:
            raise SnapshotError("it stands elsewhere than it should")
    except (SnapshotError, StateFileError) as error:
        _LOG.warning(
            "the snapshot of partition %d at offset %d is not used: %s",
            place.partition,
            snapshot.position,
            error.detail,
        )
        remove(path)
        return False
    except BaseException:
        remove(path)
        raise
    snapshots.restored(place.partition, snapshot.position)
    return True


def _moved_in(slot: Slot, place: Place) -> PartitionState:
    remove(slot.path)
    _beside(slot).rename(slot.path)
    return PartitionState(StateFile.open(slot.path, place))


def _beside(slot: Slot) -> Path:
    return slot.path.with_name(slot.path.name + _FETCHED)
