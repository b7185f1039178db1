"""Advisory file locks between processes, which the system releases however their holder ends."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

_POLL_SECONDS = 0.002


class FileLock:
    """An exclusive lock on a file that holds nothing and is never deleted (a deleted one could be held twice).

    Two instances exclude each other within one process too (flock(2) locks belong to the open file).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this instance holds the lock."""
        return self._descriptor is not None

    def take(self, timeout_seconds: float = 0.0) -> bool:
        """Take the lock, waiting at most so long; blocks meanwhile. False when another holds it. Raises OSError."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        deadline = time.monotonic() + timeout_seconds
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        return False
                    time.sleep(_POLL_SECONDS)
                else:
                    self._descriptor = descriptor
                    return True
        finally:
            if self._descriptor != descriptor:
                os.close(descriptor)

    def release(self) -> None:
        """Give the lock back; nothing happens when it is not held. Only for the process that took it."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that was forked meanwhile has the file open as well
            os.close(descriptor)
