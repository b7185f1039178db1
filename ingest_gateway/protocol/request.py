"""One HTTP request: reads its parameters and its body, makes its answer and sends it."""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlencode

from aiohttp import HttpVersion11, web
from multidict import istr
from pydantic import BaseModel

from artifact_store.documents import http as names
from artifact_store.documents.http import HASHES
from artifact_store.documents.shapes import Request
from artifact_store.errors import (
    ArtifactStoreError,
    ContentMismatchError,
    ForbiddenError,
    InvalidRequestError,
    PushBackError,
    TooLargeError,
    UnauthenticatedError,
    UnavailableError,
)
from artifact_store.manifest import ContentAddress
from artifact_store.models import Declared
from ingest_gateway.admission import Bounds, Quota
from ingest_gateway.gateway import Gateway
from ingest_gateway.protocol.connections import Connection, client_of
from ingest_gateway.protocol.http_errors import (
    AnswerTimeoutError,
    BodyTimeoutError,
    ExpectationFailedError,
    IncompleteBodyError,
    MalformedHttpError,
    UnsupportedMediaTypeError,
)
from ingest_gateway.protocol.json_body import parse_json
from ingest_gateway.protocol.parameters import ACTOR, CONTENT_DIGEST, CONTENT_MD5, REPR_DIGEST, Parameter, Value
from services.core.access import Principal, Right
from services.registry.direct import DirectRegistry
from services.runtime.tracing import Span, Tracer, traceparent

Shape = TypeVar("Shape", bound=Request)

MAX_JSON_BYTES = 1 << 20
"""Maximum size of a JSON body beyond what metadata may take."""

_PARSED_AT_ONCE_BYTES = 64 * 1024  # a larger JSON body is parsed in a thread

_HASHED_AT_ONCE_BYTES = 64 * 1024  # a larger chunk is hashed in a thread

RIGHTS_SECONDS = 1.0
"""Maximum age of the known rights of the sender, while a body arrives and when it ends."""

_MD5 = "md5"

_DIGEST_HEADERS = tuple(
    istr(name) for name in ("Digest", names.CONTENT_DIGEST, names.REPR_DIGEST, names.CONTENT_MD5, "Trailer")
)
_CODINGS = (istr("Content-Encoding"), istr("Transfer-Encoding"))

_REQUEST_ID = istr(names.REQUEST_ID)
_REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9._~:/+=-]{1,128}")

_NOBODY = Principal("nobody", ())
_MAX_QUERY_FIELDS = 32
_JSON_ESCAPE = 6  # `\u00e9` is six bytes where the JCS form has at least one


