"""Clients that request many bytes and do not read them are given up, and hold up nobody and nothing meanwhile."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
from collections import Counter
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from uuid import uuid4

import pytest
from aiohttp import web

from artifact_store.archives.tar import END, entry_header, padding
from ingest_gateway.event_tail import TailEvent
from ingest_gateway.protocol.connections import Connection
from ingest_gateway.protocol.request import Call
from services.blobs.memory import TURN_SECONDS
from services.config import Settings
from services.registry.bundle_store import BUNDLES_AT_ONCE
from services.registry.direct import DirectRegistry
from tests.integration.conditions import until
from tests.integration.http_gateway import RunningGateway, running_gateway
from tests.integration.http_raw import SECONDS, STALLING_BYTES, connected

AT_ONCE = float(1 << 30)
"""A pace that gives no piece more time than a body may stand still."""

KINDS = ["content", "archive"]


async def large(gateway: RunningGateway) -> dict[str, str]:
    """Where the bytes of a large file are, and the archive of its package."""
    registry = gateway.parts.registry
    package = await registry.create_package("n", "p", "s", "scratch")
    file = await registry.ingest_file(package, "a", "x/y", bytes(STALLING_BYTES))
    await registry.finalize_package(package)
    return {"content": f"/v1/files/{file}/content", "archive": f"/v1/packages/{package}/archive"}


def open_blobs(folder: Path) -> list[Path]:
    """The blobs that this process holds open."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile, by a thread
            found.append(entry.readlink())
    return [path for path in found if path.is_relative_to(folder)]


@pytest.mark.parametrize("kind", KINDS)
async def test_who_takes_nothing_is_cut_off_and_the_log_says_why(
    embedded_settings: Settings, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    async with running_gateway(embedded_settings, body_idle_seconds=0.5, body_bytes_per_second=AT_ONCE) as gateway:
        path = (await large(gateway))[kind]

        async def was_cut_off() -> bool:
            return "was cut off" in caplog.text

        async with connected(gateway.port) as reader:
            reader.send(f"GET {path}")
            assert (await reader.head())[0] == 200
            await until(was_cut_off, SECONDS, "a client that takes nothing is waited for")
            assert len(await reader.rest()) < STALLING_BYTES
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.levelname for record in told] == ["WARNING"]
    assert told[0].exc_info is None
    assert f"GET {path} was cut off: the client did not take 262,144 bytes" in told[0].getMessage()


