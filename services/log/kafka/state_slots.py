"""Which file a writer keeps its state in: one that no other process holds, for a frozen process may hold one for ever.

The first slot of a partition is `<topic>-<partition>.db`, further ones carry a number; each has a lock file beside it,
which stays. Whoever takes over takes every slot that is free, goes on with the one that has come furthest, and empties
the others.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from services.file_lock import FileLock
from services.log.kafka.state_file import Place, StateFile, StateFileError, UnusableStateError, remove

_LOG = logging.getLogger(__name__)


class Slot:
    """A place for a state file that this process holds, until `release`."""

    def __init__(self, path: Path, lock: FileLock) -> None:
        self.path = path
        self._lock = lock

    def release(self) -> None:
        """Let others have it; the file stays."""
        self._lock.release()


def claim(folder: Path, place: Place) -> tuple[Slot, StateFile | None]:
    """A slot of the partition, and the state in it if there is one that can be used. Blocks, but waits for no lock.

    Raises StateFileError.
    """
    with _system_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        slots = _free(folder, place)
    best: tuple[Slot, StateFile | None] = slots[0], None
    try:
        for slot in slots:
            file = _opened(slot, place)
            if file is None:
                continue
            worse = best if best[1] is None or file.standing.position > best[1].standing.position else (slot, file)
            if worse is best:
                best = slot, file
            if worse[1] is not None:
                worse[1].close()
                remove(worse[1].path)
    except BaseException:
        _release(slots)
        raise
    _release([slot for slot in slots if slot is not best[0]])
    return best


def _free(folder: Path, place: Place) -> Sequence[Slot]:
    """Lock what can be locked, one at least."""
    stem = f"{place.topic}-{place.partition}"
    form = re.compile(re.escape(stem) + r"(?:\.([1-9][0-9]{0,5}))?\.db(?:\.lock)?")
    numbers = {int(found[1] or 0) for path in folder.iterdir() if (found := form.fullmatch(path.name))}
    slots = [slot for number in sorted({0, *numbers}) if (slot := _locked(folder, stem, number))]
    number = 1
    while not slots:
        if number not in numbers and (slot := _locked(folder, stem, number)):
            _LOG.warning("the state of partition %d is held by another process: a fresh one is begun", place.partition)
            slots = [slot]
        number += 1
    return slots


def _locked(folder: Path, stem: str, number: int) -> Slot | None:
    path = folder / (f"{stem}.{number}.db" if number else f"{stem}.db")
    lock = FileLock(path.with_name(path.name + ".lock"))
    return Slot(path, lock) if lock.take() else None


def _opened(slot: Slot, place: Place) -> StateFile | None:
    if not slot.path.exists():
        remove(slot.path)  # what SQLite kept beside a file that is gone
        return None
    try:
        return StateFile.open(slot.path, place)
    except UnusableStateError as error:
        _LOG.warning("a state file of partition %d is discarded: %s", place.partition, error.detail)
        remove(slot.path)
        return None


def _release(slots: Sequence[Slot]) -> None:
    for slot in slots:
        slot.release()


@contextmanager
def _system_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StateFileError(f"ARTIFACT_STORE_STATE_DIR {folder} cannot be used: {error.strerror}") from error
