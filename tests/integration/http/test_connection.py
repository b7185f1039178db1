"""Connections: when they end, what they are answered, and how a client that does not speak HTTP is logged."""

from __future__ import annotations

import asyncio
import logging
import re
from contextlib import AsyncExitStack

import pytest

from artifact_store.archives.bundle import HeldFiles, SmallFile
from services.config import Settings
from tests.integration.conditions import until
from tests.integration.http_gateway import running_gateway
from tests.integration.http_raw import SECONDS, connected, exchange

_LARGEST_PAGE = 1000


async def test_connection_close_is_kept_although_another_request_has_come(embedded_settings: Settings) -> None:
    async with running_gateway(embedded_settings) as gateway, connected(gateway.port) as client:
        package = await gateway.parts.registry.create_package("n", "p", "s", "scratch")
        coded = "Transfer-Encoding: gzip, chunked"
        client.send(f"PUT /v1/packages/{package}/files/a", coded, body=b"5\r\nhello\r\n0\r\n\r\n")
        client.send("GET /healthz")
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (415, "close")
        assert await client.is_closed()


@pytest.mark.parametrize(
    ("headers", "status", "problem"),
    [
        (("Host: evil.example",), 421, "unknown-host"),
        (("Host: evil.example", "Origin: http://evil.example"), 421, "unknown-host"),
        (("Host: localhost", "Origin: http://evil.example"), 403, "foreign-origin"),
    ],
)
async def test_a_page_of_a_stranger_can_neither_write_nor_read(
    embedded_settings: Settings, headers: tuple[str, ...], status: int, problem: str
) -> None:
    body = b'{"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch"}'
    async with running_gateway(embedded_settings) as gateway:
        for request in (f"POST /v1/packages HTTP/1.1\r\nContent-Length: {len(body)}", "GET /metrics HTTP/1.1"):
            head = "\r\n".join([request, "Content-Type: application/json", *headers, "", ""]).encode()
            answer = await exchange(gateway.port, head + (body if request.startswith("POST") else b""))
            assert (answer.status, answer.problem()["type"].rpartition(":")[2]) == (status, problem)
        assert await gateway.events() == 0


@pytest.mark.parametrize("what", ["archive", "events"])
@pytest.mark.parametrize("header", ["", "Connection: keep-alive\r\n"])
async def test_a_stream_to_a_client_without_chunks_ends_with_the_connection(
    embedded_settings: Settings, what: str, header: str
) -> None:
    async with running_gateway(embedded_settings) as gateway, connected(gateway.port) as client:
        package = await gateway.parts.registry.create_package("n", "p", "s", "scratch")
        await gateway.parts.registry.ingest_file(package, "a", "x/y", b"bytes")
        await gateway.parts.registry.finalize_package(package)
        path = f"/v1/packages/{package}/archive" if what == "archive" else "/v1/events"
        client.writer.write(f"GET {path} HTTP/1.0\r\n{header}\r\n".encode())
        status, headers = await client.head()
        assert (status, headers.get("connection")) == (200, None)
        assert b"bytes" in await client.rest() or what == "events"


async def test_who_takes_no_json_is_cut_off_and_keeps_the_gateway_no_longer(
    embedded_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        running_gateway(embedded_settings, body_idle_seconds=0.5, body_bytes_per_second=float(1 << 30)) as gateway,
        connected(gateway.port) as client,
    ):
        package = await gateway.parts.registry.create_package("n", "p", "s", "scratch")
        paths = [f"{number:04}/" + "/".join(["x" * 200] * 4) for number in range(_LARGEST_PAGE)]
        files = HeldFiles([SmallFile(path, "text/plain", b"") for path in paths])
        await gateway.parts.registry.ingest_files(package, files, "ada")
        page = f"/v1/packages/{package}/files?limit={_LARGEST_PAGE}"
        async with gateway.session.get(page) as answer:
            assert [file["relative_path"] for file in (await answer.json())["items"]] == paths
        for _ in range(30):  # more than all buffers between
            client.send(f"GET {page}")

        async def in_flight() -> float:
            async with gateway.session.get("/metrics") as answer:
                (line,) = re.findall(r"^artifact_store_http_in_flight\b.*$", await answer.text(), re.MULTILINE)
            return float(str(line).rpartition(" ")[2])

        async def was_cut_off() -> bool:
            return "was cut off" in caplog.text

        assert (await client.head())[0] == 200
        await until(was_cut_off, SECONDS, "a client that takes nothing is waited for")
        assert await in_flight() == 1.0  # who asks
        async with gateway.session.get("/metrics") as answer:
            cut = 'method="GET",route="/v1/packages/{package_id}/files",status="0"'
            assert f"artifact_store_http_requests_total{{{cut}}} 1.0" in await answer.text()
        assert len(await client.rest()) < 30 * sum(map(len, paths))


async def refuses(port: int) -> None:
    """Wait until the gateway has begun to stop: it takes no new connection."""

    async def closed() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:  # it stopped while this one waited to be taken
            return False
        writer.close()
        return False

    await until(closed, SECONDS, "the gateway still listens")


@pytest.mark.parametrize("what", ["/healthz", "/v1/events"])
async def test_a_client_that_goes_on_while_the_gateway_stops_is_answered_and_told_to_leave(
    embedded_settings: Settings, what: str
) -> None:
    """Any client may send its next request on a kept connection while the gateway closes it, and would lose it."""
    async with AsyncExitStack() as stack:
        async with running_gateway(embedded_settings) as gateway:
            client, idle = [await stack.enter_async_context(connected(gateway.port)) for _ in range(2)]
            for each in (client, idle):
                each.send("GET /healthz")
                assert (await each.answer()).headers.get("connection") != "close"

            async def go_on() -> dict[str, str]:
                await refuses(gateway.port)
                client.send(f"GET {what}")
                return (await client.head())[1]

            going_on = asyncio.create_task(go_on())
        assert (await going_on)["connection"] == "close"
        assert await idle.is_closed()


async def test_what_is_no_http_is_logged_and_counted_and_learns_no_versions(
    embedded_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "ingest_gateway.access"):
        async with running_gateway(embedded_settings) as gateway:
            async with connected(gateway.port) as client:
                client.writer.write(b"nonsense\r\n\r\n")
                answer = await client.answer()
                assert (answer.status, answer.headers["server"]) == (400, "artifact-store")
                assert answer.headers["connection"] == "close"
                assert await client.is_closed()
            async with gateway.session.get("/metrics") as shown:
                counted = 'artifact_store_http_requests_total{method="other",route="none",status="400"} 1.0'
                assert counted in await shown.text()
    assert any(" UNKNOWN / 400 " in record.getMessage() for record in caplog.records)
