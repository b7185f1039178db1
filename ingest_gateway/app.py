"""The application: one request from its head to its answer, whatever happens on the way."""

from __future__ import annotations

import asyncio
import logging

from aiohttp import web

from ingest_gateway import archive, blobs, content, events, files, manifest, openapi, packages, uploads, usage
from ingest_gateway.admission import Bounds
from ingest_gateway.answers import SERVER
from ingest_gateway.call import Call
from ingest_gateway.gateway import Gateway
from ingest_gateway.health import Checks
from ingest_gateway.metrics import Metrics
from ingest_gateway.operations import Route
from ingest_gateway.problems import AnswerTimeoutError, MalformedHttpError, answer_of, internal
from ingest_gateway.routes import operations
from ingest_gateway.routing import Routes
from ingest_gateway.siblings import Siblings
from services.direct import DirectRegistry
from services.errors import ArtifactStoreError
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
    *operations.ROUTES,
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
        call = Call(self.gateway, request)
        async with self.gateway.request():
            try:
                response = await self._answer(call)
                await self._send(call, response)
            finally:
                self._record(call)
        return response

    def refuse(self, request: web.BaseRequest, why: ArtifactStoreError) -> web.StreamResponse:
        """Answer a request whose head was not taken, and close its connection."""
        call = Call(self.gateway, request)
        response = answer_of(why)
        response.force_close()
        response.headers["Server"] = SERVER
        call.note(response)
        self._record(call)
        return response

    async def _send(self, call: Call, response: web.StreamResponse) -> None:
        try:
            await call.answer(response)
        except AnswerTimeoutError as error:
            _log.warning("%s was cut off: %s", call, error.detail)
            raise call.cut() from None

    async def _answer(self, call: Call) -> web.StreamResponse:
        request = call.request
        try:
            if "#" in call.target:
                raise MalformedHttpError("a request target has no fragment")
            TRACEPARENT.set(traceparent(request.headers.get("traceparent")))
            route, values = self._routes.find(request.method, call.target)
            call.read_head(values, route.parameters, takes_body=route.body is not None)
            call.template = route.template
            if call.refusal is not None and route.tag != "operation":
                raise call.refusal
            if route.transfer is None or request.method == "HEAD":
                return await route.handler(call)
            with self.gateway.transfers[route.transfer].place(call.client):
                return await route.handler(call)
        except ArtifactStoreError as error:
            if not call.begun:
                return answer_of(error)
            _log.warning("%s was cut off: %s", call, error.detail)
        except Exception as error:
            if isinstance(error, ConnectionError) and request.transport is None:
                raise  # the client went away: there is nobody to answer
            # Nobody foresaw it, and this is the outermost place: it is logged and answered.
            _log.exception("%s failed", call)
            if not call.begun:
                return internal()
        raise call.cut()

    def _record(self, call: Call) -> None:
        seconds = asyncio.get_running_loop().time() - call.began
        method = call.request.method if call.request.method in _METHODS else "other"
        self.gateway.metrics.answered(call.template, method, call.status, seconds, call.received, call.sent)
        _access.info("%s %d %.1f ms, %d in, %d out", call, call.status, seconds * 1000, call.received, call.sent)
