"""A projector's metrics in Prometheus' text format: what it folded, what is left, parked or stopped."""

from __future__ import annotations

import asyncio
import re
import signal
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from artifact_store.errors import ConfigurationError
from artifact_store.position import Position
from projector.projection_metrics import ProjectorMetrics
from projector.runner import run_projection
from services.config import Settings
from services.runtime.addresses import ListenAddress
from services.runtime.metrics import new_registry, served
from services.views.database import Views
from services.views.engine.apply import catch_up
from services.views.engine.generations import begin_build, building
from services.views.projections import PROJECTIONS
from tests.integration.processes import output_of, started
from tests.integration.projector_stage import covers, eventually
from tests.memory_log import MemoryLog
from tests.services.process import becomes_true
from tests.views_history import START, History

REGISTRY = PROJECTIONS["registry"]
ANYWHERE = ListenAddress("127.0.0.1", 0)
SECONDS = 60.0


def look(url: str) -> dict[str, float]:
    """What the address shows of the projector, by name and labels, these in the order of their names."""
    with urllib.request.urlopen(url, timeout=20) as answer:  # noqa: S310 - a loopback address of our own
        text = answer.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert any(sample.name == "process_cpu_seconds_total" for sample in samples)
    general = ("process_", "artifact_store_build_info", "artifact_store_operation_")
    samples = [s for s in samples if not s.name.startswith(general)]
    return {" ".join((sample.name, *sample.labels.values())): sample.value for sample in samples}


def shown(metrics: ProjectorMetrics) -> CollectorRegistry:
    registry = new_registry()
    registry.register(metrics)
    return registry


def urls(said: str) -> list[str]:
    """The addresses that a log names."""
    return re.findall(r"metrics at (http://\S+)", said)


