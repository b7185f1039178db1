"""Events from a gateway as NDJSON. After a lost connection, reading continues from the last position."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from uuid import UUID

import aiohttp

from artifact_store.client.transport import Transport, unavailable
from artifact_store.documents.event_lines import parse_event
from artifact_store.errors import CorruptError, UnavailableError
from artifact_store.events import RecordedEvent
from artifact_store.position import Position

_LONGEST_LINE_BYTES = 16 << 20
_BARREN_CONNECTIONS = 5
"""Give up after this many connections in a row that were lost soon and brought nothing."""

_PAUSE_SECONDS = 0.5


async def follow_events(
    transport: Transport, since: Position | None, package_id: UUID | None, *, follow: bool
) -> AsyncIterator[RecordedEvent]:
    """Events after `since`, as `Registry.read_events` promises: each once, over any number of connections.

    Raises what the answer stands for, UnavailableError when the gateway stays away, CorruptError for a line that is no
    event.
    """
    position = since
    barren = 0
    while True:
        began = time.monotonic()
        query = {"since": position, "package_id": package_id, "follow": "true" if follow else None}
        response = await transport.open(
            "/v1/events",
            query=query,
            headers={"Accept": "application/x-ndjson"},
            endless=follow,
        )
        try:
            async for line in _lines(transport, response):
                event = parse_event(line)
                barren = 0
                position = event.position
                yield event
            if not follow:
                return
        except UnavailableError:
            # On a quiet log, a connection lost after a while only shows that a proxy timed out.
            barren = barren + 1 if time.monotonic() - began < transport.policy.idle_seconds else 0
            if barren >= _BARREN_CONNECTIONS:
                raise
        finally:
            response.close()
        await asyncio.sleep(_PAUSE_SECONDS)


async def _lines(transport: Transport, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The answer's lines without the blank ones, which only keep the connection alive."""
    kept = bytearray()
    while chunk := await transport.read_chunk(response):
        kept += chunk
        if b"\n" not in chunk:
            if len(kept) > _LONGEST_LINE_BYTES:
                raise CorruptError("the gateway sent a line that is too long for an event")
            continue
        *whole, rest = kept.split(b"\n")
        kept = rest
        for line in whole:
            if line.strip():
                yield bytes(line)
    if kept:
        raise unavailable("the gateway ended the answer within an event")
