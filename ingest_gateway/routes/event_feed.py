"""Events over HTTP: as lines of JSON or server-sent events, up to the log's end or following it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing

from aiohttp import web

from artifact_store.documents.event_lines import EventShape, line_of, position_line
from artifact_store.documents.http import LOG_END
from artifact_store.documents.problem_details import problem_of
from artifact_store.documents.shapes import EndAnswer
from artifact_store.errors import (
    ArtifactStoreError,
    InvalidPositionError,
    InvalidRequestError,
    LogIdentityError,
    NotFoundError,
    PushBackError,
    UnavailableError,
)
from artifact_store.position import Position
from artifact_store.registry import NOW
from ingest_gateway.admission import gateway_closes
from ingest_gateway.event_tail import Feed, Form, Frame, feed
from ingest_gateway.protocol.declaration import Route, Stream, Success
from ingest_gateway.protocol.http_errors import NotAcceptableError
from ingest_gateway.protocol.negotiation import choose
from ingest_gateway.protocol.parameters import (
    FINGERPRINT,
    FOLLOW,
    LAST_EVENT_ID,
    MANIFESTS,
    OF_PACKAGE,
    OF_PRODUCER,
    OF_RETENTION_CLASS,
    OF_SUBJECT,
    OF_TYPE,
    ORDER,
    POSITIONS,
    SINCE,
)
from ingest_gateway.protocol.request import (
    ETAG,
    IMMUTABLE,
    JSON,
    NOT_KEPT,
    TEXT,
    Call,
    bytes_answer,
    json_answer,
)
from schemas.codec import EVENT_TYPES, schema_fingerprint, schema_text
from services.core.access import Right
from services.registry.origins import ScopedFilter

_log = logging.getLogger(__name__)

EVENTS = "/v1/events"
LINES = "application/x-ndjson"
EVENT_STREAM = "text/event-stream"

COOKIE = "artifact-store-events"
COOKIE_SECONDS = 3600
"""How long a browser keeps the cookie, unless the token expires earlier."""

MAX_COOKIE_BYTES = 3800
"""The longest token in a cookie: browsers keep 4,096 bytes, including the cookie's name and attributes."""

_RETRY_SECONDS = 5.0


async def get_events(call: Call) -> web.StreamResponse:
    """GET /v1/events."""
    since, end = await _start(call)
    follow, by_time = call.query(FOLLOW), call.query(ORDER) == "time"
    if follow and by_time:
        raise InvalidRequestError("order=time is only for events that the log holds now: leave out follow")
    wanted = ScopedFilter(
        call.query(OF_PACKAGE),
        scope=call.principal.scope(Right.READ),
        producers=frozenset(call.query_all(OF_PRODUCER)),
        subjects=frozenset(call.query_all(OF_SUBJECT)),
        retention_classes=frozenset(call.query_all(OF_RETENTION_CLASS)),
        types=frozenset(call.query_all(OF_TYPE)),
    )
    media_type = choose(call.list_header("Accept"), (LINES, EVENT_STREAM))
    form = FORMS[media_type, call.query(MANIFESTS) is not False]
    mark = _mark if media_type == EVENT_STREAM else _position_line if call.query(POSITIONS) else None
    response = web.StreamResponse(
        headers={
            "Content-Type": media_type,
            "Cache-Control": "no-store",
            "Vary": "Accept",
            "X-Accel-Buffering": "no",
            LOG_END: str(end),
        }
    )
    if call.request.method == "HEAD":
        await call.start(response)
        return response
    if not follow:
        with call.gateway.admission.reads.place(call.client):
            events = call.gateway.tail.read(since, end, wanted, form, mark, by_time=by_time)
            async with feed(events) as lines, call.while_valid():
                await _send_all(call, response, lines)
    else:
        quiet = call.gateway.bounds.heartbeat_seconds
        events = call.gateway.tail.follow(since, wanted, form, mark, quiet_seconds=quiet)
        async with call.gateway.followers.stay(call.client, call.valid_until) as leave, aclosing(events):
            _log.info("%s follows events from %s, request %s", call, since or "the log's start", call.request_id)
            with call.when_client_leaves(leave):
                await _send_on(call, response, events)
        call.require_client()
        draining = call.gateway.admission.draining
        call.cause = "the gateway closes" if draining else "the token has expired or lost its rights"
    if not response.prepared or call.sent_in_part:
        # The follower was dismissed before its first event, or in the middle of one: the answer must not look complete.
        call.require_valid()
        raise gateway_closes()
    await call.finish(response)
    return response


