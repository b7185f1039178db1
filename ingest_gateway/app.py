"""The application: one request from its head to its answer, whatever happens on the way."""

from __future__ import annotations

import asyncio
import logging

from aiohttp import web

from ingest_gateway import archive, blobs, content, events, files, health, manifest, openapi, packages, uploads, usage
from ingest_gateway.answers import SERVER
from ingest_gateway.call import Call
from ingest_gateway.connections import Connection
from ingest_gateway.gateway import Bounds, Gateway
from ingest_gateway.health import Checks
from ingest_gateway.metrics import Metrics
from ingest_gateway.operations import Route
from ingest_gateway.problems import AnswerTimeoutError, MalformedHttpError, answer_of, internal
from ingest_gateway.routing import Routes, Target
from ingest_gateway.sending import held, send
from ingest_gateway.siblings import Siblings
from services.direct import DirectRegistry
from services.errors import ArtifactStoreError, PushBackError
from services.log.port import Log
from services.tracing import TRACEPARENT, traceparent

_log = logging.getLogger(__name__)
_access = logging.getLogger("ingest_gateway.access")

ROUTES: tuple[Route, ...] = (
    *packages.ROUTES,
    *usage.ROUTES,
    *files.ROUTES,
    *content.ROUTES,
    *archive.ROUTES,
    *uploads.ROUTES,
    *blobs.ROUTES,
    *manifest.ROUTES,
    *events.ROUTES,
    *health.ROUTES,
)

_METHODS = frozenset({"GET", "HEAD", "PUT", "POST", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT"})


class App:
    """The routes over one gateway."""

    def __init__(
        self,
        registry: DirectRegistry,
        log: Log,
        checks: Checks,
        bounds: Bounds,
        metrics: Metrics | None = None,
        siblings: Siblings | None = None,
    ) -> None:
        self.gateway = Gateway(registry, log, checks, bounds, metrics or Metrics(), openapi.document(ROUTES), siblings)
        self._routes = Routes(ROUTES)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request. Every error becomes a problem or, once an answer has begun, cuts the connection."""
        exchange = Exchange(request)
        async with self.gateway.request():
            try:
                response = await self._answer(exchange)
                exchange.answered(response)
                await self._send(exchange, response)
            finally:
                self._record(exchange)
        return response

    def refuse(self, request: web.BaseRequest, why: ArtifactStoreError) -> web.StreamResponse:
        """Answer a request whose head was not taken, and close its connection."""
        exchange = Exchange(request)
        response = answer_of(why)
        response.force_close()
        response.headers["Server"] = SERVER
        exchange.answered(response)
        self._record(exchange)
        return response

    async def _send(self, exchange: Exchange, response: web.StreamResponse) -> None:
        if not response.prepared:
            response.headers["Server"] = SERVER
            # A body may still come that nobody wants any more (RFC 9110 §10.1.1), this process goes away, or the
            # connection has no place.
            if self.gateway.draining or exchange.body_withheld or exchange.refusal is not None:
                response.force_close()
        try:
            await send(exchange.request, response, self.gateway.bounds)
        except AnswerTimeoutError as error:
            _log.warning("%s was cut off: %s", exchange, error.detail)
            raise exchange.cut() from None

    async def _answer(self, exchange: Exchange) -> web.StreamResponse:
        request = exchange.request
        try:
            if "#" in exchange.target.path:
                raise MalformedHttpError("a request target has no fragment")
            TRACEPARENT.set(traceparent(request.headers.get("traceparent")))
            route, values = self._routes.find(request.method, exchange.target.path)
            exchange.call = Call(self.gateway, request, route, exchange.target, values)
            if exchange.refusal is not None and route.tag != "operation":
                raise exchange.refusal
            if route.transfer is None or request.method == "HEAD":
                return await route.handler(exchange.call)
            with self.gateway.transfers[route.transfer].place(exchange.call.client):
                return await route.handler(exchange.call)
        except ArtifactStoreError as error:
            if not exchange.begun:
                return answer_of(error)
            _log.warning("%s was cut off: %s", exchange, error.detail)
        except Exception as error:
            if isinstance(error, ConnectionError) and request.transport is None:
                raise  # the client went away: there is nobody to answer
            # Nobody foresaw it, and this is the outermost place: it is logged and answered.
            _log.exception("%s failed", exchange)
            if not exchange.begun:
                return internal()
        raise exchange.cut()

    def _record(self, exchange: Exchange) -> None:
        seconds = asyncio.get_running_loop().time() - exchange.began
        route = "none" if exchange.call is None else exchange.call.route.template
        received, sent = exchange.bytes
        method = exchange.request.method
        self.gateway.metrics.answered(
            route, method if method in _METHODS else "other", exchange.status, seconds, received, sent
        )
        _access.info("%s %d %.1f ms, %d in, %d out", exchange, exchange.status, seconds * 1000, received, sent)


class Exchange:
    """One request and what has become of it."""

    def __init__(self, request: web.BaseRequest) -> None:
        self.request = request
        self.target = Target.of(request)
        self.began = asyncio.get_running_loop().time()
        self.call: Call | None = None
        self.status = 0
        self._body = 0

    def __str__(self) -> str:
        """Client, method and path on one line: escaped, bounded, and without the query."""
        path = self.target.path[:2048].encode("unicode_escape").decode()
        return f"{self.request.remote} {self.request.method[:32]} {path}"

    @property
    def refusal(self) -> PushBackError | None:
        """Why there is no place for the connection, if there is none."""
        protocol = self.request.protocol
        return protocol.refusal if isinstance(protocol, Connection) else None

    @property
    def begun(self) -> bool:
        """Whether bytes of an answer are on their way already."""
        return self.request.writer.output_size > 0

    @property
    def body_withheld(self) -> bool:
        """Whether the client waits for a 100-continue that it did not get."""
        return "Expect" in self.request.headers and (self.call is None or self.call.continue_pending)

    @property
    def bytes(self) -> tuple[int, int]:
        """Bytes of the bodies: received and sent."""
        return (0, self._body) if self.call is None else (self.call.received, self.call.sent + self._body)

    def answered(self, response: web.StreamResponse) -> None:
        """Note what the answer is."""
        self.status = response.status
        self._body = 0 if self.request.method == "HEAD" else len(held(response))

    def cut(self) -> ConnectionResetError:
        """End the connection in the middle of the answer; gives the error that says so."""
        self.status = 0
        if self.request.transport is not None:
            self.request.transport.abort()
        return ConnectionResetError("the answer was cut off")