class Call:
    """One HTTP request, from its head to the end of its answer. Belongs to one task."""

    def __init__(self, gateway: Gateway, request: web.BaseRequest) -> None:
        """Call `read_head` before reading query parameters, path parameters or the body."""
        self.gateway = gateway
        self.principal = _NOBODY
        """The sender of the request, once `authenticate` has identified it."""
        self._authorization: str | None = None
        self._named: str | None = None
        """The actor that `X-Actor` names instead of the sender, once `name_actor` has read it."""
        self._registry: DirectRegistry | None = None
        self.request = request
        self.target, self._raw_query = _target(request)
        self.began = self._looked_at = asyncio.get_running_loop().time()
        self.status = 0
        """The answer's status; 0 until there is one, and if the answer was cut off."""
        self.refused_by: ArtifactStoreError | None = None
        """The error that the answer reports."""
        self.cause: str | None = None
        """Why the request failed."""
        given = request.headers.get(_REQUEST_ID, "")
        self.request_id = given if _REQUEST_ID_FORM.fullmatch(given) else f"{random.getrandbits(64):016x}"
        """Identifies the request in log lines and in the answer: the sender's id, or a random one."""
        self.traceparent = traceparent(request.headers.get("traceparent"))
        """The trace that the request belongs to, if there is one."""
        self._span: Span | None = None
        self.received = 0
        self.sent_in_part = False
        """Whether sending stopped within a piece of the answer."""
        self._streamed = 0
        self._held = 0
        self._path: Mapping[str, str] = {}
        self._query: Mapping[str, str] = {}
        self._repeated: Mapping[str, Sequence[str]] = {}
        self.template = "none"
        """The template of its route, which labels its metrics."""
        self._expects = "Expect" in request.headers  # whether the client still waits for a 100-continue
        self._digests: dict[str, bytes] = {}  # by algorithm: what the content must hash to

    def __str__(self) -> str:
        """Client, method and path on one line: escaped, bounded, and without the query."""
        path = self.target[:2048].encode("unicode_escape").decode()
        return f"{self.request.remote} {self.request.method[:32]} {path}"

    def begin_span(self, tracer: Tracer) -> None:
        """Begin the request's span. From now on, `traceparent` names it."""
        protocol = "1.0" if self.request.version < HttpVersion11 else "1.1"
        method = self.request.method[:32]
        attributes = {
            "http.request.method": method,
            "url.scheme": self.request.scheme,
            "url.path": self.target[:2048],
            "client.address": self.address,
            "network.protocol.version": protocol,
            "artifact_store.request_id": self.request_id,
        }
        self._span = tracer.begin(method, "server", self.traceparent, attributes)
        self.traceparent = self._span.traceparent

    def end_span(self, method: str) -> None:
        """End the request's span, if there is one, with the outcome of the request."""
        if self._span is None:
            return
        attributes: dict[str, str | int] = {
            "http.request.method": method if method != "other" else "_OTHER",
            "http.request.body.size": self.received,
            "http.response.body.size": self.sent,
        }
        if self.template != "none":
            attributes["http.route"] = self.template
        if self.status:
            attributes["http.response.status_code"] = self.status
        failed = self.status >= 500 or not self.status
        self._span.end(
            attributes,
            name=f"{method if method != 'other' else 'HTTP'} {self.template}" if self.template != "none" else None,
            error=(str(self.status) if self.status else "no answer") if failed else None,
        )

    def read_head(self, path: Mapping[str, str], parameters: Collection[Parameter[Any]], *, takes_body: bool) -> None:
        """Read the head as a route declares it; `path` holds the raw path parameters.

        Raises:
            InvalidRequestError: a query parameter is not among `parameters`, or a digest cannot be checked here.
            ContentMismatchError: digests contradict each other, or there is no body.
            ExpectationFailedError: the client expects something other than 100-continue.
        """
        self._path = path
        of_query = [p for p in parameters if p.place == "query"]
        self._query, self._repeated = _query(
            self._raw_query, {p.name for p in of_query}, {p.name for p in of_query if p.repeats}
        )
        expect = self.request.headers.get("Expect")
        if expect is not None and expect.lower() != "100-continue":
            raise ExpectationFailedError("the only supported expectation is 100-continue")
        if takes_body:
            self._declare_digests(parameters)
            if not self.request.can_read_body:
                _check(_hashes(self._digests), self._digests)
        self._expects = expect is not None and self.request.version >= HttpVersion11

    async def authenticate(self, cookie: str | None = None) -> None:
        """Identify the sender of the request. Raises UnauthenticatedError, UnavailableError.

        The token comes from `Authorization`, otherwise from the cookie of this name.
        """
        given = self.request.headers.getall("Authorization", ())
        if len(given) > 1:
            raise UnauthenticatedError(f"the request has {len(given)} Authorization headers; send one")
        self._authorization = given[0] if given else None
        if not given and cookie is not None and (token := self.request.cookies.get(cookie)) is not None:
            self._authorization = f"Bearer {token}"
        self.principal = await self.gateway.authenticate(self._authorization)
        self._registry = None

    @property
    def token(self) -> str | None:
        """The token with which the sender was authenticated; None if none was sent."""
        return None if self._authorization is None else self._authorization.partition(" ")[2].strip()

    @property
    def identified(self) -> bool:
        """Whether the sender of the request is known."""
        return self.principal is not _NOBODY

    def require(self, right: Right) -> None:
        """Raise ForbiddenError unless the sender has the right on some packages."""
        if not self.principal.may(right):
            raise ForbiddenError(f"{self.principal.actor} does not have the right to {right}")

    @property
    def registry(self) -> DirectRegistry:
        """The registry, limited to what the sender may read and write."""
        if self._registry is None:
            delegates = self._named is not None and not self.principal.local
            self._registry = self.gateway.registry.for_principal(self.principal, delegates=delegates)
        return self._registry

    async def lapsed(self) -> bool:
        """Whether the sender has lost rights that they had at first. This is checked once per heartbeat."""
        now = asyncio.get_running_loop().time()
        if now < self._looked_at + self.gateway.bounds.heartbeat_seconds:
            return False
        self._looked_at = now
        return not await self.still_may()

    @property
    def valid_until(self) -> float | None:
        """When the sender's token expires, by the event loop's clock; None: never."""
        ends = self.principal.expires_at
        return None if ends is None else asyncio.get_running_loop().time() + ends - time.time()

    def require_valid(self) -> None:
        """Raise UnauthenticatedError if the sender's token has expired."""
        if self.principal.expires_at is not None and self.principal.expires_at <= time.time():
            raise UnauthenticatedError("the token has expired", "invalid_token")

    @asynccontextmanager
    async def while_valid(self) -> AsyncIterator[None]:
        """Raise UnauthenticatedError inside the block once the sender's token has expired."""
        scope = asyncio.timeout_at(self.valid_until)
        try:
            async with scope:
                yield
        except TimeoutError:
            if scope.expired():
                raise UnauthenticatedError("the token has expired", "invalid_token") from None
            raise

    async def still_may(self) -> bool:
        """Whether the sender still has the rights that they had at first: a token may be revoked, a policy changed."""
        try:
            found = await self.gateway.authenticate(self._authorization)
        except UnauthenticatedError:
            return False
        except UnavailableError:
            return True
        return found.grants == self.principal.grants

    async def _look_again(self) -> None:
        """Continue with the rights that the sender has now.

        A token that has only expired still counts: many tokens expire before a large body ends.

        Raises UnauthenticatedError if the token was revoked, ForbiddenError if the sender had all rights and now has
        fewer.
        """
        now = asyncio.get_running_loop().time()
        if now < self._looked_at + RIGHTS_SECONDS:
            return
        self._looked_at, ends = now, self.valid_until
        if ends is not None and ends <= now:
            return
        try:
            found = await self.gateway.authenticate(self._authorization)
        except UnauthenticatedError:
            raise UnauthenticatedError("the token was revoked before the body ended", "invalid_token") from None
        except UnavailableError:
            return
        if found.grants != self.principal.grants:
            self.registry.limit_again(found)
            self.principal = found

    @contextmanager
    def when_client_leaves(self, leave: Callable[[], None]) -> Iterator[None]:
        """Call `leave` as soon as the client's connection is lost. Raises ConnectionResetError if it already is."""
        self.require_client()
        protocol = self.request.protocol
        with protocol.when_lost(leave) if isinstance(protocol, Connection) else nullcontext():
            yield

    @property
    def client_has_left(self) -> bool:
        """Whether the client's connection is lost. The transport may still exist for a moment."""
        transport = self.request.transport
        return transport is None or transport.is_closing()

    def require_client(self) -> None:
        """Raise ConnectionResetError if the client's connection is lost."""
        if self.client_has_left:
            raise ConnectionResetError("the client went away")

    def name_actor(self) -> None:
        """Read the actor that `X-Actor` names.

        Raises InvalidRequestError, and ForbiddenError if that is not the sender and the sender may delegate for no
        package.
        """
        named = self.header(ACTOR)
        if named is None or named == self.principal.actor:
            return
        self._named = named
        # A gateway for this machine alone does not prove who sends: the sender names themselves.
        if not self.principal.local and not self.principal.may(Right.DELEGATE):
            raise ForbiddenError(
                f"{ACTOR.name} names {named}, and {self.principal.actor} does not have the right to {Right.DELEGATE}: "
                f"leave {ACTOR.name} out"
            )

    @property
    def actor(self) -> str:
        """Who acts: the sender, or whoever `X-Actor` names."""
        return self._named or self.principal.actor

    @property
    def counted_as(self) -> str:
        """The principal for quotas: the sender or, if that is not proved, the client's address."""
        return self.client if self.principal.local else self.principal.actor

    @property
    def client(self) -> str:
        """The client for limits: its address, or for IPv6 its 64-bit network."""
        return client_of(self.request.protocol)

    @property
    def address(self) -> str:
        """The address of the connection's other end, whatever the headers say."""
        return self.request.remote or ""

    @property
    def refusal(self) -> PushBackError | None:
        """Why the connection has no place; None if it has one."""
        protocol = self.request.protocol
        return protocol.refusal if isinstance(protocol, Connection) else None

    @property
    def begun(self) -> bool:
        """Whether bytes of the answer have been sent."""
        return self.request.writer.output_size > 0

    @property
    def sent(self) -> int:
        """How many bytes of the answer's body have been sent."""
        return self._streamed + self._held

    def path(self, parameter: Parameter[Value]) -> Value:
        """The value of a path parameter. Raises InvalidRequestError."""
        return parameter.parse(self._path[parameter.name])

    def query(self, parameter: Parameter[Value]) -> Value | None:
        """The value of a query parameter; None if it is absent. Raises InvalidRequestError."""
        text = self._query.get(parameter.name)
        return None if text is None else parameter.parse(text)

    def query_all(self, parameter: Parameter[Value]) -> list[Value]:
        """The values of a query parameter that may repeat. Raises InvalidRequestError."""
        return [parameter.parse(text) for text in self._repeated.get(parameter.name, ())]

    def header(self, parameter: Parameter[Value]) -> Value | None:
        """The value of a header that may come only once; None if it is absent. Raises InvalidRequestError."""
        values = self.request.headers.getall(parameter.name, ())
        if len(values) > 1:
            raise InvalidRequestError(f"{parameter.name} came {len(values)} times")
        return parameter.parse(values[0]) if values else None

    def list_header(self, name: str) -> str | None:
        """The lines of a header as one list (RFC 9110 §5.3); None if it is absent."""
        values = self.request.headers.getall(name, ())
        return ", ".join(values) if values else None

    @property
    def checked(self) -> bool:
        """Whether `body` raises at its end if the content differs from what the headers declare."""
        return bool(self._digests)

    @property
    def waits_to_send(self) -> bool:
        """Whether the client waits for `100 Continue` before it sends the body."""
        return self._expects

    def take_sha256(self) -> bytes | None:
        """The SHA-256 of the content that the headers declare. The caller must check it: `body` no longer does."""
        return self._digests.pop("sha-256", None)

    def _declare_digests(self, parameters: Collection[Parameter[Any]]) -> None:
        headers = self.request.headers
        if not any([name in headers for name in _DIGEST_HEADERS]):  # noqa: C419 - no generator for each request
            return
        if "Digest" in headers:
            raise InvalidRequestError(
                "Digest (RFC 3230) is obsolete and not checked: declare Content-Digest (RFC 9530)"
            )
        trailer = (self.list_header("Trailer") or "").lower()
        for name, declared in self._declarations(parameters):
            if name.lower() in trailer:
                raise InvalidRequestError(f"{name} is not read from a trailer: send it as a header")
            for algorithm, digest in declared.items():
                if self._digests.setdefault(algorithm, digest) != digest:
                    raise ContentMismatchError(
                        f"two headers declare different digests by {algorithm} of the same content"
                    )

    def _declarations(self, parameters: Collection[Parameter[Any]]) -> Iterator[tuple[str, Mapping[str, bytes]]]:
        for parameter in (CONTENT_DIGEST, REPR_DIGEST):
            value = self.list_header(parameter.name) if parameter in parameters else None
            yield parameter.name, {} if value is None else parameter.parse(value)
        md5 = self.header(CONTENT_MD5)
        yield CONTENT_MD5.name, {} if md5 is None else {_MD5: md5}

    def same_with(self, **changes: str) -> str:
        """This request's target with query parameters changed: a relative reference for a `Link`."""
        return f"{self.target}?{urlencode({**self._query, **changes})}"

    def _receive(self, data: bytes) -> None:
        self.received += len(data)
        self.gateway.quotas.count(Quota.BYTES, self.counted_as, len(data))

    def held_body(self) -> bytes | None:
        """The whole body, if it has arrived and needs no decoding and no digest check. None: read it with `body`."""
        content, headers = self.request.content, self.request.headers
        if self._expects or self._digests or not content.is_eof() or content.exception() is not None:
            return None
        if _CODINGS[0] in headers or _CODINGS[1] in headers:
            return None
        data = content.read_nowait()
        self._receive(data)
        return data

    async def body(self, *, coded: bool = False) -> AsyncIterator[bytes]:
        """The body as it arrives. Sends 100-continue first if the client waits for it.

        Raises:
            IncompleteBodyError, MalformedHttpError, BodyTimeoutError: the body did not arrive completely.
            UnauthenticatedError, ForbiddenError: see `_look_again`.
            UnsupportedMediaTypeError: it has a Content-Encoding, which only `coded` bodies may have.
            ContentMismatchError: it differs from what the headers declare.
        """
        coding = self.list_header("Content-Encoding")
        if not coded and coding is not None and coding.strip().lower() != "identity":
            raise UnsupportedMediaTypeError(
                "no Content-Encoding is accepted: send the body as it is", {"Accept-Encoding": "identity"}
            )
        framing = self.list_header("Transfer-Encoding")
        if framing is not None and framing.strip().lower() != "chunked":
            # The parser decodes chunks and nothing else: `gzip, chunked` would be stored as gzip.
            raise UnsupportedMediaTypeError("the only supported Transfer-Encoding is chunked", {"Connection": "close"})
        if self._expects:
            self._expects = False
            await self.request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.request.writer.output_size = 0  # the answer itself has not begun
        hashes = _hashes(self._digests)
        content = self.request.content
        clock = asyncio.get_running_loop().time
        seconds = self.gateway.bounds.body_idle_seconds
        least = max(1, int(seconds * self.gateway.bounds.body_bytes_per_second))
        waited, got = 0.0, 0  # since the pace was last checked; only waiting for the client counts
        while True:
            began = clock()
            try:
                chunk = content.read_nowait()
                if not chunk and not content.at_eof():  # bytes that have arrived need no timer
                    async with asyncio.timeout(seconds - waited):
                        chunk = await content.readany()
            except TimeoutError:
                if got >= least:
                    waited, got = 0.0, 0
                    continue
                raise BodyTimeoutError(
                    f"{got:,} bytes of the body came within {seconds:g} s; at least {least:,} must",
                    {"Connection": "close"},
                ) from None
            except web.RequestPayloadError:
                raise MalformedHttpError("the body's framing is broken", {"Connection": "close"}) from None
            except OSError:
                raise IncompleteBodyError("the body ended before it was complete") from None
            await self._look_again()
            if not chunk:
                _check(hashes, self._digests)
                return
            if hashes:
                await _update(hashes, chunk)
            self._receive(chunk)
            waited += clock() - began
            got += len(chunk)
            yield chunk

    async def json(self, shape: type[Shape], *, limit: int = 0) -> Shape:
        """The JSON body in this shape. It may have `limit` bytes if that exceeds the usual maximum.

        A missing body counts as an empty object if every field has a default.

        Raises:
            UnsupportedMediaTypeError: the body is not declared as JSON.
            InvalidRequestError: it is not JSON, or does not have the shape; TooLargeError.
            PushBackError: other bodies take all room. TooManyAtOnceError: this client's bodies take half of it.
        """
        limit = max(limit, MAX_JSON_BYTES + _JSON_ESCAPE * self.gateway.bounds.max_metadata_bytes)
        if (self.request.content_length or 0) > limit:
            raise TooLargeError(f"a JSON body may have {limit:,} bytes here")
        with self.gateway.admission.json.share(self.client) as take:
            body = await self._gathered(limit, take)
            if len(body) <= _PARSED_AT_ONCE_BYTES:
                return self._parsed(body, shape)
            async with self.gateway.admission.parsing:
                return await asyncio.to_thread(self._parsed, body, shape)

    async def _gathered(self, limit: int, take: Callable[[int], None]) -> bytes:
        body = bytearray()
        async for chunk in self.body():
            if len(body) + len(chunk) > limit:
                raise TooLargeError(f"a JSON body may have {limit:,} bytes here")
            take(len(chunk))
            body += chunk
        return bytes(body)

    def _parsed(self, body: bytes, shape: type[Shape]) -> Shape:
        if not body and not any(field.is_required() for field in shape.model_fields.values()):
            return shape()
        media_type, _, parameters = self.request.headers.get("Content-Type", "").partition(";")
        charset = parameters.strip().lower().replace('"', "")
        if media_type.strip().lower() != "application/json" or charset not in ("", "charset=utf-8"):
            raise UnsupportedMediaTypeError("the body must be application/json", {"Accept": "application/json"})
        return parse_json(body, shape)

    async def start(self, response: web.StreamResponse) -> None:
        """Send the head of a streamed answer."""
        self.sign(response)
        endless = self.request.version < HttpVersion11 and response.content_length is None
        if endless or self.gateway.admission.draining:
            response.force_close()  # without chunks (HTTP/1.0) an answer ends with its connection
        await response.prepare(self.request)

    async def send(self, response: web.StreamResponse, data: bytes) -> None:
        """Send a piece of a streamed answer. Waits and raises as `taken`.

        Raises UnauthenticatedError once the sender has lost the rights to the answer.
        """
        if self._fits(len(data)):
            if await self.lapsed():
                raise UnauthenticatedError("the token has ended, or its rights have changed", "invalid_token")
            await response.write(data)
            self._streamed += len(data)
            return
        rest = memoryview(data)
        while rest:
            if await self.lapsed():
                raise UnauthenticatedError("the token has ended, or its rights have changed", "invalid_token")
            piece, rest = rest[:SENT_AT_ONCE_BYTES], rest[SENT_AT_ONCE_BYTES:]
            self.sent_in_part = bool(rest)  # the write below may wait for the client
            await taken(response.write(piece), len(piece), self.gateway.bounds)
            self._streamed += len(piece)

    async def finish(self, response: web.StreamResponse) -> None:
        """End a streamed answer. Waits and raises as `taken`."""
        await taken(response.write_eof(), 0, self.gateway.bounds)

    async def answer(self, response: web.StreamResponse) -> None:
        """Send the rest of the answer: all of it unless it was streamed. Waits and raises as `taken`."""
        self.note(response)
        if not response.prepared:
            self.sign(response)
            # The client may still send a body that it announced (RFC 9110 §10.1.1), this process stops, or the
            # connection has no place.
            if self.gateway.admission.draining or self._expects or self.refusal is not None:
                response.force_close()
        body = held(response)
        await response.prepare(self.request)
        if len(body) > SENT_AT_ONCE_BYTES and isinstance(response, web.Response) and self.request.method != "HEAD":
            rest = memoryview(body)
            while rest:
                piece, rest = rest[:SENT_AT_ONCE_BYTES], rest[SENT_AT_ONCE_BYTES:]
                await taken(response.write(piece), len(piece), self.gateway.bounds)
            body = response.body = b""
        if self._fits(len(body)):
            await response.write_eof()
        else:
            await taken(response.write_eof(), len(body), self.gateway.bounds)

    def _fits(self, size: int) -> bool:
        """Whether the connection takes `size` bytes at once, without waiting for the client."""
        transport = self.request.transport
        return size <= BUFFERED_BYTES and transport is not None and not transport.get_write_buffer_size()

    def sign(self, response: web.StreamResponse) -> None:
        """Put the server's name and the request id into the answer."""
        response.headers["Server"] = SERVER
        response.headers[_REQUEST_ID] = self.request_id

    def note(self, response: web.StreamResponse) -> None:
        """Record the answer's status and size, for metrics and the access log."""
        self.status = response.status
        self._held = 0 if self.request.method == "HEAD" else len(held(response))

    def cut(self) -> ConnectionResetError:
        """Abort the connection in the middle of the answer. Returns the error to raise."""
        self.status = 0
        if self.request.transport is not None:
            self.request.transport.abort()
        return ConnectionResetError("the answer was cut off")


