"""Who is let in: how many connections, transfers, followers and bytes of JSON one gateway process takes at a time.

No client gets more than half of the places of a kind, nor of the room, so that one alone never keeps out all others. A
client is an address: behind a proxy that hides them, all are one.
"""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from ingest_gateway.problems import TooManyAtOnceError
from services.errors import PushBackError

Transfer = Literal["uploads", "downloads"]
"""What moves many bytes, and so has places of its own."""

MAX_DOWNLOADS = 128
"""How many downloads there may be: each may hold a connection to the blob store, of which uploads need theirs too."""

JSON_ROOM_BYTES = 64 << 20
"""How many bytes of JSON bodies may be held at a time, before they are commands."""

_RETRY_SECONDS = 2.0
_OTHER_DESCRIPTORS = 512
"""File descriptors that are kept for connections to the blob store, the log and the views, and for files."""

_WANTED_DESCRIPTORS = 65_536

Refused = Callable[[str], None]
"""Told of what there was no place for."""


class Places:
    """Places for one kind of thing. Belongs to one event loop."""

    def __init__(self, what: str, limit: int, refused: Refused = lambda _: None) -> None:
        self._what = what
        self._limit = limit
        self._per_client = max(1, limit // 2)
        self._refused = refused
        self._taken: Counter[str] = Counter()
        self._all = 0

    def __len__(self) -> int:
        return self._all

    def take(self, client: str) -> None:
        """Take a place, which `give` gives back.

        Raises PushBackError: all are taken. TooManyAtOnceError: this client has as many as one may have.
        """
        if self._all >= self._limit:
            self._refused(self._what)
            raise PushBackError(f"this gateway has {self._limit:,} {self._what} already", _RETRY_SECONDS)
        if self._taken[client] >= self._per_client:
            self._refused(self._what)
            raise TooManyAtOnceError(f"{self._per_client:,} {self._what} come from this address", _RETRY_SECONDS)
        self._taken[client] += 1
        self._all += 1

    def give(self, client: str) -> None:
        """Give a place back that this client has."""
        self._all -= 1
        self._taken[client] -= 1
        if not self._taken[client]:
            del self._taken[client]

    @contextmanager
    def place(self, client: str) -> Iterator[None]:
        """A place for the length of the block. Raises as `take`."""
        self.take(client)
        try:
            yield
        finally:
            self.give(client)


class Room:
    """So many bytes may be held at a time. Belongs to one event loop."""

    def __init__(self, what: str, limit: int, refused: Refused = lambda _: None) -> None:
        self._what = what
        self._limit = limit
        self._per_client = max(1, limit // 2)
        self._refused = refused
        self._held: Counter[str] = Counter()
        self._all = 0

    @contextmanager
    def share(self, client: str) -> Iterator[Callable[[int], None]]:
        """Gives a function that takes so many bytes more for this client; all come back at the end of the block.

        The function raises PushBackError: there is no room. TooManyAtOnceError: the client has as much as one may have.
        """
        held = 0

        def take(more: int) -> None:
            nonlocal held
            if self._all + more > self._limit:
                self._refused(self._what)
                raise PushBackError(f"this gateway holds as much {self._what} as it can already", _RETRY_SECONDS)
            if self._held[client] + more > self._per_client:
                self._refused(self._what)
                raise TooManyAtOnceError(
                    f"as much {self._what} as one may send comes from this address", _RETRY_SECONDS
                )
            held += more
            self._held[client] += more
            self._all += more

        try:
            yield take
        finally:
            self._all -= held
            self._held[client] -= held
            if not self._held[client]:
                del self._held[client]


def connections_within(wanted: int) -> int:
    """As many connections as are wanted and as the system lets this process have; raises its soft limit if it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _WANTED_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _WANTED_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < min(needed, wanted + _OTHER_DESCRIPTORS):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, wanted + _OTHER_DESCRIPTORS), hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - _OTHER_DESCRIPTORS))
