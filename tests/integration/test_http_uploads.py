"""Uploads in several requests over HTTP, as tus 1.0 has them: what is said, kept, refused and forgotten."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import aiohttp
import pytest
from blake3 import blake3

from services.config import Settings
from services.http.uploads import encode_metadata
from tests.contract.blobs_stage import some_bytes
from tests.integration.http_gateway import RunningGateway, running_gateway

TUS = {"Tus-Resumable": "1.0.0"}
PATCH = {**TUS, "Content-Type": "application/offset+octet-stream"}
MIB = 1 << 20


@pytest.fixture
async def gateway(embedded_settings: Settings) -> AsyncIterator[RunningGateway]:
    async with running_gateway(embedded_settings) as running:
        yield running


@pytest.fixture
async def package(gateway: RunningGateway) -> str:
    about = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch"}
    async with gateway.session.post("/v1/packages", json=about) as answer:
        return str((await answer.json())["package_id"])


async def begin(gateway: RunningGateway, package: str, length: int, path: str = "a.bin", **more: str) -> str:
    headers = {**TUS, "Upload-Length": str(length), "Upload-Metadata": encode_metadata({"filename": path}), **more}
    async with gateway.session.post(f"/v1/packages/{package}/uploads", headers=headers) as answer:
        assert answer.status == 201, await answer.text()
        return answer.headers["Location"]


async def add(
    gateway: RunningGateway, url: str, offset: int, data: bytes, **more: str
) -> tuple[int, dict[str, str], dict[str, Any]]:
    headers = {**PATCH, "Upload-Offset": str(offset), **more}
    async with gateway.session.patch(url, headers=headers, data=io.BytesIO(data)) as answer:
        problem = await answer.json(content_type=None) if answer.status != 204 else {}
        return answer.status, dict(answer.headers), problem


async def offset_of(gateway: RunningGateway, url: str) -> int | None:
    async with gateway.session.head(url, headers=TUS) as answer:
        assert answer.headers["Tus-Resumable"] == "1.0.0"
        return int(answer.headers["Upload-Offset"]) if answer.status == 200 else None


async def test_a_file_that_arrives_in_pieces_is_the_one_that_a_put_would_have_made(
    gateway: RunningGateway, package: str
) -> None:
    data = some_bytes(20 * MIB + 17)
    url = await begin(gateway, package, len(data), "deep/a b.bin", **{"X-Actor": "me"})
    at = 0
    for size in (0, 1, 8 * MIB - 1, 3 * MIB, 9 * MIB, len(data)):
        status, headers, _ = await add(gateway, url, at, data[at : at + size])
        at = min(at + size, len(data))
        assert (status, headers["Upload-Offset"]) == (204, str(at))
        assert await offset_of(gateway, url) == at
    async with gateway.session.get(headers["Content-Location"] + "/content") as answer:
        assert await answer.read() == data
    async with gateway.session.get(url) as answer:
        shown = await answer.json()
    assert shown["offset"] == shown["length"] == len(data)
    file = shown["file"]
    assert file["content_address"] == f"blake3:{blake3(data).hexdigest()}"
    assert (file["sha256"], file["relative_path"]) == (hashlib.sha256(data).hexdigest(), "deep/a b.bin")
    assert (await add(gateway, url, len(data), b""))[0] == 204, "a repeat of the last one is harmless"
    assert await gateway.events() == 2
