"""An operator's view of a gateway: health, readiness, metrics, the access log, the address it listens on."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import platform
import re
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from click.testing import CliRunner

from artifact_store.errors import ConfigurationError, UnavailableError
from ingest_gateway.health import FRESH_SECONDS
from ingest_gateway.server import run
from services.cli import main
from services.config import PREFIX, Settings
from services.runtime.logs import JsonLines
from tests.integration.http_gateway import running_gateway
from tests.integration.projector_stage import eventually

_PACKAGE = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch"}


async def test_a_gateway_whose_parts_are_well_is_ready(embedded_settings: Settings) -> None:
    async with running_gateway(embedded_settings) as gateway:
        async with gateway.session.get("/healthz") as answer:
            assert (answer.status, await answer.json()) == (200, {"status": "ok"})
        async with gateway.session.get("/readyz") as answer:
            found = await answer.json()
            assert (answer.status, found["status"]) == (200, "ready")
        assert {part["state"] for part in found["parts"].values()} == {"ok"}


async def _away() -> str | None:
    raise UnavailableError("nobody answers")


@pytest.mark.parametrize(
    ("part", "status", "overall", "state"),
    [
        ("views", 200, "degraded", "degraded"),
        ("log", 503, "unready", "failed"),
        ("blobs", 503, "unready", "failed"),
        ("writer", 503, "unready", "failed"),
    ],
)
async def test_readiness_is_about_writes_and_names_the_cause(
    embedded_settings: Settings, part: str, status: int, overall: str, state: str
) -> None:
    async with (
        running_gateway(embedded_settings, checks={part: _away}) as gateway,
        gateway.session.get("/readyz") as answer,
    ):
        found = await answer.json()
    assert (answer.status, found["status"]) == (status, overall)
    assert found["parts"][part] == {"state": state, "cause": "nobody answers"}
    assert [name for name, health in found["parts"].items() if health["state"] != "ok"] == [part]


async def test_many_who_ask_for_readiness_share_a_check_that_is_at_most_a_second_old(
    embedded_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, begun, answers = 0, asyncio.Event(), asyncio.Event()

    async def count() -> str | None:
        nonlocal counted
        counted += 1
        begun.set()
        await answers.wait()
        return None if counted < 2 else "trouble"

    async with running_gateway(embedded_settings, checks={"writer": count}) as gateway:

        async def ask() -> int:
            async with gateway.session.get("/readyz") as answer:
                return answer.status

        asked = [asyncio.create_task(ask()) for _ in range(20)]
        await begun.wait()
        answers.set()
        assert set(await asyncio.gather(*asked)) == {200}
        assert (await ask(), counted) == (200, 1)
        now = asyncio.get_running_loop().time
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now() + FRESH_SECONDS)
        assert (await ask(), counted) == (503, 2)


async def test_a_part_that_does_not_answer_in_time_is_away(
    embedded_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent() -> str | None:
        await asyncio.Event().wait()
        return None

    monkeypatch.setattr("ingest_gateway.health.CHECK_SECONDS", 0.05)
    async with (
        running_gateway(embedded_settings, checks={"writer": silent}) as gateway,
        gateway.session.get("/readyz") as answer,
    ):
        assert answer.status == 503
        assert "no answer" in (await answer.json())["parts"]["writer"]["cause"]


async def test_a_gateway_starts_and_takes_writes_although_its_database_is_away(embedded_settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nowhere = f"postgresql+asyncpg://user@127.0.0.1:{listener.getsockname()[1]}/views?ssl=disable"
    settings = replace(embedded_settings, views_url=nowhere)
    async with running_gateway(settings) as gateway:
        async with gateway.session.post("/v1/packages", json=_PACKAGE) as answer:
            assert answer.status == 201
            path = answer.headers["Location"]
        async with gateway.session.get(path) as answer:
            assert answer.status == 503
        async with gateway.session.get("/readyz") as answer:
            assert (answer.status, (await answer.json())["status"]) == (200, "degraded")


async def test_metrics_count_by_route_and_not_by_path(embedded_settings: Settings) -> None:
    async with running_gateway(embedded_settings) as gateway:
        for _ in range(2):
            async with gateway.session.post("/v1/packages", json=_PACKAGE) as answer:
                path = answer.headers["Location"]
            await gateway.session.put(f"{path}/files/a", data=b"12345")
        await gateway.session.get("/nowhere")
        async with gateway.session.get("/metrics") as answer:
            assert answer.content_type == "text/plain"
            text = await answer.text()
    put = 'route="/v1/packages/{package_id}/files/{relative_path}"'
    assert f'artifact_store_http_requests_total{{method="PUT",{put},status="201"}} 2.0' in text
    assert f"artifact_store_http_received_bytes_total{{{put}}} 10.0" in text
    assert 'artifact_store_http_requests_total{method="GET",route="none",status="404"} 1.0' in text
    assert "artifact_store_http_in_flight 1.0" in text
    assert "/nowhere" not in text


async def test_a_probe_is_counted_and_does_not_hide_among_the_times_of_requests(embedded_settings: Settings) -> None:
    async with running_gateway(embedded_settings) as gateway:
        for probe in ("/healthz", "/readyz", "/metrics"):
            await gateway.session.get(probe)
        async with gateway.session.get("/v1/packages") as answer:
            assert answer.status == 200
        async with gateway.session.get("/metrics") as answer:
            text = await answer.text()
    assert 'artifact_store_http_requests_total{method="GET",route="/healthz",status="200"} 1.0' in text
    timed = {line for line in text.splitlines() if line.startswith("artifact_store_http_request_seconds_count")}
    assert timed == {'artifact_store_http_request_seconds_count{method="GET",route="/v1/packages"} 1.0'}
    assert "_created" not in text
    assert (
        f'artifact_store_build_info{{python="{platform.python_version()}",version="{version("artifact-store")}"}} 1.0'
        in text
    )
    assert re.search(r"^process_resident_memory_bytes [1-9]", text, re.MULTILINE)


@pytest.mark.parametrize("component", ["log", "blobs", "writer", "views"])
async def test_a_component_that_goes_away_is_seen_in_the_metrics(
    embedded_settings: Settings, monkeypatch: pytest.MonkeyPatch, component: str
) -> None:
    monkeypatch.setattr("ingest_gateway.health.WATCH_SECONDS", 0.01)
    monkeypatch.setattr("ingest_gateway.health.FRESH_SECONDS", 0.0)
    away = False

    async def check() -> str | None:
        if away:
            raise UnavailableError("nobody answers")
        return None

    async with running_gateway(embedded_settings, checks={component: check}) as gateway:

        async def shown() -> dict[str, float]:
            async with gateway.session.get("/metrics") as answer:
                lines = re.findall(
                    r'^artifact_store_component_up\{component="(\w+)"\} (\S+)', await answer.text(), re.MULTILINE
                )
            return {name: float(value) for name, value in lines}

        all_up = dict.fromkeys(("log", "blobs", "writer", "views"), 1.0)
        await eventually(lambda: _equal(shown, all_up), "every component works")
        away = True
        await eventually(lambda: _equal(shown, {**all_up, component: 0.0}), f"{component} alone is down")
        away = False
        await eventually(lambda: _equal(shown, all_up), f"{component} works again")


async def _equal(shown: Callable[[], Awaitable[dict[str, float]]], expected: dict[str, float]) -> bool:
    return await shown() == expected


async def test_the_log_of_access_has_no_queries_and_one_line_a_request(
    embedded_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "ingest_gateway.access"):
        async with running_gateway(embedded_settings) as gateway:
            await gateway.session.get("/v1/packages?cursor=secret")
            await gateway.session.get("/v1/packages/%0Afake")
    lines = [record.getMessage() for record in caplog.records if record.name == "ingest_gateway.access"]
    assert len(lines) == 2
    assert not any("secret" in line or "\n" in line for line in lines)


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


async def test_the_log_says_which_request_failed_of_which_trace_and_why(
    embedded_settings: Settings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01", "X-Request-Id": "build-7"}
    seconds = iter(range(1, 100))

    async def away(*_: object, **__: object) -> None:
        raise UnavailableError(f"no broker has answered for {next(seconds)} s")

    with caplog.at_level(logging.INFO):
        async with running_gateway(embedded_settings) as gateway:
            monkeypatch.setattr(gateway.parts.writer, "submit", away)
            answers = [await gateway.session.post("/v1/packages", json=_PACKAGE, headers=headers) for _ in range(3)]
            named = await gateway.session.get("/healthz", headers={"X-Request-Id": "two words"})
    assert [(answer.status, answer.headers["X-Request-Id"]) for answer in answers] == 3 * [(503, "build-7")]
    assert re.fullmatch("[0-9a-f]{16}", named.headers["X-Request-Id"]), "what cannot be logged as it is was taken"
    lines = [record for record in caplog.records if record.name == "ingest_gateway.access"]
    cause = "no broker has answered for 1 s"
    assert lines[0].getMessage().endswith(f"request build-7, trace {TRACE}, because {cause}")
    shown = json.loads(JsonLines().format(lines[0]))
    assert (shown["status"], shown["request_id"], shown["trace_id"], shown["cause"]) == (503, "build-7", TRACE, cause)
    assert datetime.fromisoformat(shown["time"]).utcoffset() == timedelta(0)
    # One warning for all three: they differ by a number alone.
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [f"503 for POST /v1/packages, request build-7: {cause}"]


async def test_the_document_describes_every_route_and_every_problem(embedded_settings: Settings) -> None:
    async with running_gateway(embedded_settings) as gateway, gateway.session.get("/openapi.json") as answer:
        document = await answer.json()
    assert document["openapi"].startswith("3.1")
    operations = {(method, path) for path, methods in document["paths"].items() for method in methods}
    assert ("put", "/v1/packages/{package_id}/files/{relative_path}") in operations
    assert len(operations) == 42
    for content in _contents(document):
        assert "*/*" not in content
        assert all(media["schema"] for media in content.values())
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert not [p["name"] for p in operation["parameters"] if "const" in p["schema"]], (method, path)
    (events,) = [m["get"] for path, m in document["paths"].items() if path == "/v1/events"]
    for media in events["responses"]["200"]["content"].values():
        assert media["schema"] == {"type": "string", "format": "binary"}
        assert media["x-itemSchema"]["discriminator"]["propertyName"] == "type"
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for status, found in operation["responses"].items():
                if int(status) >= 400 and path != "/readyz":
                    assert list(found["content"]) == ["application/problem+json"], (method, path, status)
    references = set(_references(document))
    assert references
    assert references <= {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}


def _contents(node: Any) -> Iterator[dict[str, Any]]:
    """Every `content` of the document: media types and what they hold."""
    if isinstance(node, dict):
        if isinstance(node.get("content"), dict):
            yield node["content"]
        for value in node.values():
            yield from _contents(value)


def _references(value: object) -> list[str]:
    match value:
        case {"$ref": str(reference)}:
            return [reference]
        case dict():
            return [found for item in value.values() for found in _references(item)]
        case list():
            return [found for item in value for found in _references(item)]
    return []


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.org:80", "x", ":80", "127.0.0.1:x"])
async def test_another_interface_than_loopback_is_refused(embedded_settings: Settings, listen: str) -> None:
    settings = replace(embedded_settings, listen=listen)
    with pytest.raises(ConfigurationError, match="ARTIFACT_STORE_LISTEN"):
        await run(settings, stop=asyncio.Event())


async def test_another_interface_is_taken_when_it_is_meant(embedded_settings: Settings) -> None:
    settings = replace(embedded_settings, listen="0.0.0.0:0", insecure=True)
    stop = asyncio.Event()
    urls: list[str] = []

    def ready(url: str) -> None:
        urls.append(url)
        stop.set()

    await run(settings, stop=stop, ready=ready)
    assert urls[0].startswith("http://0.0.0.0:")


async def test_a_port_that_is_taken_is_a_clear_error(embedded_settings: Settings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = replace(embedded_settings, listen=f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(ConfigurationError, match="ARTIFACT_STORE_LISTEN"):
            await run(settings, stop=asyncio.Event())


_PROGRAM = """
import asyncio
from ingest_gateway.server import run
from services.config import Settings
asyncio.run(run(Settings.from_env()))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_process_says_where_it_listens_and_ends_when_it_is_told_to(
    embedded_settings: Settings, tmp_path: Path, number: signal.Signals
) -> None:
    names = ("log_url", "blobs_url", "views_url", "state_dir", "listen")
    values = {PREFIX + name.upper(): str(getattr(embedded_settings, name)) for name in names}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _PROGRAM,
        stderr=asyncio.subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, **values, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert process.stderr is not None
    line = (await process.stderr.readline()).decode().strip()
    url = line.removeprefix("listening on ")
    assert url.startswith("http://127.0.0.1:"), line
    async with aiohttp.ClientSession(url) as session:
        async with session.post("/v1/packages", json=_PACKAGE) as answer:
            assert answer.status == 201
        async with session.get("/v1/events") as answer:
            assert len((await answer.read()).splitlines()) == 1
        follower = await session.get("/v1/events?follow=true")
        assert json.loads(await follower.content.readline())["sequence"] == 1
        process.send_signal(number)
        assert await follower.read() == b""
    assert await asyncio.wait_for(process.wait(), 20) == 0
    assert await process.stderr.read() == b""


async def test_doctor_says_what_a_gateway_that_runs_and_cannot_write_lacks(embedded_settings: Settings) -> None:
    async with running_gateway(embedded_settings, checks={"log": _away}) as gateway:
        environment = {**embedded_settings.environment(), "ARTIFACT_STORE_URL": str(gateway.session._base_url)}
        done = await asyncio.to_thread(CliRunner().invoke, main, ["doctor", "--json"], env=environment)
    (found,) = (f for f in json.loads(done.stdout)["findings"] if f["part"] == "gateway")
    assert (done.exit_code, found["ok"]) == (1, False)
    assert found["cause"] == "the gateway is unready: log: nobody answers"
