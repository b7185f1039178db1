"""What the handlers of one gateway share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ingest_gateway.admission import (
    HEADS_ROOM_BYTES,
    JSON_ROOM_BYTES,
    MAX_DOWNLOADS,
    MAX_READS,
    Places,
    Room,
    Transfer,
    connections_within,
)
from ingest_gateway.followers import MAX_FOLLOWERS, Followers
from ingest_gateway.forwarding import MAX_FORWARDED
from ingest_gateway.health import Checks, ReadyAnswers
from ingest_gateway.internal import MAX_TAKEN
from ingest_gateway.metrics import Metrics
from ingest_gateway.siblings import Siblings
from ingest_gateway.tail import Tail
from services.bundle_store import BUNDLES_AT_ONCE
from services.config import Settings
from services.direct import DirectRegistry
from services.log.port import Log

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bounds:
    """What one gateway takes, in bytes, seconds and clients."""

    max_file_bytes: int
    max_metadata_bytes: int
    max_followers: int = MAX_FOLLOWERS
    max_reads: int = MAX_READS
    max_connections: int = 2048
    max_uploads: int = 256
    max_downloads: int = MAX_DOWNLOADS
    json_room_bytes: int = JSON_ROOM_BYTES
    """Bytes of JSON bodies that may be held at a time."""
    body_idle_seconds: float = 60.0
    """How long a body may stand still, and over how long its pace is taken; so too an answer's."""
    body_bytes_per_second: float = 1024.0
    """The least pace of a body, or of a client that takes an answer, that is waited for."""
    heartbeat_seconds: float = 10.0
    """How often a quiet follower is looked after."""

    @classmethod
    def of(cls, settings: Settings) -> Bounds:
        """The bounds of these settings."""
        from services.wiring import is_embedded  # wiring chooses adapters, and imports this package

        forwarded = 0 if is_embedded(settings) else MAX_FORWARDED + MAX_TAKEN
        return cls(
            settings.max_file_bytes,
            settings.max_metadata_bytes,
            max_connections=connections_within(settings.max_connections, forwarded),
            max_uploads=settings.max_uploads,
        )


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