async def _start(call: Call) -> tuple[Position | None, Position]:
    """The position to begin after, None at the log's start, and where the log ends now."""
    asked = call.header(LAST_EVENT_ID) or call.query(SINCE)
    tail = call.gateway.tail
    end = await tail.end(asked if isinstance(asked, Position) else None)
    if asked == NOW:
        return end, end
    if isinstance(asked, int):
        return await tail.at_time(asked), end
    return asked, end


async def get_end(call: Call) -> web.StreamResponse:
    """GET /v1/events/end."""
    return json_answer(EndAnswer(position=str(await call.gateway.tail.end())))


def call_back(call: Call, error: ArtifactStoreError) -> web.Response | None:
    """The answer that makes an event source refused for lack of room try again; None for all other clients.

    By the HTML standard, an event source gives up for ever at any status except 200. At the end of an answer it waits
    for the time in the field `retry`, connects again, and sends its `Last-Event-ID`.
    """
    if not isinstance(error, PushBackError | UnavailableError) or call.target != EVENTS or call.request.method != "GET":
        return None
    try:
        if choose(call.list_header("Accept"), (LINES, EVENT_STREAM)) != EVENT_STREAM:
            return None
    except NotAcceptableError:
        return None
    why = problem_of(error)
    text = " ".join(f"{why.status} {why.type}: {why.detail}".split())
    # The time is random, so that event sources that were refused together do not come back together.
    millis = int((why.retry_after or _RETRY_SECONDS) * random.uniform(1000, 2000))
    response = bytes_answer(f": {text}\nretry: {millis}\n\n".encode(), EVENT_STREAM, headers=NOT_KEPT)
    response.force_close()
    return response


async def _send_all(call: Call, response: web.StreamResponse, lines: Feed) -> None:
    piece = await _next(call, response, lines)  # most failures appear here, before the head is sent
    await call.start(response)
    while piece is not None:
        if await call.lapsed():
            return
        if piece:
            await call.send(response, piece)
        piece = await _next(call, response, lines)


async def _next(call: Call, response: web.StreamResponse, lines: Feed) -> bytes | None:
    """The next bytes to send; None at the end. While there are no events, sends bytes that keep the connection open."""
    try:
        async with asyncio.timeout(call.gateway.bounds.heartbeat_seconds):
            return await lines.take()
    except TimeoutError:
        return _SIGNS_OF_LIFE[response.content_type]


async def _send_on(call: Call, response: web.StreamResponse, events: AsyncIterator[bytes]) -> None:
    """Send a follower's events, and a sign of life for each empty piece except the first."""
    sign, caught_up = _SIGNS_OF_LIFE[response.content_type], False
    async for piece in events:
        if not response.prepared:  # most failures appear before the first piece
            await call.start(response)
        elif await call.lapsed():
            return
        if piece or caught_up:
            await call.send(response, piece or sign)
        else:
            caught_up = True


def _line(_: str, head: bytes, position: str) -> bytes:
    return line_of(head, position) + b"\n"


def _server_sent(event_type: str, head: bytes, position: str) -> bytes:
    line = line_of(head, position)
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (position.encode(), event_type.encode(), line)


def _mark(position: str) -> bytes:
    """A position without an event: the client continues there when it connects again (HTML standard, "id" field)."""
    return b"id: %b\n\n" % position.encode()


def _position_line(position: str) -> bytes:
    """The same as a line of JSON, for clients that ask for it."""
    return position_line(position) + b"\n"


FRAMES: Mapping[str, Frame] = {LINES: _line, EVENT_STREAM: _server_sent}
"""The format of an event, by media type."""

FORMS = {(name, manifests): Form(frame, manifests) for name, frame in FRAMES.items() for manifests in (True, False)}
"""The forms of events, by media type and by whether manifests are included."""

