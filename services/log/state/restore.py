"""Where a writer's state comes from at a take-over: its own file, a snapshot, or the log from offset zero.

A state is trusted only after the record that it names was found in the log. A state whose record is missing proves a
loss (see `loss`). The next best state is used nevertheless, so that the writer is ready when the loss is accepted.

A frozen process may hold a state file for ever, so a partition has several slots for files. The first is
`<topic>-<partition>.db`, further ones carry a number; each has a lock file beside it, which stays. A take-over checks
every free slot, continues with the newest state and empties the others. A state that proves a loss stays in its slot,
which is skipped until the loss is accepted.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from services.log.state.loss import FILE, Loss, Witness
from services.log.state.partition_state import PartitionState
from services.log.state.snapshots import Snapshot, SnapshotError, Snapshots, Stored
from services.log.state.state_file import (
    Anchor,
    DiskFullError,
    ForeignStateError,
    LogPartition,
    StateFile,
    StateFileError,
    UnusableStateError,
    files_of,
    remove,
)
from services.runtime.file_system import PRIVATE_FOLDER, FileLock, only_we_write

FROM_FILE = "file"
FROM_SNAPSHOT = "snapshot"
FROM_LOG = "log"

WORTH_OFFSETS = 50_000
"""How many offsets a snapshot must be ahead of the file for it to be fetched instead."""

_FETCHED = ".fetched"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class States:
    """The places where the writers of a process keep their states, and where they may find others."""

    folder: Path
    snapshots: Snapshots | None = None
    remembered: dict[int, tuple[UUID, Anchor]] = field(default_factory=dict)
    """By partition, the log and the last record that a writer of this process has read; may be newer than any file."""


def candidates(
    slot: Slot,
    file: StateFile | None,
    found: Iterable[Snapshot],
    origin: LogPartition,
    states: States,
    stopping: Callable[[], bool],
) -> Iterator[tuple[str, PartitionState]]:
    """States to continue from, best first, each with its source; snapshots only if fetching them is worth it.

    The caller must call `discard` on a state that it does not use. Blocks. Raises StateFileError;
    PartitionNotOwnedError if `stopping` became true.
    """
    at_least = 0 if file is None else file.anchor.next_offset + WORTH_OFFSETS
    try:
        for snapshot in sorted(found, reverse=True):
            if snapshot.next_offset >= at_least and _fetched(states.snapshots, snapshot, origin, slot, stopping):
                if file is not None:
                    file.close()
                file = None
                yield FROM_SNAPSHOT, _moved_in(slot, origin)
    except BaseException:
        if file is not None:
            file.close()
        raise
    if file is not None:
        yield FROM_FILE, PartitionState(file)
    yield FROM_LOG, PartitionState(_fresh(slot, origin))


def _fresh(slot: Slot, origin: LogPartition) -> StateFile:
    try:
        return StateFile.create(slot.path, origin)
    except DiskFullError as error:
        _LOG.warning("the state of partition %d is kept in memory: %s", origin.partition, error.detail)
        return StateFile.in_memory(slot.path, origin)


def stored(states: States, origin: LogPartition, stopping: Callable[[], bool]) -> Stored:
    """What the store has of the partition; nothing, with a log message, if it does not answer.

    Blocks. Raises PartitionNotOwnedError if `stopping` became true.
    """
    if states.snapshots is None:
        return Stored()
    try:
        return states.snapshots.look(origin, stopping)
    except SnapshotError as error:
        _LOG.warning("no snapshot of partition %d can be looked for: %s", origin.partition, error.detail)
        return Stored()


def witnesses(
    states: States, found: Stored, origin: LogPartition, end: int, stopping: Callable[[], bool]
) -> Iterator[Witness]:
    """All evidence of records: witnesses, and those of snapshots beyond `end` without a witness, which are fetched.

    Blocks. Raises PartitionNotOwnedError if `stopping` became true.
    """
    yield from found.witnesses
    known = {witness.anchor.next_offset for witness in found.witnesses if witness.log == origin.identity}
    for snapshot in found.snapshots:
        if states.snapshots is not None and snapshot.next_offset > end and snapshot.next_offset not in known:
            try:
                yield states.snapshots.witness_of(snapshot, origin, states.folder, stopping)
            except (SnapshotError, StateFileError) as error:
                _unused(origin, snapshot, error)


def _fetched(
    snapshots: Snapshots | None, snapshot: Snapshot, origin: LogPartition, slot: Slot, stopping: Callable[[], bool]
) -> bool:
    """Fetch a snapshot beside the slot's file. Returns False, with a log message, if it cannot be used."""
    path = _beside(slot)
    if snapshots is None:
        return False
    try:
        remove(path)
        snapshots.fetch(snapshot, origin, path, stopping)
        found = StateFile.open(path, origin)
        next_offset = found.anchor.next_offset
        found.close()
        if next_offset != snapshot.next_offset:
            raise SnapshotError("it stands elsewhere than it should")
    except (SnapshotError, StateFileError) as error:
        _unused(origin, snapshot, error)
        remove(path)
        return False
    except BaseException:
        remove(path)
        raise
    snapshots.restored(origin.partition, snapshot.next_offset)
    return True


def _unused(origin: LogPartition, snapshot: Snapshot, error: SnapshotError | StateFileError) -> None:
    _LOG.warning(
        "the snapshot of partition %d at offset %d is not used: %s",
        origin.partition,
        snapshot.next_offset,
        error.detail,
    )


def _moved_in(slot: Slot, origin: LogPartition) -> PartitionState:
    remove(slot.path)
    _beside(slot).rename(slot.path)
    return PartitionState(StateFile.open(slot.path, origin))


def _beside(slot: Slot) -> Path:
    return slot.path.with_name(slot.path.name + _FETCHED)


