"""Traces: the W3C trace context of a request, and spans for the steps of handling it.

The context travels as the text of a `traceparent` header: from the HTTP request through `TRACEPARENT` to other gateways
and into the headers of records, where projectors find it. Without spans it is only passed on.

Spans need the extra `traces` (OpenTelemetry's SDK) and an `OTEL_*` variable that says where they go. Until `exporting`
finds both, `tracer` is None, and each step checks only that.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

from services.runtime.logs import Repeats

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as SdkSpan

_LOG = logging.getLogger(__name__)

TRACEPARENT: ContextVar[str | None] = ContextVar("traceparent", default=None)
"""The `traceparent` of the span that this task works for, or of the sender's; None outside of a trace."""

_FORM = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

EXPORTERS = ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.sdk._shared_internal")
"""The loggers of the code that sends spans."""

_END_SECONDS = 5.0
"""How long a process waits at its end for its last spans to be sent."""

Kind = Literal["internal", "server", "client", "producer", "consumer"]
Attributes = Mapping[str, str | int]

_T = TypeVar("_T")


def traceparent(header: str | None) -> str | None:
    """The value if it is valid (W3C Trace Context, version 00), else None: an invalid header is ignored."""
    return header if header is not None and _FORM.fullmatch(header) else None


class Span:
    """A step that has begun. End it once, from any thread."""

    __slots__ = ("_span", "traceparent")

    def __init__(self, span: SdkSpan) -> None:
        context = span.get_span_context()
        self._span = span
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        """The context that makes other spans children of this one."""

    def end(
        self,
        attributes: Attributes | None = None,
        *,
        name: str | None = None,
        error: str | None = None,
        at: int | None = None,
    ) -> None:
        """End the span now, or at `at` (ns since 1970). `error` is the type of the error that it failed with."""
        if not self._span.is_recording():
            return
        if name is not None:
            self._span.update_name(name)
        if attributes is not None:
            self._span.set_attributes(attributes)
        if error is not None:
            from opentelemetry.trace import StatusCode

            self._span.set_attribute("error.type", error)
            self._span.set_status(StatusCode.ERROR)
        self._span.end(at)


class Tracer:
    """Makes spans. For any thread; does not block. If spans come faster than they can be sent, some are dropped."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        from services.runtime.metrics import release

        self._tracer = provider.get_tracer("artifact-store", release())
        self._kinds = {kind.name.lower(): kind for kind in SpanKind}
        self._extract = TraceContextTextMapPropagator().extract

    def begin(
        self,
        name: str,
        kind: Kind,
        parent: str | None,
        attributes: Attributes | None = None,
        *,
        since: int | None = None,
    ) -> Span:
        """Begin a span now, or at `since` (ns since 1970), as a child of the `traceparent` in `parent` or as a root."""
        from opentelemetry.context import Context

        above = Context() if parent is None else self._extract({"traceparent": parent}, Context())
        return Span(
            self._tracer.start_span(
                name, context=above, kind=self._kinds[kind], attributes=attributes, start_time=since
            )
        )

    @contextmanager
    def step(self, name: str, kind: Kind = "internal", attributes: Attributes | None = None) -> Iterator[None]:
        """A span around the block, which `TRACEPARENT` names within it. Outside of a trace, no span is made."""
        parent = TRACEPARENT.get()
        if parent is None:
            yield
            return
        span, error = self.begin(name, kind, parent, attributes), None
        token = TRACEPARENT.set(span.traceparent)
        try:
            yield
        except BaseException as raised:
            error = type(raised).__name__
            raise
        finally:
            TRACEPARENT.reset(token)
            span.end(error=error)

    async def around(self, name: str, work: Awaitable[_T]) -> _T:
        """As `step`, around an awaitable."""
        with self.step(name):
            return await work


tracer: Tracer | None = None
"""Makes this process's spans; None if none are wanted. Read it at each use, because `exporting` sets it."""


def traced(name: str, work: Awaitable[_T]) -> Awaitable[_T]:
    """The same work, with a span around it if spans are wanted."""
    return work if tracer is None else tracer.around(name, work)


def server_of(url: str) -> Attributes:
    """The server in this URL, as attributes of a request's span."""
    found = urlsplit(url)
    port = found.port or (443 if found.scheme == "https" else 80)
    return {"server.address": found.hostname or "", "server.port": port}


def sampled(parent: str) -> bool:
    """Whether this `traceparent` belongs to a trace that is recorded."""
    return _FORM.fullmatch(parent) is not None and int(parent[-2:], 16) & 1 == 1


def since_1970(moment: float) -> int:
    """Convert a time of `time.monotonic` (s) to ns since 1970, by the system's present clock."""
    return time.time_ns() - int((time.monotonic() - moment) * 1e9)


@contextmanager
def exporting(service: str) -> Iterator[None]:
    """Within the block, make spans if the environment says where to send them. `service` is the default service name.

    Leaving the block waits until the last spans are sent, for a few seconds at most.
    """
    global tracer
    provider = _provider(service) if _wanted() else None
    if provider is None:
        yield
        return
    tracer = Tracer(provider)
    try:
        yield
    finally:
        tracer = None
        # A collector that does not answer would delay the process for as long as the SDK keeps trying.
        last = Thread(target=provider.shutdown, daemon=True)
        last.start()
        last.join(_END_SECONDS)


def _wanted() -> bool:
    """Whether the environment names a destination for spans. Unlike the SDK, there is no default destination."""
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if exporter not in ("", "otlp", "none"):
        _LOG.warning("OTEL_TRACES_EXPORTER=%s is not supported, so there are no traces: set it to otlp", exporter)
        return False
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return exporter != "none" and (exporter == "otlp" or any(os.environ.get(name) for name in names))


def _provider(service: str) -> TracerProvider | None:
    """The SDK's tracer provider as `OTEL_*` configures it; None, with a log line, if that fails."""
    name = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
    protocol = os.environ.get(name) or os.environ.get(name := "OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    if protocol != "http/protobuf":
        _LOG.warning("%s=%s is not supported, so there are no traces: set it to http/protobuf", name, protocol)
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        _LOG.warning(
            "OTEL_* variables ask for traces, but OpenTelemetry is not installed: pip install 'artifact-store[traces]'"
        )
        return None
    from services.runtime.metrics import release  # here, so that the command line's help need not load it

    quiet = _Quiet()
    for logger in EXPORTERS:
        logging.getLogger(logger).addFilter(quiet)
    resource = Resource.create({"service.version": release(), "process.pid": os.getpid()})
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": service}))
    try:
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    except ValueError as error:
        _LOG.warning("OTEL_* variables are invalid, so there are no traces: %s", error)
        return None
    _LOG.info("spans are sent to the OpenTelemetry collector")
    return provider


class _Quiet(logging.Filter):
    """Turns the exporter's errors into warnings without tracebacks, one of each kind a minute: they lose no event."""

    def __init__(self) -> None:
        super().__init__()
        self._repeats = Repeats()

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`."""
        line: Any = self._repeats.passes(f"traces are incomplete: {record.getMessage()}", str(record.msg))
        record.msg, record.args, record.exc_info = line, None, None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        return line is not None