_SIGNS_OF_LIFE = {LINES: b"\n", EVENT_STREAM: b":\n\n"}
"""Bytes that keep proxies from closing the connection: readers skip comments and empty lines."""


async def make_cookie(call: Call) -> web.StreamResponse:
    """POST /v1/events/cookie."""
    answer = web.Response(status=204, headers=NOT_KEPT)
    if call.token is None:  # this gateway does not require tokens
        return answer
    if len(call.token) > MAX_COOKIE_BYTES:
        raise InvalidRequestError(f"browsers do not keep a cookie with a token of more than {MAX_COOKIE_BYTES:,} bytes")
    ends = call.valid_until
    left = COOKIE_SECONDS if ends is None else int(ends - asyncio.get_running_loop().time())
    _set_cookie(answer, call.token, min(COOKIE_SECONDS, max(0, left)))
    return answer


async def delete_cookie(_: Call) -> web.StreamResponse:
    """DELETE /v1/events/cookie."""
    answer = web.Response(status=204, headers=NOT_KEPT)
    _set_cookie(answer, "", 0)
    return answer


def _set_cookie(answer: web.Response, value: str, seconds: int) -> None:
    """Set the cookie only for this feed. No script can read it, and browsers send it only for pages of this site."""
    answer.set_cookie(COOKIE, value, max_age=seconds, path=EVENTS, secure=True, httponly=True, samesite="Strict")


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
        f"{EVENTS}/end",
        get_end,
        "Show where the log ends",
        (Success(200, "The position after the last event", {JSON: EndAnswer}),),
        access=Right.READ,
        problems=(UnavailableError,),
        description="Use it as `since`, to follow from there.",
        tag="events",
    ),
    Route(
        "POST",
        f"{EVENTS}/cookie",
        make_cookie,
        "Let a browser's EventSource follow events",
        (Success(204, "The browser has the cookie", headers={"Set-Cookie": TEXT}),),
        access="identified",
        problems=(InvalidRequestError, UnavailableError),
        description="An `EventSource` cannot send `Authorization`. This puts the request's token into a cookie, which "
        f"the browser sends only to `{EVENTS}`, and which no script can read. It lasts for an hour, but no longer "
        "than the token: a page that follows for longer asks again. The token is checked each time. Browsers keep "
        "the cookie over https, and over http on localhost.",
        tag="events",
    ),
    Route(
        "DELETE",
        f"{EVENTS}/cookie",
        delete_cookie,
        "Make the browser forget the cookie",
        (Success(204, "The browser has forgotten it", headers={"Set-Cookie": TEXT}),),
        access="open",
        tag="events",
    ),
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
        EVENTS,
        get_events,
        "Read or follow events",
        (
            Success(
                200,
                "One event per line, or per server-sent event",
                {LINES: Stream(EventShape), EVENT_STREAM: Stream(EventShape)},
                {LOG_END: TEXT},
            ),
        ),
        access=Right.READ,
        cookie=COOKIE,
        parameters=(
            SINCE,
            FOLLOW,
            OF_PACKAGE,
            OF_PRODUCER,
            OF_SUBJECT,
            OF_RETENTION_CLASS,
            OF_TYPE,
            MANIFESTS,
            ORDER,
            POSITIONS,
            LAST_EVENT_ID,
        ),
        problems=(
            InvalidRequestError,
            InvalidPositionError,
            LogIdentityError,
            NotAcceptableError,
            PushBackError,
            UnavailableError,
        ),
        description="In order per package. Without `follow` the answer ends where the log ended when the request came; "
        f"`{LOG_END}` says where that was, whatever was filtered out. "
        "The gateway waits for a slow follower as long as it takes at least 1 KiB/s. If it takes less, or if reading "
        "fails, the connection is cut: continue from the last position. A server-sent event has the position as "
        "`id` and the type as `event`; comments and empty lines keep a quiet connection open. An event source that "
        "is refused for lack of capacity (429, 503) gets 200, `retry` and the end of the answer instead, so that it "
        "tries again. Events of packages that the token may not read are left out; an event with only an `id` shows "
        "that reading has moved past them. The answer ends when the token expires or loses its rights.",
        tag="events",
    ),
)
