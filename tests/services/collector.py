"""An OpenTelemetry collector that takes OTLP over HTTP and writes every span to its log."""

from __future__ import annotations

import socket

from tests.services.install import trace_collector
from tests.services.process import Server


class TraceCollector(Server):
    """See above; `endpoint` is for `OTEL_EXPORTER_OTLP_ENDPOINT`."""

    name = "collector"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def prepare(self) -> None:
        (self.folder / "collector.yaml").write_text(
            f"receivers: {{otlp: {{protocols: {{http: {{endpoint: '127.0.0.1:{self.port}'}}}}}}}}\n"
            "exporters: {debug: {verbosity: detailed}}\n"
            "service:\n"
            "  pipelines: {traces: {receivers: [otlp], exporters: [debug]}}\n"
            "  telemetry: {metrics: {level: none}}\n",
            encoding="utf-8",
        )

    def command(self) -> list[str]:
        return [str(trace_collector()), "--config", str(self.folder / "collector.yaml")]

    def answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True