async def test_what_was_folded_is_left_and_parked_is_shown(views: Views, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    log, history, stop = MemoryLog(partitions=2), History().fill(packages=6, files=3), asyncio.Event()
    log.append(*history.events)
    log.append_raw(1, b"no event", b"no package")
    metrics = ProjectorMetrics(views, log, ["registry"])
    async with served(shown(metrics), ANYWHERE):
        (url,) = urls(caplog.text)
        before = await asyncio.to_thread(look, url)
        end = (await log.end()).offsets
        for partition in (0, 1):
            assert before[f"artifact_store_projection_lag {partition} registry"] == end[partition]
        assert before["artifact_store_projection_events_total registry"] == 0
        running = asyncio.create_task(run_projection(views, log, REGISTRY, stop, metrics))
        await covers(views, REGISTRY, await log.end())

        async def counted() -> bool:
            found = await asyncio.to_thread(look, url)
            return found["artifact_store_projection_events_total registry"] == len(history.events) + 1

        await eventually(counted, "all that was folded is counted")
        after = await asyncio.to_thread(look, url)
        stop.set()
        await running
    assert {name: value for name, value in after.items() if "events" not in name} == {
        "artifact_store_component_up log": 1,
        "artifact_store_component_up views": 1,
        "artifact_store_projection_running registry": 1,
        "artifact_store_projection_lag 0 registry": 0,
        "artifact_store_projection_lag 1 registry": 0,
        "artifact_store_projection_lag_seconds 0 registry": 0,
        "artifact_store_projection_lag_seconds 1 registry": 0,
        "artifact_store_projection_parked_packages registry": 1,
    }


async def test_the_age_of_what_may_be_missing_is_shown_in_seconds(
    views: Views, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is never more than the time since the view was last seen at the end, nor since its last event was recorded."""
    caplog.set_level("INFO")
    now, log, history = START / 1_000_000, MemoryLog(partitions=1), History().fill(packages=1, files=2)
    monkeypatch.setattr("projector.projection_metrics.time.time", lambda: now)
    metrics = ProjectorMetrics(views, log, ["registry"])
    async with served(shown(metrics), ANYWHERE):
        (url,) = urls(caplog.text)

        async def age() -> float | None:
            return (await asyncio.to_thread(look, url)).get("artifact_store_projection_lag_seconds 0 registry")

        assert await age() == 0
        now += 100
        log.append(*history.events)
        assert await age() == 100
        now += 50
        metrics.folded("registry", 1, {0: round(1_000_000 * now) - 30_000_000})
        assert await age() == pytest.approx(30)
        await catch_up(views, log, REGISTRY)
        assert await age() == 0
        now += 1
        history.create()
        log.append(history.events[-1])
        assert await age() == pytest.approx(1)


async def test_what_a_replay_has_yet_to_fold_is_shown_while_there_is_one(
    views: Views, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    log, history, replay = MemoryLog(partitions=1), History().fill(packages=1, files=2), "_replay_lag registry"
    log.append(*history.events)
    async with served(shown(ProjectorMetrics(views, log, ["registry"])), ANYWHERE):
        (url,) = urls(caplog.text)
        assert not any(name.endswith(replay) for name in await asyncio.to_thread(look, url))
        await begin_build(views, REGISTRY, log.id)
        found = await asyncio.to_thread(look, url)
        async with building(views, REGISTRY):
            goes_on = await asyncio.to_thread(look, url)
    assert found["artifact_store_projection_replay_running registry"] == 0
    assert goes_on["artifact_store_projection_replay_running registry"] == 1
    assert found[f"artifact_store_projection{replay}"] == found["artifact_store_projection_lag 0 registry"] > 0


async def test_what_cannot_be_asked_now_is_left_out_and_what_stopped_is_told(
    views: Views, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    log = MemoryLog()
    metrics = ProjectorMetrics(views, log, ["registry", "usage"])
    metrics.stopped("usage")
    metrics.stopped("registry")
    metrics.folded("registry", 0, {})
    log.unavailable = True
    async with served(shown(metrics), ANYWHERE):
        (url,) = urls(caplog.text)
        found = await asyncio.to_thread(look, url)
    assert found == {
        "artifact_store_component_up log": 0,
        "artifact_store_component_up views": 1,
        "artifact_store_projection_parked_packages registry": 0,
        "artifact_store_projection_parked_packages usage": 0,
        "artifact_store_projection_events_total registry": 0,
        "artifact_store_projection_events_total usage": 0,
        "artifact_store_projection_running registry": 1,
        "artifact_store_projection_running usage": 0,
    }


class _SlowToEnd(MemoryLog):
    """Gives no answer, and takes its time to end when it is cut off, as a connection to what is frozen does."""

    def __init__(self) -> None:
        super().__init__()
        self.may_end = asyncio.Event()

    async def end(self, covering: Position | None = None) -> Position:
        try:
            await asyncio.Event().wait()
        finally:
            await self.may_end.wait()
        return await super().end(covering)


async def test_what_is_slow_to_end_is_named_and_hides_nothing_else(
    views: Views, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("projector.projection_metrics._ANSWER_SECONDS", 0.2)
    log = _SlowToEnd()
    async with served(shown(ProjectorMetrics(views, log, ["registry"])), ANYWHERE):
        (url,) = urls(caplog.text)
        found = await asyncio.to_thread(look, url)
    log.may_end.set()
    assert found["artifact_store_component_up log"] == 0
    assert found["artifact_store_component_up views"] == 1
    assert "because the log failed: no answer within 0.2 s" in caplog.text
    assert "overloaded" not in caplog.text


async def test_an_address_that_is_taken_is_refused(views: Views, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    metrics = ProjectorMetrics(views, MemoryLog(), ["registry"])
    async with served(shown(metrics), ANYWHERE):
        port = int(urls(caplog.text)[0].rpartition(":")[2].removesuffix("/metrics"))
        with pytest.raises(ConfigurationError, match=f"cannot listen on 127.0.0.1:{port}"):
            async with served(shown(metrics), ListenAddress("127.0.0.1", port)):
                pass


@pytest.mark.parametrize("text", ["", "9464", ":9464", "h:", "h:x", "h:65536", "h:²", "a..b:1", "h" * 300 + ":1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"HOST:PORT|host name is invalid"):
        ListenAddress.parse(text)


@pytest.mark.parametrize("text", ["127.0.0.1:9464", "[::1]:0"])
def test_an_address_is_read_and_written_alike(text: str) -> None:
    assert str(ListenAddress.parse(text)) == text


def test_of_several_processes_each_has_a_port_of_its_own() -> None:
    assert ListenAddress("h", 9464).of_process(2) == ListenAddress("h", 9466)
    assert ANYWHERE.of_process(2) == ANYWHERE


@pytest.mark.processes
def test_every_process_of_a_projector_serves_its_own(embedded_settings: Settings, tmp_path: Path) -> None:
    output_of(embedded_settings, "migrate")
    with started(
        embedded_settings, tmp_path, "projector", "usage", "--processes", "2", "--metrics-listen", "127.0.0.1:0"
    ) as (command, said):
        assert becomes_true(lambda: len(urls(said.read_text())) == 2, SECONDS)
        for url in urls(said.read_text()):
            assert look(url)["artifact_store_projection_running usage"] == 1
        command.send_signal(signal.SIGTERM)
        assert command.wait(SECONDS) == 0
    assert "Traceback" not in said.read_text()
