"""The dashboard: a real Prometheus that scrapes the real product has data for every panel."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from artifact_store import Client
from services.config import Settings
from services.views.engine.generations import begin_build
from services.views.projections import PROJECTIONS
from services.wiring import open_log, open_views
from tests.integration.conditions import until
from tests.integration.processes import ProductProcess, output_of
from tests.services.process import free_ports
from tests.services.prometheus import PrometheusServer

DASHBOARD = Path(__file__).resolve().parents[2] / "helm" / "artifact-store" / "files" / "dashboard.json"
SECONDS = 60.0


def queries() -> list[tuple[str, str]]:
    """Each panel's title and expression."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", [])]


@contextmanager
def collected(folder: Path) -> Iterator[str]:
    """`host:port` where the files of runs in the folder are served, as the node exporter's textfile collector does."""

    class Collector(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = b"".join(path.read_bytes() for path in folder.glob("*.prom"))
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(found)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


async def leave_a_build(settings: Settings) -> None:
    """What a replay leaves that ends as soon as it has begun."""
    log, views = open_log(settings), open_views(settings)
    try:
        await begin_build(views, PROJECTIONS["usage"], await log.identity())
    finally:
        await views.close()
        await log.close()


@pytest.mark.services
@pytest.mark.processes
async def test_every_panel_shows_something(real_settings: Settings, tmp_path: Path) -> None:
    output_of(real_settings, "migrate")
    output_of(real_settings, "verify", "--metrics-file", tmp_path / "verify.prom")
    await leave_a_build(real_settings)
    (port,) = free_ports(1)
    metrics = f"127.0.0.1:{port}"
    with (
        collected(tmp_path) as runs,
        ProductProcess(real_settings, tmp_path / "gateway", "gateway") as gateway,
        ProductProcess(real_settings, tmp_path / "projector", "projector", "--metrics-listen", metrics, listens=False),
        PrometheusServer(
            tmp_path / "prometheus",
            {"gateway": [f"127.0.0.1:{gateway.port}"], "projector": [metrics], "runs": [runs]},
        ) as prometheus,
    ):

        async def shown(expression: str) -> bool:
            async with Client(gateway.endpoint) as registry:  # so that there is something to be counted
                package = await registry.create_package("p", "lab", "s", "scratch")
                await registry.ingest_file(package, "a.txt", "text/plain", b"a file")
                await registry.finalize_package(package)
            return bool(await asyncio.to_thread(prometheus.query, expression.replace("$__rate_interval", "10s")))

        found = queries()
        assert len(found) > 35
        for title, expression in found:
            await until(partial(shown, expression), SECONDS, f"{title!r} shows nothing: {expression}")
        assert await asyncio.to_thread(prometheus.query, 'ALERTS{alertstate="firing",severity="critical"}') == []
