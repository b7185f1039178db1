"""Resumable uploads from the client's side, against a gateway that answers late on purpose."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest
from aiohttp import web
from blake3 import blake3

from artifact_store.client.bodies import BytesSource
from artifact_store.client.resumable import send_resumably
from artifact_store.client.transport import Transport
from tests.unit.artifact_store.client.failing_gateway import FILE, PACKAGE, QUICK, failing_gateway

CONTENT = b"all of it"
LENGTH = 64 << 20
"""What the upload is said to be long: a gateway may take two seconds to read so much back."""


async def begun_late(_request: web.Request, _body: bytes) -> web.StreamResponse:
    """Everything had arrived before; it is read back within the answer, which takes a while."""
    await asyncio.sleep(1.5)  # beyond the policy's patience, and its whole time, for any other answer
    return web.Response(status=201, headers={"Location": "/v1/uploads/1", "Upload-Offset": str(LENGTH)})


async def recorded(_request: web.Request, _body: bytes) -> web.StreamResponse:
    file = {
        "package_id": str(PACKAGE),
        "file_id": str(FILE),
        "relative_path": "a",
        "content_address": f"blake3:{blake3(CONTENT).hexdigest()}",
        "sha256": "00" * 32,
        "size_bytes": LENGTH,
        "sequence": 2,
        "event_digest": "ab" * 32,
    }
    upload = {
        "upload_id": str(FILE),
        "package_id": str(PACKAGE),
        "relative_path": "a",
        "media_type": "text/plain",
        "length": LENGTH,
        "offset": LENGTH,
        "created_at": "2026-01-01T00:00:00.000000Z",
        "expires_at": "2026-01-02T00:00:00.000000Z",
        "file": file,
    }
    return web.Response(text=json.dumps(upload), content_type="application/json")


async def begun(_request: web.Request, _body: bytes) -> web.StreamResponse:
    return web.Response(status=201, headers={"Location": "/v1/uploads/1", "Upload-Offset": "0"})


async def added(_request: web.Request, body: bytes) -> web.StreamResponse:
    return web.Response(status=204, headers={"Upload-Offset": str(len(body))})


async def standing(request: web.Request, body: bytes) -> web.StreamResponse:
    found = json.loads((await recorded(request, body)).text)  # type: ignore[attr-defined]  # it has a text
    del found["file"]
    return web.Response(text=json.dumps({**found, "offset": 0}), content_type="application/json")


@pytest.mark.slow
async def test_an_upload_goes_on_where_nothing_knows_100_continue() -> None:
    policy = replace(QUICK, idle_seconds=0.5)
    content = bytes(LENGTH)
    async with (
        failing_gateway(begun, standing, added, recorded) as gateway,
        Transport(gateway.url, policy) as transport,
    ):
        gateway.continues = False
        found = await send_resumably(transport, PACKAGE, "a", "text/plain", BytesSource(content), LENGTH, {})
    assert found.sequence == 2
    bodies = {seen.headers.get("Expect"): len(seen.body) for seen in gateway.seen if seen.method == "PATCH"}
    assert bodies == {None: LENGTH}, "the one that expected an answer first never came to its body"


@pytest.mark.slow
async def test_an_upload_that_is_taken_up_may_be_read_back_before_the_answer() -> None:
    policy = replace(QUICK, idle_seconds=1.0, total_seconds=1.2)
    async with failing_gateway(begun_late, recorded) as gateway, Transport(gateway.url, policy) as transport:
        source = BytesSource(CONTENT)
        found = await send_resumably(transport, PACKAGE, "a", "text/plain", source, LENGTH, {})
    assert found.sequence == 2
    assert [seen.method for seen in gateway.seen] == ["POST", "GET"]