def _target(request: web.BaseRequest) -> tuple[str, str]:
    """The raw path and query. Scheme and host of a target in absolute form (RFC 9112 §3.2.2) are removed."""
    raw = request.raw_path
    if not raw.startswith("/"):
        raw = request.rel_url.raw_path_qs
    path, _, query = raw.partition("?")
    return path, query


def _hashes(algorithms: Iterable[str]) -> dict[str, hashlib._Hash]:
    return {name: HASHES[name]() if name in HASHES else hashlib.md5(usedforsecurity=False) for name in algorithms}


async def _update(hashes: Mapping[str, hashlib._Hash], chunk: bytes) -> None:
    def work() -> None:
        for each in hashes.values():
            each.update(chunk)

    if len(chunk) > _HASHED_AT_ONCE_BYTES:
        await asyncio.to_thread(work)
    else:
        work()


def _check(hashes: Mapping[str, hashlib._Hash], declared: Mapping[str, bytes]) -> None:
    for algorithm, found in hashes.items():
        if found.digest() != declared[algorithm]:
            raise ContentMismatchError(
                f"the {algorithm} of the content is {found.hexdigest()}, {declared[algorithm].hex()} was declared"
            )


def _query(raw: str, known: Collection[str], repeating: Collection[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The parameters that come once, and those that may repeat."""
    if not raw:
        return {}, {}
    try:
        # Bytes that are not UTF-8 are errors here rather than replacement characters.
        pairs = parse_qsl(
            raw.encode("utf-8", "surrogateescape").decode("utf-8"),
            keep_blank_values=True,
            strict_parsing=True,
            errors="strict",
            max_num_fields=_MAX_QUERY_FIELDS,
        )
    except ValueError:
        raise InvalidRequestError("the query is malformed: send name=value pairs in percent-encoded UTF-8") from None
    found: dict[str, str] = {}
    repeated: dict[str, list[str]] = {}
    for name, value in pairs:
        if name in repeating:
            repeated.setdefault(name, []).append(value)
            continue
        if name not in known:
            takes = f"this takes {', '.join(sorted(known))}" if known else "this takes none"
            raise InvalidRequestError(f"unknown query parameter {name[:64]!a}: {takes}")
        if name in found:
            raise InvalidRequestError(f"query parameter {name} came twice")
        found[name] = value
    return found, repeated


def declared(size: int | None, address: ContentAddress | None, sha256: bytes | None) -> Declared:
    """The producer's declaration of the bytes, from the values of headers."""
    return Declared(size_bytes=size, blake3=None if address is None else address.digest, sha256=sha256)


BUFFERED_BYTES = 60 * 1024
"""Less than a connection buffers before it makes writers wait: 64 KiB, including the lengths of chunks."""

SENT_AT_ONCE_BYTES = 256 * 1024
"""Maximum number of bytes that are sent at once. The longer the piece, the later a stalled client is found."""


async def taken(writing: Awaitable[None], size: int, bounds: Bounds) -> None:
    """Wait for `writing`, which writes `size` bytes.

    Raises ConnectionError, and AnswerTimeoutError if the client takes less than `Bounds.body_bytes_per_second`,
    measured over at least `Bounds.body_idle_seconds`. Only time spent waiting for the client counts.
    """
    seconds = max(bounds.body_idle_seconds, size / bounds.body_bytes_per_second)
    try:
        async with asyncio.timeout(seconds):
            await writing
    except TimeoutError:
        raise AnswerTimeoutError(f"the client did not take {size:,} bytes of it within {seconds:g} s") from None


def held(response: web.StreamResponse) -> bytes:
    """The body of an answer that is not streamed; empty for a streamed one."""
    return response.body if isinstance(response, web.Response) and isinstance(response.body, bytes) else b""


JSON = "application/json"
SERVER = "artifact-store"
"""The value of `Server`, without a version."""
NOT_KEPT: Mapping[str, str] = {"Cache-Control": "no-store"}
"""Headers of an answer that the next event may change."""
IMMUTABLE = "private, max-age=31536000, immutable"
"""`Cache-Control` of a representation that never changes; private, because reading needs a right."""

LOCATION: Mapping[str, Any] = {"type": "string", "format": "uri-reference"}
ETAG: Mapping[str, Any] = {"type": "string", "pattern": '^"[^"]+"$'}
TEXT: Mapping[str, Any] = {"type": "string"}


def json_answer(
    answer: BaseModel, *, status: int = 200, headers: Mapping[str, str] | None = None, media_type: str = JSON
) -> web.Response:
    """The answer as JSON. It must not be cached, because the next event may change it."""
    body = answer.model_dump_json().encode()
    return bytes_answer(body, media_type, status=status, headers={**NOT_KEPT, **(headers or {})})


def bytes_answer(
    body: bytes, media_type: str, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """An answer of these bytes and this media type."""
    return web.Response(status=status, body=body, headers={"Content-Type": media_type, **(headers or {})})
