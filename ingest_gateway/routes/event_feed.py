"""Events over HTTP: as lines of JSON or server-sent events, up to the log's end or without end."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from aiohttp import web

from artifact_store.documents.event_lines import EventShape, line_of
from artifact_store.errors import (
    InvalidPositionError,
    InvalidRequestError,
    LogIdentityError,
    NotFoundError,
    PushBackError,
    UnavailableError,
)
from ingest_gateway.event_tail import Feed, Frame, feed
from ingest_gateway.limits.followers import gateway_closes
from ingest_gateway.protocol.declaration import Route, Success
from ingest_gateway.protocol.http_errors import NotAcceptableError
from ingest_gateway.protocol.negotiation import choose
from ingest_gateway.protocol.request import (
    ETAG,
    FINGERPRINT,
    FOLLOW,
    IMMUTABLE,
    JSON,
    LAST_EVENT_ID,
    OF_PACKAGE,
    SINCE,
    Call,
    bytes_answer,
)
from schemas.codec import EVENT_TYPES, schema_fingerprint, schema_text
from services.core.access import Right

LINES = "application/x-ndjson"
EVENT_STREAM = "text/event-stream"


async def get_events(call: Call) -> web.StreamResponse:
    """GET /v1/events."""
    since = call.header(LAST_EVENT_ID) or call.query(SINCE)
    package_id, follow = call.query(OF_PACKAGE), call.query(FOLLOW)
    scope = call.principal.scope(Right.READ)
    media_type = choose(call.list_header("Accept"), (LINES, EVENT_STREAM))
    mark = _mark if media_type == EVENT_STREAM else None
    response = web.StreamResponse(
        headers={"Content-Type": media_type, "Cache-Control": "no-store", "Vary": "Accept", "X-Accel-Buffering": "no"}
    )
    if call.request.method == "HEAD":
        await call.start(response)
        return response
    if not follow:
        with call.gateway.admission.reads.place(call.client):
            events = call.gateway.tail.read(since, package_id, FRAMES[media_type], scope, mark)
            async with feed(events) as lines, call.while_valid():
                await _send_all(call, response, lines)
    else:
        events = call.gateway.tail.follow(since, package_id, FRAMES[media_type], scope, mark)
        async with call.gateway.followers.stay(call.client, call.valid_until), feed(events) as lines:
            await _send_all(call, response, lines)
    if not response.prepared or call.sent_in_part:
        # The follower was dismissed before its first event or within one: the answer must not look complete.
        call.require_valid()
        raise gateway_closes()
    await call.finish(response)
    return response


async def _send_all(call: Call, response: web.StreamResponse, lines: Feed) -> None:
    piece = await _next(call, response, lines)  # most failures show here, before the head is sent
    await call.start(response)
    clock, looked = asyncio.get_running_loop().time, asyncio.get_running_loop().time()
    while piece is not None:
        if piece:
            await call.send(response, piece)
        if clock() >= looked + call.gateway.bounds.heartbeat_seconds:
            if not await call.still_may():
                return
            looked = clock()
        piece = await _next(call, response, lines)


async def _next(call: Call, response: web.StreamResponse, lines: Feed) -> bytes | None:
    """The next bytes to send, None at the end. After a while without events, bytes that keep the connection open."""
    try:
        async with asyncio.timeout(call.gateway.bounds.heartbeat_seconds):
            return await lines.take()
    except TimeoutError:
        if call.request.transport is None:
            raise ConnectionResetError("the follower went away") from None
        # A comment keeps proxies from closing the connection; lines of JSON have none.
        return b":\n\n" if response.content_type == EVENT_STREAM else b""


def _line(_: str, head: bytes, position: str) -> bytes:
    return line_of(head, position) + b"\n"


def _server_sent(event_type: str, head: bytes, position: str) -> bytes:
    line = line_of(head, position)
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (position.encode(), event_type.encode(), line)


def _mark(position: str) -> bytes:
    """A position without an event: the client goes on there when it connects again (HTML standard, "id" field)."""
    return b"id: %b\n\n" % position.encode()


FRAMES: Mapping[str, Frame] = {LINES: _line, EVENT_STREAM: _server_sent}
"""The format of an event, by media type."""


async def get_schema(call: Call) -> web.StreamResponse:
    """GET /v1/schemas/{fingerprint}."""
    fingerprint = call.path(FINGERPRINT)
    for event_type in EVENT_TYPES:
        if schema_fingerprint(event_type).hex() == fingerprint:
            headers = {"Cache-Control": IMMUTABLE, "ETag": f'"{fingerprint}"'}
            return bytes_answer(schema_text(event_type).encode(), JSON, headers=headers)
    raise NotFoundError(f"no schema of this release has the fingerprint {fingerprint}")


ROUTES = (
    Route(
        "GET",
        "/v1/schemas/{fingerprint}",
        get_schema,
        "Show the Avro schema with this fingerprint",
        (Success(200, "The schema", {JSON: {"type": "object"}}, {"ETag": ETAG}),),
        access="open",
        parameters=(FINGERPRINT,),
        problems=(InvalidRequestError, NotFoundError),
        description="The fingerprint is the one that record values and the header `ce_dataschema` hold.",
        tag="events",
    ),
    Route(
        "GET",
        "/v1/events",
        get_events,
        "Read or follow events",
        (Success(200, "One event a line, or one a server-sent event", {LINES: EventShape, EVENT_STREAM: {}}),),
        access=Right.READ,
        parameters=(SINCE, OF_PACKAGE, FOLLOW, LAST_EVENT_ID),
        problems=(
            InvalidRequestError,
            InvalidPositionError,
            LogIdentityError,
            NotAcceptableError,
            PushBackError,
            UnavailableError,
        ),
        description="In order per package. Without `follow` the answer ends where the log ended when the request came. "
        "A follower that falls behind is waited for as long as it takes 1 KiB/s of what there is; should it take "
        "less, or reading fail, the connection is cut, and the last position that was seen leads on. A server-sent "
        "event has the position as `id`, the type as `event`; comments keep a quiet connection open. Events of "
        "packages that the token may not read are left out, and an `id` alone says that they were passed over. The "
        "answer ends when the token does, or loses its rights.",
        tag="events",
    ),
)
