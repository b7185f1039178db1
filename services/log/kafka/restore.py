"""What a writer's state can be restored from: its own file, a snapshot, or nothing, which means the log from zero.

None is believed before it was seen to stand on the log. One that does not stand on it proves a loss (see `loss`); the
next best one follows all the same, so that the writer is ready when the loss is accepted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from services.log.kafka.loss import Witness
from services.log.kafka.snapshots import Snapshot, SnapshotError, Snapshots, Stored
from services.log.kafka.state import PartitionState
from services.log.kafka.state_file import DiskFullError, Place, StateFile, StateFileError, remove
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
    slot: Slot,
    file: StateFile | None,
    found: Iterable[Snapshot],
    place: Place,
    states: States,
    stopping: Callable[[], bool],
) -> Iterator[tuple[str, PartitionState]]:
    """States to go on from, the best first, each with where it comes from; of the snapshots only what is worth it.

    The caller ends a state that it does not take by `discard`. Blocks. Raises StateFileError; PartitionNotOwnedError
    when `stopping` came true.
    """
    at_least = 0 if file is None else file.standing.position + WORTH_OFFSETS
    try:
        for snapshot in sorted(found, reverse=True):
            if snapshot.position >= at_least and _fetched(states.snapshots, snapshot, place, slot, stopping):
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
    yield FROM_LOG, PartitionState(_fresh(slot, place))


def _fresh(slot: Slot, place: Place) -> StateFile:
    try:
        return StateFile.create(slot.path, place)
    except DiskFullError as error:
        _LOG.warning("the state of partition %d is kept in memory: %s", place.partition, error.detail)
        return StateFile.in_memory(slot.path, place)


def stored(states: States, looking: Future[Stored] | None, place: Place, stopping: Callable[[], bool]) -> Stored:
    """What the store was found to have; nothing, and a line in the log, when it gives no answer.

    Blocks. Raises PartitionNotOwnedError when `stopping` came true.
    """
    if states.snapshots is None or looking is None:
        return Stored()
    try:
        return states.snapshots.found(looking, stopping)
    except SnapshotError as error:
        _LOG.warning("no snapshot of partition %d can be looked for: %s", place.partition, error.detail)
        return Stored()


def witnesses(states: States, found: Stored, place: Place, end: int, stopping: Callable[[], bool]) -> Iterator[Witness]:
    """All that remembers a record: witnesses, and snapshots beyond `end` that have none, which are fetched for it.

    Blocks. Raises PartitionNotOwnedError when `stopping` came true.
    """
    yield from found.witnesses
    known = {witness.standing.position for witness in found.witnesses if witness.log == place.identity}
    for snapshot in found.snapshots:
        if states.snapshots is not None and snapshot.position > end and snapshot.position not in known:
            try:
                yield states.snapshots.witness_of(snapshot, place, states.folder, stopping)
            except (SnapshotError, StateFileError) as error:
                _unused(place, snapshot, error)


def _fetched(
    snapshots: Snapshots | None, snapshot: Snapshot, place: Place, slot: Slot, stopping: Callable[[], bool]
) -> bool:
    """Bring a snapshot beside the slot's file; False, and a line in the log, when it is of no use."""
    path = _beside(slot)
    if snapshots is None:
        return False
    try:
        remove(path)
        snapshots.fetch(snapshot, place, path, stopping)
        found = StateFile.open(path, place)
        position = found.standing.position
        found.close()
        if position != snapshot.position:
            raise SnapshotError("it stands elsewhere than it should")
    except (SnapshotError, StateFileError) as error:
        _unused(place, snapshot, error)
        remove(path)
        return False
    except BaseException:
        remove(path)
        raise
    snapshots.restored(place.partition, snapshot.position)
    return True


def _unused(place: Place, snapshot: Snapshot, error: SnapshotError | StateFileError) -> None:
    _LOG.warning(
        "the snapshot of partition %d at offset %d is not used: %s", place.partition, snapshot.position, error.detail
    )


def _moved_in(slot: Slot, place: Place) -> PartitionState:
    remove(slot.path)
    _beside(slot).rename(slot.path)
    return PartitionState(StateFile.open(slot.path, place))


def _beside(slot: Slot) -> Path:
    return slot.path.with_name(slot.path.name + _FETCHED)
