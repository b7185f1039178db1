"""Whose turn it is to run Python code, among the writers of a process.

Python runs one thread at a time in any case. But threads that all want to run take the interpreter from each other
every 5 ms, and the Kafka client asks for it once for every record that was delivered: with six busy writers that was
worth a fifth of what they did (docs/benchmarks.md). So a writer takes a turn for deciding and handing over a batch, and
waits for the brokers outside of it.
"""

from __future__ import annotations

from collections import deque
from threading import Lock
from types import TracebackType


class Turns:
    """A lock that is passed on in the order in which it was asked for, as `threading.Lock` is not. Not reentrant."""

    def __init__(self) -> None:
        self._guard = Lock()
        self._taken = False
        self._waiting: deque[Lock] = deque()

    @property
    def waiting(self) -> int:
        """How many threads wait for their turn."""
        return len(self._waiting)

    def __enter__(self) -> None:
        """Block until it is the caller's turn."""
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            ours = Lock()
            ours.acquire()
            self._waiting.append(ours)
        ours.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False
