"""The application: finds the route of a request, and turns whatever happens into an answer or a cut connection."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from aiohttp import web

from artifact_store.documents.resumable_uploads import METHOD_OVERRIDE
from artifact_store.errors import (
    ArtifactStoreError,
    FileNotFoundInRegistryError,
    PackageNotFoundError,
    UploadNotFoundError,
)
from ingest_gateway.admission import Quota
from ingest_gateway.gateway import Gateway
from ingest_gateway.protocol.connections import AllowedHosts
from ingest_gateway.protocol.declaration import Access, Route
from ingest_gateway.protocol.http_errors import (
    AnswerTimeoutError,
    MalformedHttpError,
    MethodNotAllowedError,
    UnknownResourceError,
    answer_of,
    internal,
)
from ingest_gateway.protocol.parameters import ACTOR
from ingest_gateway.protocol.request import Call
from ingest_gateway.routes import (
    archives,
    event_feed,
    files,
    manifests,
    operations,
    packages,
    tus_uploads,
    webhook_subscriptions,
    whoami,
)
from services.core.access import Right
from services.identity.audit import Audit
from services.runtime import tracing
from services.runtime.logs import Repeats
from services.runtime.tracing import TRACEPARENT

_log = logging.getLogger(__name__)
_access = logging.getLogger("ingest_gateway.access")

ROUTES: tuple[Route, ...] = (
    *packages.ROUTES,
    *files.ROUTES,
    *archives.ROUTES,
    *tus_uploads.ROUTES,
    *manifests.ROUTES,
    *event_feed.ROUTES,
    *webhook_subscriptions.ROUTES,
    *whoami.ROUTES,
    *operations.ROUTES,
)

PROBES = frozenset(route.template for route in operations.ROUTES)

METRICS = "/metrics"

Find = Callable[[Call], Awaitable[tuple[Route, Mapping[str, str]]]]
"""Finds the route of a request and its raw path parameters. Raises if the sender may not call the route."""

_METHODS = frozenset({"GET", "HEAD", "PUT", "POST", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT"})

_REFUSED = frozenset({401, 403})

_NUMBER = re.compile(r"[0-9]+")


class App:
    """Answers requests by the table of routes. Belongs to one event loop."""

    def __init__(self, gateway: Gateway, allowed_hosts: AllowedHosts, audit: Audit) -> None:
        """`allowed_hosts` says which hosts requests may name."""
        self.gateway = gateway
        self._routes = Routes(ROUTES)
        self._allowed_hosts = allowed_hosts
        self._audit = audit
        self._apart: AllowedHosts | None = None
        self._failures = Repeats()

    def serve_metrics_apart(self, allowed_hosts: AllowedHosts) -> None:
        """From now on `handle_apart` answers requests for metrics, and `handle` does not."""
        self._routes = Routes(route for route in ROUTES if route.template != METRICS)
        self._apart = allowed_hosts

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request. An error becomes a problem document; once the answer has begun, it cuts the connection."""
        return await self._handle(Call(self.gateway, request), self._find)

    async def handle_apart(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request to the listener for metrics and probes, which needs no token."""
        return await self._handle(Call(self.gateway, request), self._find_apart)

    async def _handle(self, call: Call, find: Find) -> web.StreamResponse:
        self.gateway.admission.begin()
        tracer = tracing.tracer
        if tracer is not None and call.target not in PROBES:
            call.begin_span(tracer)
        try:
            response = await self._answer(call, find)
            await self._send(call, response)
        finally:
            self._record(call)
            self.gateway.admission.end()
        return response

    def refuse(self, request: web.BaseRequest, why: ArtifactStoreError) -> web.StreamResponse:
        """Answer a request whose head was refused, and close its connection."""
        call = Call(self.gateway, request)
        response = answer_of(why)
        response.force_close()
        call.cause = why.detail
        call.sign(response)
        call.note(response)
        self._record(call)
        return response

    async def _send(self, call: Call, response: web.StreamResponse) -> None:
        try:
            await call.answer(response)
        except AnswerTimeoutError as error:
            call.cause = error.detail
            _log.warning("%s was cut off: %s", call, error.detail)
            raise call.cut() from None

    async def _find(self, call: Call) -> tuple[Route, Mapping[str, str]]:
        self._allowed_hosts.check(*_named(call.request))
        route, values = self._routes.find(call.request.method, call.target)
        if call.refusal is not None and route.tag != "operation":
            raise call.refusal
        call.template = route.template
        await self._authorize(call, route)
        return route, values

    async def _find_apart(self, call: Call) -> tuple[Route, Mapping[str, str]]:
        if self._apart is not None:
            self._apart.check(*_named(call.request))
        route, values = _APART.find(call.request.method, call.target)
        call.template = route.template
        return route, values

    async def _answer(self, call: Call, find: Find) -> web.StreamResponse:
        request = call.request
        try:
            if "#" in call.target:
                raise MalformedHttpError("a request target must not have a fragment")
            TRACEPARENT.set(call.traceparent)
            route, values = await find(call)
            call.read_head(values, route.parameters, takes_body=route.body is not None)
            if route.transfer is None or request.method == "HEAD":
                return await route.handler(call)
            if route.transfer == "uploads":
                self.gateway.quotas.require(Quota.BYTES, call.counted_as)
            places, client = self.gateway.admission.transfers[route.transfer], call.client
            places.take(client)
            try:
                return await route.handler(call)
            finally:
                places.give(client)
        except ArtifactStoreError as error:
            call.cause = error.detail
            if not call.begun:
                call.refused_by = error
                return event_feed.call_back(call, error) or answer_of(error)
            _log.warning("%s was cut off: %s", call, error.detail)
        except Exception as error:
            if isinstance(error, ConnectionError) and call.client_has_left:
                call.cause = "the client went away"
                raise  # there is nobody to answer
            # Unexpected, and this is the outermost frame: log it and answer.
            call.cause = f"{type(error).__name__}, which was not foreseen"
            _log.exception("%s failed, request %s", call, call.request_id)
            if not call.begun:
                return internal()
        raise call.cut()

    async def _authorize(self, call: Call, route: Route) -> None:
        """Raise UnauthenticatedError or ForbiddenError unless the sender may call the route.

        If a header overrides the request's method, the rights of the route of that method are needed as well.
        """
        meant = call.request.headers.getall(METHOD_OVERRIDE, ())
        wanted = {route.access, *self._routes.access(route.template, meant)} if meant else {route.access}
        if wanted == {"open"}:
            return
        await call.authenticate(route.cookie)
        for right in wanted:
            if isinstance(right, Right):
                call.require(right)
        if ACTOR.name in call.request.headers and ACTOR in route.parameters:
            call.name_actor()

    def _record(self, call: Call) -> None:
        seconds = asyncio.get_running_loop().time() - call.began
        method = call.request.method if call.request.method in _METHODS else "other"
        self.gateway.metrics.answered(
            call.template, method, call.status, seconds, call.received, call.sent, timed=call.template not in PROBES
        )
        if call.identified or call.status in _REFUSED:
            unseen = _is_unseen(call)
            self._audit.record(
                principal=call.principal.actor if call.identified else None,
                actor=call.actor if call.actor != call.principal.actor else None,
                action=f"{method} {call.template}",
                allowed=call.status not in _REFUSED and not unseen,
                client=call.address,
                status=call.status,
                target=call.target,
                unseen=unseen or None,
            )
        self._log_failure(call, method)
        call.end_span(method)
        trace_id = None if call.traceparent is None else call.traceparent.split("-")[1]
        about = [f"request {call.request_id}"]
        if trace_id is not None:
            about.append(f"trace {trace_id}")
        if call.cause is not None:
            about.append(f"because {call.cause}")
        _access.info(
            "%s %d %.1f ms, %d in, %d out, %s",
            call,
            call.status,
            seconds * 1000,
            call.received,
            call.sent,
            ", ".join(about),
            extra={
                "fields": {
                    "client": call.address,
                    "principal": call.principal.actor if call.identified else None,
                    "method": method,
                    "route": call.template,
                    "status": call.status,
                    "seconds": round(seconds, 6),
                    "received_bytes": call.received,
                    "sent_bytes": call.sent,
                    "request_id": call.request_id,
                    "trace_id": trace_id,
                    "cause": call.cause,
                }
            },
        )

    def _log_failure(self, call: Call, method: str) -> None:
        """Log why a request failed through no fault of its sender, at most once in a while for each kind of failure."""
        if call.status < 500 or call.cause is None:
            return
        kind = f"{call.status} {method} {call.template}: {_NUMBER.sub('#', call.cause)}"
        self._failures.warn(
            _log, f"{call.status} for {method} {call.template}, request {call.request_id}: {call.cause}", kind
        )


def _is_unseen(call: Call) -> bool:
    """Whether the request was for a package, file or upload that is missing, or that its sender may not know of.

    It is not looked up which of the two is the case, so that strangers cannot make the gateway query the views.
    """
    error = call.refused_by
    if error is None or call.principal.scope(Right.READ).everywhere:
        return False
    if isinstance(error, FileNotFoundInRegistryError):  # by its path it is sought in a package that the sender may read
        return not call.template.startswith(_PACKAGE)
    return isinstance(error, PackageNotFoundError | UploadNotFoundError)


_PACKAGE = "/v1/packages/{package_id}"

_REST = "{relative_path}"


class Routes:
    """The table of routes, searched by the raw segments of a path.

    aiohttp's router matches the decoded path, in which `%2e` and `%25` are no longer what the client sent. A relative
    path must be judged as it was sent (docs/decisions/http.md).
    """

    def __init__(self, routes: Iterable[Route]) -> None:
        self._resources: dict[str, dict[str, Route]] = {}
        for route in routes:
            methods = self._resources.setdefault(route.template, {})
            if route.method in methods:
                raise ValueError(f"{route.method} {route.template} is declared twice")
            methods[route.method] = route
        self._root = _Node()
        for template in self._resources:
            self._root.add(template.split("/"), template)

    def access(self, template: str, methods: Iterable[str]) -> set[Access]:
        """Who may call the resource of this template with any of these methods."""
        routes = self._resources[template]
        return {routes[method].access for method in methods if method in routes}

    def find(self, method: str, path: str) -> tuple[Route, Mapping[str, str]]:
        """The route and its raw path parameters. HEAD has the route of GET.

        Raises UnknownResourceError, MethodNotAllowedError.
        """
        values: dict[str, str] = {}
        template = self._root.find(path.split("/"), values)
        if template is None:
            raise UnknownResourceError("there is no such resource; /openapi.json lists all of them")
        methods = self._resources[template]
        route = methods.get("GET" if method == "HEAD" else method)
        if route is None:
            allow = sorted(methods.keys() | ({"HEAD"} if "GET" in methods else set()))
            raise MethodNotAllowedError(f"this resource takes {', '.join(allow)}", {"Allow": ", ".join(allow)})
        return route, values


class _Node:
    """What may follow some segments of a path: certain segments, otherwise any one, otherwise any number of them."""

    __slots__ = ("any", "certain", "name", "rest", "template")

    def __init__(self) -> None:
        self.template: str | None = None
        """The template that ends here."""
        self.rest: str | None = None
        """The template whose last parameter matches the rest of the path."""
        self.certain: dict[str, _Node] = {}
        self.name = ""
        """The name of the parameter that matches any segment."""
        self.any: _Node | None = None

    def add(self, parts: list[str], template: str) -> None:
        if not parts:
            self.template = template
        elif parts == [_REST]:
            self.rest = template
        elif not parts[0].startswith("{"):
            self.certain.setdefault(parts[0], _Node()).add(parts[1:], template)
        else:
            if self.any is None:
                self.name, self.any = parts[0][1:-1], _Node()
            if self.name != parts[0][1:-1]:
                raise ValueError(f"{template} calls a parameter by another name than other routes do")
            self.any.add(parts[1:], template)

    def find(self, segments: list[str], values: dict[str, str]) -> str | None:
        """The template of a path. Puts the path's parameters into `values`."""
        node = self
        for at, segment in enumerate(segments):
            below = node.certain.get(segment)
            if below is None and node.rest is not None:
                values[_REST[1:-1]] = "/".join(segments[at:])
                return node.rest
            if below is None:
                below = node.any
                if below is None or not segment:
                    return None
                values[node.name] = segment
            node = below
        return node.template


_APART = Routes(route for route in ROUTES if route.template in {METRICS, "/healthz", "/readyz"})


def _named(request: web.BaseRequest) -> tuple[Sequence[str], Sequence[str]]:
    return request.headers.getall("Host", ()), request.headers.getall("Origin", ())
