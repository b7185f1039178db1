"""The dashboard: a real Prometheus that scrapes the real product has something to show in every panel."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path

import pytest

from artifact_store import Client
from services.config import Settings
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


@pytest.mark.services
@pytest.mark.processes
async def test_every_panel_shows_something(real_settings: Settings, tmp_path: Path) -> None:
    output_of(real_settings, "migrate")
    (port,) = free_ports(1)
    metrics = f"127.0.0.1:{port}"
    with (
        ProductProcess(real_settings, tmp_path / "gateway", "gateway") as gateway,
        ProductProcess(real_settings, tmp_path / "projector", "projector", "--metrics-listen", metrics, listens=False),
        PrometheusServer(
            tmp_path / "prometheus", {"gateway": [f"127.0.0.1:{gateway.port}"], "projector": [metrics]}
        ) as prometheus,
    ):

        async def shown(expression: str) -> bool:
            async with Client(gateway.endpoint) as registry:  # so that there is something to be counted
                package = await registry.create_package("p", "lab", "s", "scratch")
                await registry.ingest_file(package, "a.txt", "text/plain", b"a file")
            return bool(await asyncio.to_thread(prometheus.query, expression.replace("$__rate_interval", "10s")))

        found = queries()
        assert len(found) > 20
        for title, expression in found:
            await until(partial(shown, expression), SECONDS, f"{title!r} shows nothing: {expression}")
        assert await asyncio.to_thread(prometheus.query, 'ALERTS{alertstate="firing",severity="critical"}') == []