class ExposedFolderError(StateFileError):
    """The folder of the states belongs to another user, or other users may write to it."""


class Slot:
    """A path for a state file that only this process uses, until `release`."""

    def __init__(self, path: Path, lock: FileLock) -> None:
        self.path = path
        self._lock = lock

    def release(self) -> None:
        """Let others use the slot; the file stays."""
        self._lock.release()


@dataclass(frozen=True, slots=True)
class Claim:
    """A slot of the partition, the state in it if there is one, and the losses that states in other slots prove."""

    slot: Slot
    file: StateFile | None
    losses: Sequence[Loss]


def claim(folder: Path, origin: LogPartition, lost: Callable[[Witness], Loss | None]) -> Claim:
    """Take a slot for the partition. Blocks, but waits for no lock.

    `lost` returns the loss if the log does not hold a state's last record. Raises as `require_own_folder`,
    StateFileError, and whatever `lost` raises.
    """
    require_own_folder(folder)
    with _system_errors(folder):
        numbers = _numbers(folder, origin)
        held = [slot for number in sorted({0, *numbers}) if (slot := _locked(folder, origin, number))]
    files: list[tuple[Slot, StateFile]] = []
    empty: list[Slot] = []
    losses: list[Loss] = []
    try:
        for slot in held:
            found = _looked_at(slot, origin, lost)
            if isinstance(found, Loss):
                losses.append(found)
            elif found is None:
                empty.append(slot)
            else:
                files.append((slot, found))
        files.sort(key=lambda kept: kept[1].anchor.next_offset)
        for slot, worse in files[:-1]:
            worse.close()
            remove(slot.path)
        kept, file = files[-1] if files else (empty[0] if empty else _fresh_slot(folder, origin, numbers), None)
    except BaseException:
        for _, opened in files:
            with suppress(StateFileError):
                opened.close()
        _release(held)
        raise
    _release([slot for slot in held if slot is not kept])
    return Claim(kept, file, losses)


def require_own_folder(folder: Path) -> None:
    """Create the folder of the states, or check the existing one. Blocks.

    A writer trusts its files, and SQLite trusts the files beside them. Raises ExposedFolderError; StateFileError: the
    folder cannot be used.
    """
    with _system_errors(folder):
        folder.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
        if only_we_write(folder):
            return
    raise ExposedFolderError(
        f"ARTIFACT_STORE_STATE_DIR {folder} belongs to another user, or other users may write to it: what they put "
        "there would decide what this writer answers. Make the folder this user's own and closed to others (chown, "
        "chmod go-w), remove what is not yours in it, or name another folder"
    )


def discard(path: Path) -> None:
    """Delete the state in a slot, unless another process holds it. Raises StateFileError."""
    with _system_errors(path.parent):
        lock = _lock_of(path)
        if lock.take():
            try:
                remove(path)
            finally:
                lock.release()


def _numbers(folder: Path, origin: LogPartition) -> set[int]:
    """The numbers of all slots that have ever been used."""
    form = re.compile(re.escape(f"{origin.topic}-{origin.partition}") + r"(?:\.([1-9][0-9]{0,5}))?\.db(?:\.lock)?")
    return {int(found[1] or 0) for path in folder.iterdir() if (found := form.fullmatch(path.name))}


def _fresh_slot(folder: Path, origin: LogPartition, numbers: set[int]) -> Slot:
    """A slot that was never used."""
    _LOG.warning("no state of partition %d can be used: a fresh one is begun", origin.partition)
    number = 1
    with _system_errors(folder):
        while number in numbers or (slot := _locked(folder, origin, number)) is None:
            number += 1
    return slot


def _locked(folder: Path, origin: LogPartition, number: int) -> Slot | None:
    stem = f"{origin.topic}-{origin.partition}"
    path = folder / (f"{stem}.{number}.db" if number else f"{stem}.db")
    lock = _lock_of(path)
    return Slot(path, lock) if lock.take() else None


def _lock_of(path: Path) -> FileLock:
    return FileLock(path.with_name(path.name + ".lock"))


def _looked_at(slot: Slot, origin: LogPartition, lost: Callable[[Witness], Loss | None]) -> StateFile | Loss | None:
    """The state in the slot, or the loss that it proves; None if there is no usable state."""
    if not slot.path.exists():
        remove(slot.path)  # files that SQLite kept beside a deleted one
        return None
    try:
        _refuse_stranger(slot.path)
        file = StateFile.open(slot.path, origin)
    except ForeignStateError as error:
        if (loss := lost(Witness(FILE, error.log, error.anchor, str(slot.path)))) is not None:
            return loss
        _discard(slot, origin, error)
        return None
    except UnusableStateError as error:
        _discard(slot, origin, error)
        return None
    try:
        loss = lost(Witness(FILE, origin.identity, file.anchor, str(slot.path)))
    except BaseException:
        file.close()
        raise
    if loss is not None:
        file.close()
    return file if loss is None else loss


def _refuse_stranger(path: Path) -> None:
    """Raise UnusableStateError for a state that another user made or may change, because a writer would trust it."""
    for file in files_of(path):  # SQLite reads files beside it as its newest part
        if file.exists() and (file.stat().st_uid != os.geteuid() or not only_we_write(file)):
            raise UnusableStateError(f"{file} belongs to another user, or others may write it")


def _discard(slot: Slot, origin: LogPartition, error: StateFileError) -> None:
    _LOG.warning("a state file of partition %d is discarded: %s", origin.partition, error.detail)
    remove(slot.path)


def _release(slots: Sequence[Slot]) -> None:
    for slot in slots:
        slot.release()


@contextmanager
def _system_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StateFileError(f"ARTIFACT_STORE_STATE_DIR {folder} cannot be used: {error.strerror}") from error
