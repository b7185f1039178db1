"""What the handlers of one gateway share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from ingest_gateway.event_tail import Tail
from ingest_gateway.health import Checks, ReadyAnswers
from ingest_gateway.http_metrics import Metrics
from ingest_gateway.limits.admission import HEADS_ROOM_BYTES, Bounds, Places, Room, Transfer
from ingest_gateway.limits.followers import Followers
from ingest_gateway.siblings import Siblings
from services.bundle_store import BUNDLES_AT_ONCE
from services.direct import DirectRegistry
from services.log.port import Log

_log = logging.getLogger(__name__)


class Gateway:
    """Registry, checks, metrics, places, and which requests are under way. Belongs to one event loop."""

    def __init__(
        self,
        registry: DirectRegistry,
        log: Log,
        checks: Checks,
        bounds: Bounds,
        metrics: Metrics,
        openapi: bytes,
        siblings: Siblings | None = None,
    ) -> None:
        """`siblings` are the other processes of a gateway of several."""
        self.registry = registry
        self.tail = Tail(log, extent=registry.package_extent)
        self.ready = ReadyAnswers(checks)
        self.bounds = bounds
        self.metrics = metrics
        self.openapi = openapi
        self.siblings = siblings
        self.followers = Followers(bounds.max_followers, metrics.refused)
        self.reads = Places("reads of events", bounds.max_reads, metrics.refused)
        self.connections = Places("connections", bounds.max_connections, metrics.refused)
        self.transfers: Mapping[Transfer, Places] = {
            "uploads": Places("uploads", bounds.max_uploads, metrics.refused),
            "downloads": Places("downloads", bounds.max_downloads, metrics.refused),
        }
        self.archives = Places("archives", BUNDLES_AT_ONCE, metrics.refused)
        """As many as bundles are read at a time: whoever has a place has a turn too, and nobody has all of them."""
        self.heads = Room("heads", HEADS_ROOM_BYTES, metrics.refused)
        self.json = Room("JSON", bounds.json_room_bytes, metrics.refused)
        self.parsing = asyncio.Lock()
        """Held by who parses a large JSON body: as objects it takes many times its bytes."""
        self.draining = False
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        metrics.watch(
            in_flight=lambda: self._in_flight,
            followers=lambda: len(self.followers),
            connections=lambda: len(self.connections),
            uploads=lambda: len(self.transfers["uploads"]),
            downloads=lambda: len(self.transfers["downloads"]),
        )

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """A request is under way for the length of the block."""
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def drain(self, seconds: float) -> None:
        """Let followers go and wait, for `seconds` at most, until every request is answered."""
        self.draining = True
        self.followers.dismiss()
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            _log.warning("%d requests were not done within %g s; they are cut off", self._in_flight, seconds)
