"""What an interrupted push leaves behind, so that the same push, run again, goes on instead of starting anew.

All that is kept is the push's own id: every command id is derived from it, so a repeat of any step answers as the first
did. One small file per push, locked while it runs; two equal pushes at one time are two pushes.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4, uuid5

from blake3 import blake3

_MOST_AT_ONCE = 64


@dataclass(slots=True)
class PushState:
    """One push.

    `resumed`: an earlier run began it. `kept`: a later run can go on. `began`: something was sent. `done`: forget it.
    """

    push_id: UUID
    resumed: bool
    kept: bool
    began: bool = False
    done: bool = False

    def command_id(self, step: str) -> UUID:
        """The command id of one step, the same in every run."""
        return uuid5(self.push_id, step)


def default_folder() -> Path | None:
    """Where states of pushes lie: `artifact-store/pushes` in the user's state folder (XDG Base Directory 0.8).

    None where the user has no home.
    """
    named = os.environ.get("XDG_STATE_HOME", "")
    try:
        state = Path(named) if named.startswith("/") else Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return state / "artifact-store" / "pushes"


@contextmanager
def push_state(folder: Path | None, identity: dict[str, Any], *, fresh: bool = False) -> Iterator[PushState]:
    """The state of the push that `identity` describes (JSON values), locked inside the block.

    `fresh` forgets what an interrupted run left. With no folder, or one that cannot be written, nothing is kept and the
    push cannot be resumed. Blocks for a moment.
    """
    descriptor, path = _lock(folder, identity)
    if descriptor is None or path is None:
        yield PushState(uuid4(), resumed=False, kept=False)
        return
    try:
        known = None if fresh else _read(descriptor)
        state = PushState(known or uuid4(), resumed=known is not None, kept=True)
        if known is None and not _write(descriptor, state.push_id):
            _forget(descriptor, path)
            yield PushState(uuid4(), resumed=False, kept=False)
            return
        try:
            yield state
        finally:
            if state.done or not (state.began or state.resumed):
                _forget(descriptor, path)
    finally:
        os.close(descriptor)


def _lock(folder: Path | None, identity: dict[str, Any]) -> tuple[int | None, Path | None]:
    """The first state file of this push that no running process holds, opened and locked."""
    if folder is None:
        return None, None
    try:
        # Not JCS, which refuses what the registry will refuse with a reason: NaN, surrogates, numbers beyond a double.
        name = blake3(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for number in range(_MOST_AT_ONCE):
            path = folder / f"{name}.{number}.json"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            if _try_lock(descriptor, path):
                return descriptor, path
            os.close(descriptor)
    except (OSError, RecursionError):  # so many levels the registry refuses as well
        return None, None
    return None, None


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    try:
        # Another push may have finished and removed the file between our opening and locking it.
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> UUID | None:
    try:
        return UUID(json.loads(os.pread(descriptor, 4096, 0))["push_id"])
    except (ValueError, KeyError, TypeError):
        return None  # new, or cut off while it was written: then nothing was sent under its id


def _forget(descriptor: int, path: Path) -> None:
    """Empty the file, which is no state then, and remove it; that it has gone, or has to stay, spoils no push."""
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
    with suppress(OSError):
        path.unlink()


def _write(descriptor: int, push_id: UUID) -> bool:
    """Keep the id; whether that could be done."""
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"push_id": str(push_id)}).encode(), 0)
        os.fsync(descriptor)
    except OSError:
        return False
    return True
