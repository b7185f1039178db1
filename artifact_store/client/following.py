"""Events from a gateway as NDJSON. After a lost connection, reading continues from the last position."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import aiohttp

from artifact_store.client.transport import Transport, unavailable
from artifact_store.documents.event_lines import parse_event, position_in
from artifact_store.documents.http import LOG_END
from artifact_store.errors import CorruptError, UnavailableError
from artifact_store.events import RecordedEvent
from artifact_store.models import EventFilter
from artifact_store.position import Position
from artifact_store.registry import NOW, Order, Start, start_text

_LONGEST_LINE_BYTES = 16 << 20
_BARREN_CONNECTIONS = 5
"""Give up after this many connections in a row that were lost soon without any event."""

_PAUSE_SECONDS = 0.5


async def follow_events(
    transport: Transport, start: Start, wanted: EventFilter, *, follow: bool, order: Order = "log"
) -> AsyncIterator[RecordedEvent]:
    """Events from `start` on, as `Registry.read_events` promises: each once, over any number of connections.

    Raises the error in the answer, UnavailableError if the gateway stays down, CorruptError for a line that is not an
    event.
    """
    named = {
        "producer": sorted(wanted.producers),
        "subject": sorted(wanted.subjects),
        "retention_class": sorted(wanted.retention_classes),
        "type": sorted(wanted.types),
    }
    asked = {
        "package_id": wanted.package_id,
        **named,
        "positions": "true" if any(named.values()) else None,
        "order": order if order == "time" else None,
        "follow": "true" if follow else None,
    }
    barren = 0
    while True:
        began = time.monotonic()
        response = await transport.open(
            "/v1/events",
            query={"since": start_text(start), **asked},
            headers={"Accept": "application/x-ndjson"},
            endless=follow,
        )
        try:
            if start == NOW and LOG_END in response.headers:
                # After a lost connection, `now` would be later.
                start = Position.parse(response.headers[LOG_END])
            async for line in _lines(transport, response):
                barren = 0
                if (passed := position_in(line)) is not None:
                    start = passed  # events were filtered out, and need not be read again
                    continue
                event = parse_event(line)
                start = event.position
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
    """The answer's lines, without the blank ones that only keep the connection alive."""
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