async def test_who_takes_no_manifest_is_cut_off_and_keeps_its_place_no_longer(
    embedded_settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def long_manifest(*_: object, **__: object) -> bytes:
        return bytes(STALLING_BYTES)  # of some 50,000 files

    monkeypatch.setattr(DirectRegistry, "get_manifest_bytes", long_manifest)
    async with running_gateway(
        embedded_settings, body_idle_seconds=0.5, body_bytes_per_second=AT_ONCE, max_downloads=1
    ) as gateway:
        path = f"/v1/packages/{uuid4()}/manifest"

        async def places_taken() -> str:
            async with gateway.session.get("/metrics") as answer:
                (line,) = re.findall(r"^artifact_store_http_downloads\b.*$", await answer.text(), re.MULTILINE)
            return str(line).rpartition(" ")[2]

        async def no_place_is_taken() -> bool:
            return await places_taken() == "0.0"

        async with connected(gateway.port) as reader:
            reader.send(f"GET {path}")
            status, headers = await reader.head()
            assert (status, headers["content-length"]) == (200, str(STALLING_BYTES))
            assert await places_taken() == "1.0"
            await until(no_place_is_taken, SECONDS, "a client that takes nothing is waited for")
            assert len(await reader.rest()) < STALLING_BYTES
        assert f"GET {path} was cut off" in caplog.text
        async with gateway.session.get(path) as answer:
            assert await answer.read() == bytes(STALLING_BYTES)


async def test_who_goes_on_in_time_gets_all(embedded_settings: Settings) -> None:
    paced = 256 * 1024 / SECONDS  # so slow that a piece may take longer than a client may take nothing otherwise
    async with running_gateway(embedded_settings, body_idle_seconds=0.2, body_bytes_per_second=paced) as gateway:
        path = (await large(gateway))["content"]
        loop = asyncio.get_running_loop()
        async with connected(gateway.port) as reader:
            reader.send(f"GET {path}", "Connection: close")
            assert (await reader.head())[0] == 200
            began = loop.time()

            async def long_enough() -> bool:
                return loop.time() - began > 1.0

            await until(long_enough, SECONDS, "time stood still")
            assert await reader.rest() == bytes(STALLING_BYTES)


async def test_a_follower_to_whom_nothing_is_sent_is_not_cut_off(embedded_settings: Settings) -> None:
    async with running_gateway(
        embedded_settings, body_idle_seconds=0.1, body_bytes_per_second=AT_ONCE, heartbeat_seconds=0.1
    ) as gateway:
        headers = {"Accept": "text/event-stream"}
        async with (
            asyncio.timeout(SECONDS),
            gateway.session.get("/v1/events?follow=true", headers=headers) as answer,
        ):
            for _ in range(5):  # as many times as long as a write may hang
                assert (await answer.content.readline(), await answer.content.readline()) == (b":\n", b"\n")
            await gateway.parts.registry.create_package("n", "p", "s", "scratch")
            async for line in answer.content:
                if line == b"event: v1.package.created\n":
                    return
    raise AssertionError("the follower was cut off")


async def test_readers_of_archives_who_stall_keep_out_neither_other_clients_nor_producers(
    embedded_settings: Settings,
) -> None:
    async with running_gateway(embedded_settings) as gateway, AsyncExitStack() as stack:
        path = (await large(gateway))["archive"]

        async def asked(address: str) -> int:
            reader = await stack.enter_async_context(connected(gateway.port, address))
            reader.send(f"GET {path}")
            return (await reader.head())[0]

        half = BUNDLES_AT_ONCE // 2
        async with asyncio.timeout(TURN_SECONDS / 2):
            assert [await asked("127.0.0.1") for _ in range(half + 1)] == [200] * half + [429]
            assert [await asked("127.0.0.2") for _ in range(half)] == [200] * half
            assert await asked("127.0.0.3") == 503
        async with gateway.session.get("/metrics") as answer:
            assert f"artifact_store_http_downloads {BUNDLES_AT_ONCE}.0" in await answer.text()
        other = await gateway.parts.registry.create_package("n", "p", "s", "scratch")
        data = entry_header("a", 5, 0) + b"bytes" + padding(5) + END
        async with (
            asyncio.timeout(TURN_SECONDS / 2),
            gateway.session.post(
                f"/v1/packages/{other}/files", data=data, headers={"Content-Type": "application/x-tar"}
            ) as answer,
        ):
            assert answer.status == 201


@pytest.mark.parametrize("kind", KINDS)
async def test_a_download_whose_client_goes_away_lets_go_of_its_blob(
    embedded_settings: Settings, tmp_path: Path, kind: str
) -> None:
    async with running_gateway(embedded_settings) as gateway:
        path = (await large(gateway))[kind]

        async def nothing_is_open() -> bool:
            return open_blobs(tmp_path / "blobs") == []

        async with connected(gateway.port) as reader:
            reader.send(f"GET {path}")
            assert (await reader.head())[0] == 200
            assert len(open_blobs(tmp_path / "blobs")) == 1
        await until(nothing_is_open, SECONDS, "a client that is gone kept a blob open")


async def test_a_client_that_leaves_while_it_is_written_to_is_no_failure(
    embedded_settings: Settings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, lost = Call.send, Connection.connection_lost

    def lost_later(connection: Connection, error: BaseException | None) -> None:
        asyncio.get_running_loop().call_later(0.2, lost, connection, error)

    async def send_as_it_leaves(call: Call, response: web.StreamResponse, data: bytes) -> None:
        assert call.request.transport is not None
        call.request.transport.abort()
        await send(call, response, data)

    async def left() -> bool:
        return "because the client went away" in caplog.text

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(Call, "send", send_as_it_leaves)
    monkeypatch.setattr(Connection, "connection_lost", lost_later)  # as late as the event loop may tell of it
    async with running_gateway(embedded_settings) as gateway, connected(gateway.port) as reader:
        reader.send("GET /v1/events?follow=true&since=now")
        assert (await reader.head())[0] == 200
        await gateway.parts.registry.create_package("n", "p", "s", "scratch")
        await until(left, SECONDS, f"what is logged is {caplog.text}")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_what_waited_for_clients_goes_with_their_connections(embedded_settings: Settings) -> None:
    """Without a collection of cycles: a gateway makes few, and until then each cycle keeps what waited for a client."""

    def kept() -> Counter[type]:
        return Counter(type(each) for each in gc.get_objects() if isinstance(each, Connection | Call | TailEvent))

    async def something_is_read() -> bool:
        return kept()[TailEvent] > 0

    async def nothing_is_kept() -> bool:
        return kept() <= before

    async with running_gateway(embedded_settings) as gateway:
        paths = ["/v1/events?follow=true&since=now"] * 5 + list((await large(gateway)).values())
        gc.collect()
        gc.disable()
        try:
            before = kept()
            async with AsyncExitStack() as stack:
                for path in paths:
                    reader = await stack.enter_async_context(connected(gateway.port))
                    reader.send(f"GET {path}")
                    assert (await reader.head())[0] == 200
                await gateway.parts.registry.create_package("n", "p", "s", "scratch")
                await until(something_is_read, SECONDS, "the tail reads nothing")
                assert kept()[Connection] - before[Connection] == len(paths)
            await until(nothing_is_kept, SECONDS, "what waited for clients is still there")
        finally:
            gc.enable()
