"""Which file a writer keeps its state in: one that no other process holds, for a frozen process may hold one for ever.

The first slot of a partition is `<topic>-<partition>.db`, further ones carry a number; each has a lock file beside it,
which stays. Whoever takes over looks at every slot that is free, goes on with the state that has come furthest, and
empties the others. A state that proves a loss stays in its slot, which is passed over until the loss is accepted.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from services.file_lock import FileLock
from services.log.kafka.loss import FILE, Loss, Witness
from services.log.kafka.state_file import (
    ForeignStateError,
    Place,
    StateFile,
    StateFileError,
    UnusableStateError,
    remove,
)

_LOG = logging.getLogger(__name__)


class Slot:
    """A place for a state file that this process holds, until `release`."""

    def __init__(self, path: Path, lock: FileLock) -> None:
        self.path = path
        self._lock = lock

    def release(self) -> None:
        """Let others have it; the file stays."""
        self._lock.release()


@dataclass(frozen=True, slots=True)
class Claim:
    """A slot of the partition, the state in it if there is one, and the losses that states in other slots prove."""

    slot: Slot
    file: StateFile | None
    losses: Sequence[Loss]


def claim(folder: Path, place: Place, lost: Callable[[Witness], Loss | None]) -> Claim:
    """Take a slot for the partition. Blocks, but waits for no lock.

    `lost` says what the log lost if it does not hold the record that a state stands on. Raises StateFileError, and
    whatever `lost` raises.
    """
    with _system_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        numbers = _numbers(folder, place)
        held = [slot for number in sorted({0, *numbers}) if (slot := _locked(folder, place, number))]
    files: list[tuple[Slot, StateFile]] = []
    empty: list[Slot] = []
    losses: list[Loss] = []
    try:
        for slot in held:
            found = _looked_at(slot, place, lost)
            if isinstance(found, Loss):
                losses.append(found)
            elif found is None:
                empty.append(slot)
            else:
                files.append((slot, found))
        files.sort(key=lambda kept: kept[1].standing.position)
        for slot, worse in files[:-1]:
            worse.close()
            remove(slot.path)
        kept, file = files[-1] if files else (empty[0] if empty else _fresh(folder, place, numbers), None)
    except BaseException:
        for _, opened in files:
            with suppress(StateFileError):
                opened.close()
        _release(held)
        raise
    _release([slot for slot in held if slot is not kept])
    return Claim(kept, file, losses)


def discard(path: Path) -> None:
    """Delete the state in a slot, unless another process holds it. Raises StateFileError."""
    with _system_errors(path.parent):
        lock = _lock_of(path)
        if lock.take():
            try:
                remove(path)
            finally:
                lock.release()


def _numbers(folder: Path, place: Place) -> set[int]:
    """Those of the slots that have ever been used."""
    form = re.compile(re.escape(f"{place.topic}-{place.partition}") + r"(?:\.([1-9][0-9]{0,5}))?\.db(?:\.lock)?")
    return {int(found[1] or 0) for path in folder.iterdir() if (found := form.fullmatch(path.name))}


def _fresh(folder: Path, place: Place, numbers: set[int]) -> Slot:
    """A slot that was never used."""
    _LOG.warning("no state of partition %d can be used: a fresh one is begun", place.partition)
    number = 1
    with _system_errors(folder):
        while number in numbers or (slot := _locked(folder, place, number)) is None:
            number += 1
    return slot


def _locked(folder: Path, place: Place, number: int) -> Slot | None:
    stem = f"{place.topic}-{place.partition}"
    path = folder / (f"{stem}.{number}.db" if number else f"{stem}.db")
    lock = _lock_of(path)
    return Slot(path, lock) if lock.take() else None


def _lock_of(path: Path) -> FileLock:
    return FileLock(path.with_name(path.name + ".lock"))


def _looked_at(slot: Slot, place: Place, lost: Callable[[Witness], Loss | None]) -> StateFile | Loss | None:
    """The state in the slot, or the loss that it proves; None when there is none, or none that can be used."""
    if not slot.path.exists():
        remove(slot.path)  # what SQLite kept beside a file that is gone
        return None
    try:
        file = StateFile.open(slot.path, place)
    except ForeignStateError as error:
        if (loss := lost(Witness(FILE, error.log, error.standing, str(slot.path)))) is not None:
            return loss
        _discard(slot, place, error)
        return None
    except UnusableStateError as error:
        _discard(slot, place, error)
        return None
    try:
        loss = lost(Witness(FILE, place.identity, file.standing, str(slot.path)))
    except BaseException:
        file.close()
        raise
    if loss is not None:
        file.close()
    return file if loss is None else loss


def _discard(slot: Slot, place: Place, error: StateFileError) -> None:
    _LOG.warning("a state file of partition %d is discarded: %s", place.partition, error.detail)
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
