"""Bytes, manifests and metadata over HTTP: ranges, conditions, negotiation, caching, and failures in transit."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from blake3 import blake3
from yarl import URL

from artifact_store.manifest import decode
from services.config import Settings
from tests.integration.http_gateway import RunningGateway, running_gateway
from tests.integration.http_raw import read_answer

_BODY = bytes(range(256)) * 8
_TAG = f'"blake3:{blake3(_BODY).hexdigest()}"'
_PACKAGE = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch"}


@pytest.fixture
async def gateway(embedded_settings: Settings) -> AsyncIterator[RunningGateway]:
    async with running_gateway(embedded_settings) as running:
        yield running


async def _package(gateway: RunningGateway) -> str:
    async with gateway.session.post("/v1/packages", json=_PACKAGE) as answer:
        assert answer.status == 201
        assert answer.headers["Location"] == f"/v1/packages/{(await answer.json())['package_id']}"
        return str((await answer.json())["package_id"])


async def _file(gateway: RunningGateway, name: str = "a", body: bytes = _BODY, media_type: str = "text/html") -> str:
    """A file in a separate package. Returns the path of its content."""
    path = f"/v1/packages/{await _package(gateway)}/files/{name}"
    async with gateway.session.put(path, data=io.BytesIO(body), headers={"Content-Type": media_type}) as answer:
        assert answer.status == 201
        return f"/v1/files/{(await answer.json())['file_id']}/content"


async def test_what_went_in_comes_out_under_its_address(gateway: RunningGateway) -> None:
    path = await _file(gateway, name="dir/r%C3%A9sum%C3%A9.html")
    async with gateway.session.get(path) as answer:
        assert await answer.read() == _BODY
        headers = answer.headers
    assert headers["ETag"] == _TAG
    assert headers["Content-Type"] == "text/html"
    assert headers["Repr-Digest"] == f"sha-256=:{base64.b64encode(hashlib.sha256(_BODY).digest()).decode()}:"
    assert "immutable" in headers["Cache-Control"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Content-Security-Policy"] == "sandbox; default-src 'none'"
    assert (
        headers["Content-Disposition"] == "attachment; filename=\"resume.html\"; filename*=UTF-8''r%C3%A9sum%C3%A9.html"
    )
    assert headers["Server"] == "artifact-store"


async def test_a_media_type_that_is_none_is_not_passed_on(gateway: RunningGateway) -> None:
    path = await _file(gateway, media_type="what ever")
    async with gateway.session.get(path) as answer:
        assert answer.headers["Content-Type"] == "application/octet-stream"


@pytest.mark.parametrize(
    ("value", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=5-9", 5, 10),
        ("bytes=2000-", 2000, 2048),
        ("bytes=2047-5000", 2047, 2048),
        ("bytes=-1", 2047, 2048),
        ("bytes=-5000", 0, 2048),
        ("Bytes=1-2", 1, 3),
    ],
)
async def test_a_range_is_answered_with_its_bytes(gateway: RunningGateway, value: str, start: int, end: int) -> None:
    path = await _file(gateway)
    for extra in ({}, {"If-Range": _TAG}):
        async with gateway.session.get(path, headers={"Range": value, **extra}) as answer:
            assert answer.status == 206
            assert answer.headers["Content-Range"] == f"bytes {start}-{end - 1}/2048"
            assert answer.headers["ETag"] == _TAG
            assert await answer.read() == _BODY[start:end]


@pytest.mark.parametrize(
    "headers",
    [
        {"Range": "bytes=0-1,4-5"},
        {"Range": "bytes=5-4"},
        {"Range": "bytes=a-b"},
        {"Range": "bytes=-"},
        {"Range": "items=0-1"},
        {"Range": "bytes=0-1", "If-Range": '"other"'},
        {"Range": "bytes=0-1", "If-Range": f"W/{_TAG}"},
        {"Range": "bytes=0-1", "If-Range": "Tue, 01 Jan 2030 00:00:00 GMT"},
    ],
)
async def test_a_range_that_need_not_be_honoured_gives_the_whole(
    gateway: RunningGateway, headers: dict[str, str]
) -> None:
    async with gateway.session.get(await _file(gateway), headers=headers) as answer:
        assert answer.status == 200
        assert await answer.read() == _BODY


async def test_conditions_are_judged_by_the_tag(gateway: RunningGateway) -> None:
    path = await _file(gateway)
    for value in (_TAG, f"W/{_TAG}", f'"other", {_TAG}', "*"):
        for method in ("GET", "HEAD"):
            async with gateway.session.request(method, path, headers={"If-None-Match": value}) as answer:
                assert answer.status == 304
                assert answer.headers["ETag"] == _TAG
                assert await answer.read() == b""
    for value in ('"other"', "", "nonsense"):
        async with gateway.session.get(path, headers={"If-None-Match": value}) as answer:
            assert answer.status == 200
    for value, status in ((_TAG, 200), ("*", 200), ('"other"', 412), (f"W/{_TAG}", 412)):
        async with gateway.session.get(path, headers={"If-Match": value}) as answer:
            assert answer.status == status


async def test_head_is_get_without_the_body(gateway: RunningGateway) -> None:
    content = await _file(gateway)
    package = await _package(gateway)
    for path in (content, content.removesuffix("/content"), f"/v1/packages/{package}", "/v1/packages", "/healthz"):
        async with gateway.session.get(path) as whole, gateway.session.head(path) as head:
            assert head.status == whole.status
            for name in ("Content-Type", "Content-Length", "ETag"):
                assert head.headers.get(name) == whole.headers.get(name)
            assert await head.read() == b""
    async with gateway.session.head(content, headers={"Range": "bytes=0-0"}) as head:
        assert head.status == 200
    async with gateway.session.head("/v1/events?follow=true") as head:
        assert head.status == 200
    async with gateway.session.head(f"/v1/packages/{uuid4()}") as head:
        assert head.status == 404


async def test_an_empty_file_is_a_file(gateway: RunningGateway) -> None:
    async with gateway.session.get(await _file(gateway, body=b"")) as answer:
        assert (answer.status, answer.headers["Content-Length"]) == (200, "0")
        assert await answer.read() == b""


async def test_the_manifest_comes_in_both_forms_under_two_tags(gateway: RunningGateway) -> None:
    package = await _package(gateway)
    await gateway.session.put(f"/v1/packages/{package}/files/a", data=_BODY)
    async with gateway.session.post(f"/v1/packages/{package}/finalize") as answer:
        digest = (await answer.json())["manifest_digest"]
    path = f"/v1/packages/{package}/manifest"
    tags = set()
    for accept, media_type in (
        (None, "application/cbor"),
        ("*/*", "application/cbor"),
        ("application/*;q=0.5", "application/cbor"),
        ("application/json", "application/json"),
        ("application/cbor;q=0.4, application/json", "application/json"),
    ):
        headers = {} if accept is None else {"Accept": accept}
        async with gateway.session.get(path, headers=headers) as answer:
            assert (answer.status, answer.content_type) == (200, media_type)
            assert answer.headers["Vary"] == "Accept"
            data, tag = await answer.read(), answer.headers["ETag"]
        assert [file.relative_path for file in decode(data).files] == ["a"]
        tags.add((media_type, tag))
        if media_type == "application/cbor":
            assert f"blake3:{blake3(data).hexdigest()}" == digest
        async with gateway.session.get(path, headers={**headers, "If-None-Match": tag}) as answer:
            assert answer.status == 304
    assert len(tags) == 2
    assert ("application/cbor", f'"{digest}"') in tags
    async with gateway.session.get(f"/v1/packages?manifest_digest={digest}") as answer:
        assert [item["package_id"] for item in (await answer.json())["items"]] == [package]


async def test_the_deepest_metadata_that_is_taken_stands_in_both_forms_of_the_manifest(gateway: RunningGateway) -> None:
    metadata: dict[str, object] = {}
    for _ in range(64):
        metadata = {"a": metadata}
    body = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch", "metadata": metadata}
    async with gateway.session.post("/v1/packages", json=body) as answer:
        assert answer.status == 201
        path = f"/v1/packages/{(await answer.json())['package_id']}"
    async with gateway.session.post(f"{path}/finalize") as answer:
        assert answer.status == 200
    for form in ("application/cbor", "application/json"):
        async with gateway.session.get(f"{path}/manifest", headers={"Accept": form}) as answer:
            assert answer.status == 200
            assert decode(await answer.read()).package.metadata == metadata


async def test_pages_lead_on_until_the_last(gateway: RunningGateway) -> None:
    package = await _package(gateway)
    names = [f"f{n:02}" for n in range(7)]
    for name in names:
        await gateway.session.put(f"/v1/packages/{package}/files/{name}", data=b"x")
    seen: list[str] = []
    path: str | None = f"/v1/packages/{package}/files?limit=3&wait_sequence=8"
    while path is not None:
        async with gateway.session.get(path) as answer:
            page = await answer.json()
            links = answer.links
        seen += [item["relative_path"] for item in page["items"]]
        assert (page["next"] is None) == ("next" not in links)
        path = str(URL(links["next"]["url"]).relative()) if "next" in links else None
    assert seen == names


async def test_a_repeat_with_its_key_answers_as_the_first_did(gateway: RunningGateway) -> None:
    async def send(method: str, path: str, **request: Any) -> tuple[int, bytes]:
        headers = {"Idempotency-Key": key, "X-Actor": "Zoë"}
        async with gateway.session.request(method, path, headers=headers, **request) as answer:
            return answer.status, await answer.read()

    key = str(uuid4())
    first = await send("POST", "/v1/packages", json=_PACKAGE)
    assert await send("POST", "/v1/packages", json=_PACKAGE) == first
    async with gateway.session.get("/v1/packages") as answer:
        (package,) = (await answer.json())["items"]
    path = f"/v1/packages/{package['package_id']}"
    key = str(uuid4())
    put = await send("PUT", f"{path}/files/a", data=_BODY)
    assert await send("PUT", f"{path}/files/a", data=_BODY) == put
    key = str(uuid4())
    done = await send("POST", f"{path}/finalize")
    assert await send("POST", f"{path}/finalize") == done
    assert (first[0], put[0], done[0]) == (201, 201, 200)
    actors = {event.actor async for event in gateway.parts.log.read()}
    assert actors == {"Zoë"}
    assert await gateway.events() == 3


async def test_declared_digests_that_are_right_are_taken(gateway: RunningGateway) -> None:
    headers = {
        "X-Content-Address": _TAG.strip('"'),
        "Repr-Digest": f"md5=:AAAA:, sha-256=:{base64.b64encode(hashlib.sha256(_BODY).digest()).decode()}:",
    }

    async def chunks() -> AsyncIterator[bytes]:
        for at in range(0, len(_BODY), 100):
            yield _BODY[at : at + 100]

    path = f"/v1/packages/{await _package(gateway)}/files/a"
    async with gateway.session.put(path, data=chunks(), headers=headers) as answer:
        assert answer.status == 201
        found = await answer.json()
    assert (found["content_address"], found["size_bytes"]) == (_TAG.strip('"'), len(_BODY))


async def test_content_that_is_gone_is_an_error_and_not_an_empty_file(gateway: RunningGateway, tmp_path: Path) -> None:
    path = await _file(gateway)
    for blob in (tmp_path / "blobs").rglob("*"):
        if blob.is_file():
            blob.unlink()
    async with gateway.session.get(path) as answer:
        assert (answer.status, answer.content_type) == (500, "application/problem+json")
        assert (await answer.json(content_type=None))["type"].endswith(":corrupt")


async def test_content_that_breaks_off_cuts_the_connection(gateway: RunningGateway, tmp_path: Path) -> None:
    size = 48 << 20  # more than sockets hold: the gateway still reads when the blob is damaged
    path = await _file(gateway, body=bytes(size))
    (blob,) = (found for found in (tmp_path / "blobs").rglob("*") if found.is_file() and found.stat().st_size == size)
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: [::1]\r\n\r\n".encode())
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    os.truncate(blob, 0)
    received = 0
    with contextlib.suppress(ConnectionResetError):
        while chunk := await reader.read(1 << 20):
            received += len(chunk)
    writer.close()
    assert received < size  # fewer than Content-Length: no client takes that for the end of the file


async def test_an_upload_under_way_is_finished_when_the_gateway_is_told_to_stop(embedded_settings: Settings) -> None:
    async with running_gateway(embedded_settings, drain_seconds=30) as gateway:
        path = f"/v1/packages/{await _package(gateway)}/files/a"
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(
            f"PUT {path} HTTP/1.1\r\nHost: [::1]\r\nExpect: 100-continue\r\nContent-Length: 10\r\n\r\n".encode()
        )
        assert b"100 Continue" in await reader.readuntil(b"\r\n\r\n")

        async def go_on() -> int:
            # The port is closed first, and only then the rest of the body is sent.
            while True:
                try:
                    _, probe = await asyncio.open_connection("127.0.0.1", gateway.port)
                except ConnectionRefusedError:
                    break
                probe.close()
            writer.write(b"0123456789")
            answer = await read_answer(reader)
            assert answer.headers["connection"] == "close"
            writer.close()
            return answer.status

        rest = asyncio.create_task(go_on())
    assert await rest == 201


async def test_an_upload_that_does_not_end_is_cut_off_and_leaves_nothing(embedded_settings: Settings) -> None:
    async with running_gateway(embedded_settings, drain_seconds=0.1) as gateway:
        path = f"/v1/packages/{await _package(gateway)}/files/a"
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(
            f"PUT {path} HTTP/1.1\r\nHost: [::1]\r\nExpect: 100-continue\r\nContent-Length: 10\r\n\r\n".encode()
        )
        assert b"100 Continue" in await reader.readuntil(b"\r\n\r\n")
    assert await reader.read() == b""
    writer.close()
    async with running_gateway(embedded_settings) as again:
        assert await again.events() == 1
