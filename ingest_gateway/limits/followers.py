"""Followers: clients that follow events and stay until the gateway closes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager

from artifact_store.errors import PushBackError
from ingest_gateway.limits.admission import MAX_FOLLOWERS, Places, Refused

_RETRY_SECONDS = 5.0


def gateway_closes() -> PushBackError:
    """The error for a follower that is turned away because the gateway closes."""
    return PushBackError("this gateway is stopping", _RETRY_SECONDS)


class Followers:
    """The places for followers of one gateway. Belongs to one event loop."""

    def __init__(self, limit: int = MAX_FOLLOWERS, refused: Refused = lambda *_: None) -> None:
        self._places = Places("followers", limit, refused)
        self._stays: set[asyncio.Timeout] = set()
        self._closing = False

    def __len__(self) -> int:
        return len(self._places)

    @asynccontextmanager
    async def stay(self, client: str, until: float | None = None) -> AsyncIterator[Callable[[], None]]:
        """Hold a place for the length of the block. The block ends early, without an error, when the gateway closes.

        It also does at `until`, by the event loop's clock, and when the function is called that this yields: the place
        is free at once then, although the block takes a while to end.

        Raises as `Places.take`; PushBackError when the gateway closes.
        """
        if self._closing:
            raise gateway_closes()
        scope = asyncio.timeout_at(until)
        try:
            with ExitStack() as place:
                place.enter_context(self._places.place(client))

                def leave() -> None:
                    place.close()
                    _end(scope)

                async with scope:
                    self._stays.add(scope)
                    yield leave
        except TimeoutError:
            if not scope.expired():
                raise
        finally:
            self._stays.discard(scope)

    def dismiss(self) -> None:
        """End every follower's block, and take no more followers."""
        self._closing = True
        for scope in list(self._stays):
            _end(scope)


def _end(scope: asyncio.Timeout) -> None:
    if not scope.expired():
        scope.reschedule(asyncio.get_running_loop().time())
