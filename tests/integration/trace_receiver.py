"""A receiver of spans by OTLP over HTTP, which decodes them and keeps them for the test."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Condition, Thread
from time import monotonic

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass(frozen=True)
class FoundSpan:
    """A span as a collector shows it; ids in hex, `kind` in lower case."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: str
    service: str
    attributes: dict[str, str | int] = field(compare=False)


@dataclass
class TraceReceiver:
    """What has come to `url` so far."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    """Those of the last request."""
    _spans: list[FoundSpan] = field(default_factory=list)
    _changed: Condition = field(default_factory=Condition)

    def take(self, body: bytes, headers: dict[str, str]) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        found = [
            FoundSpan(
                span.trace_id.hex(),
                span.span_id.hex(),
                span.parent_span_id.hex(),
                span.name,
                Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
                str(_values(of.resource.attributes)["service.name"]),
                _values(span.attributes),
            )
            for of in request.resource_spans
            for scope in of.scope_spans
            for span in scope.spans
        ]
        with self._changed:
            self.headers = headers
            self._spans += found
            self._changed.notify_all()

    def spans(self) -> list[FoundSpan]:
        """All that have come."""
        with self._changed:
            return list(self._spans)

    def trace(self, trace_id: str, names: Sequence[str], seconds: float = 30.0) -> list[FoundSpan]:
        """The spans of a trace, once all these names are there, as often as here. Raises AssertionError."""
        until = monotonic() + seconds
        with self._changed:
            while True:
                found = [span for span in self._spans if span.trace_id == trace_id]
                if Counter(names) <= Counter(span.name for span in found):
                    return found
                if not self._changed.wait(until - monotonic()):
                    raise AssertionError(f"not all of {names} came: {[span.name for span in found]}")


_SERVICE = re.compile(r"^     -> service\.name: Str\((.*)\)$", re.MULTILINE)
_ATTRIBUTE = re.compile(r"^     -> ([\w.]+): (?:Str|Int)\((.*)\)$", re.MULTILINE)


def spans_of_collector(log: str) -> list[FoundSpan]:
    """The spans that the collector's debug exporter has printed, in detail. Attributes are texts."""
    found = []
    for resource in re.split(r"^.*\bResourceSpans #\d+$", log, flags=re.MULTILINE)[1:]:
        head, *spans = re.split(r"^Span #\d+$", resource, flags=re.MULTILINE)
        service = _SERVICE.search(head)
        assert service is not None, head
        for span in spans:
            said = dict(re.findall(r"^    (Trace ID|Parent ID|ID|Name|Kind) +: ?(.*)$", span, re.MULTILINE))
            ids = said["Trace ID"], said["ID"], said["Parent ID"]
            attributes: dict[str, str | int] = dict(_ATTRIBUTE.findall(span))
            found.append(FoundSpan(*ids, said["Name"], said["Kind"].lower(), service[1], attributes))
    return found


def _values(attributes: Sequence[KeyValue]) -> dict[str, str | int]:
    return {each.key: each.value.string_value or each.value.int_value for each in attributes}


@contextmanager
def trace_receiver() -> Iterator[TraceReceiver]:
    """A receiver on a free loopback port, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            receiver.take(self.rfile.read(int(self.headers["Content-Length"])), dict(self.headers))
            body = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - as http.server names it
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver = TraceReceiver(f"http://127.0.0.1:{server.server_port}")
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()
