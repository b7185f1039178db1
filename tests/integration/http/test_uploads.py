"""Uploads in several requests over HTTP by tus 1.0: what is answered, kept, refused and forgotten."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any
from uuid import uuid4

import pytest
from blake3 import blake3

from artifact_store.documents.resumable_uploads import encode_metadata
from services.config import Settings
from tests.contract.blobs_stage import some_bytes
from tests.integration.conditions import until
from tests.integration.http_gateway import RunningGateway, running_gateway
from tests.integration.http_raw import send_and_leave

TUS = {"Tus-Resumable": "1.0.0"}
PATCH = {**TUS, "Content-Type": "application/offset+octet-stream"}
MIB = 1 << 20


@pytest.fixture
async def gateway(embedded_settings: Settings) -> AsyncIterator[RunningGateway]:
    async with running_gateway(embedded_settings, wait_seconds=0.2) as running:
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


async def test_options_says_what_is_spoken(gateway: RunningGateway, package: str) -> None:
    for url in (f"/v1/packages/{package}/uploads", await begin(gateway, package, 1)):
        # A version is ignored (tus 1.0, "OPTIONS"): what is spoken is only just asked.
        async with gateway.session.options(url, headers={"Tus-Resumable": "0.2.2"}) as answer:
            assert answer.status == 204
            assert answer.headers["Tus-Version"] == answer.headers["Tus-Resumable"] == "1.0.0"
            assert answer.headers["Tus-Max-Size"] == str(gateway.parts.settings.max_file_bytes)
            extensions = answer.headers["Tus-Extension"].split(",")
            assert {"creation", "creation-with-upload", "termination", "checksum", "expiration"} == set(extensions)
            assert "sha1" in answer.headers["Tus-Checksum-Algorithm"].split(",")


async def test_head_tells_all_that_tus_asks_for(gateway: RunningGateway, package: str) -> None:
    said = encode_metadata({"relative_path": "a/b", "media_type": "text/plain", "color": "grün"})
    url = await begin(gateway, package, 100, **{"Upload-Metadata": said})
    await add(gateway, url, 0, b"x" * 40)
    async with gateway.session.head(url, headers=TUS) as answer:
        assert answer.status == 200
        assert (answer.headers["Upload-Offset"], answer.headers["Upload-Length"]) == ("40", "100")
        assert answer.headers["Upload-Metadata"] == said
        assert answer.headers["Cache-Control"] == "no-store"
        left = parsedate_to_datetime(answer.headers["Upload-Expires"]) - datetime.now(UTC)
    assert timedelta(hours=23) < left <= timedelta(hours=24)


async def test_an_upload_may_wait_for_the_view_as_all_below_a_package(gateway: RunningGateway, package: str) -> None:
    url = await begin(gateway, package, 1)
    for wait_sequence, status in (("1", 200), ("2", 409), ("x", 400)):
        async with gateway.session.get(url, params={"wait_sequence": wait_sequence}) as answer:
            assert answer.status == status


async def test_the_first_bytes_may_come_with_the_creation(gateway: RunningGateway, package: str) -> None:
    headers = {
        **PATCH,
        "Upload-Length": "5",
        "Upload-Metadata": encode_metadata({"relative_path": "a", "filetype": "text/plain"}),
        "Idempotency-Key": str(uuid4()),
    }
    for data, expected in ((b"abc", "3"), (b"abc", "3")):  # a repeat finds what the first one brought
        async with gateway.session.post(f"/v1/packages/{package}/uploads", headers=headers, data=data) as answer:
            assert (answer.status, answer.headers["Upload-Offset"]) == (201, expected)
    status, told, _ = await add(gateway, answer.headers["Location"], 3, b"de")
    assert (status, told["X-Content-Address"]) == (204, f"blake3:{blake3(b'abcde').hexdigest()}")
    assert told["Repr-Digest"] == f"sha-256=:{base64.b64encode(hashlib.sha256(b'abcde').digest()).decode()}:"
    async with gateway.session.get(told["Content-Location"]) as shown:
        assert (await shown.json())["media_type"] == "text/plain"


async def test_an_empty_file_needs_no_second_request(gateway: RunningGateway, package: str) -> None:
    await begin(gateway, package, 0, "empty")
    async with gateway.session.get(f"/v1/packages/{package}/files/empty") as answer:
        assert (await answer.json())["size_bytes"] == 0


async def test_a_checksum_that_fails_leaves_the_upload_where_it_was(gateway: RunningGateway, package: str) -> None:
    url = await begin(gateway, package, 6)
    right = base64.b64encode(hashlib.sha1(b"abc", usedforsecurity=False).digest()).decode()
    status, headers, problem = await add(gateway, url, 0, b"abx", **{"Upload-Checksum": f"sha1 {right}"})
    assert (status, problem["type"]) == (460, "urn:artifact-store:problem:checksum-mismatch")
    assert headers["Tus-Resumable"] == "1.0.0"
    assert await offset_of(gateway, url) == 0
    assert (await add(gateway, url, 0, b"abc", **{"Upload-Checksum": f"sha1 {right}"}))[0] == 204
    for bad in ("md5 AAAA", "sha1 AAAA", "sha1", "sha1 ???"):
        assert (await add(gateway, url, 3, b"def", **{"Upload-Checksum": bad}))[0] == 400
    assert await offset_of(gateway, url) == 3


async def test_an_upload_that_was_ended_is_gone(gateway: RunningGateway, package: str) -> None:
    url = await begin(gateway, package, 100)
    await add(gateway, url, 0, b"x" * 40)
    async with gateway.session.delete(url, headers=TUS) as answer:
        assert (answer.status, answer.headers["Tus-Resumable"]) == (204, "1.0.0")
    assert await offset_of(gateway, url) is None
    assert (await add(gateway, url, 40, b"x"))[0] == 404
    async with gateway.session.delete(url, headers=TUS) as answer:
        assert answer.status == 404
    assert not await gateway.parts.blobs.list_objects("resumable/")


async def test_post_stands_for_methods_that_cannot_be_sent(gateway: RunningGateway, package: str) -> None:
    url = await begin(gateway, package, 100)
    patch = {**PATCH, "X-HTTP-Method-Override": "PATCH", "Upload-Offset": "0"}
    async with gateway.session.post(url, headers=patch, data=b"x" * 40) as answer:
        assert (answer.status, answer.headers["Upload-Offset"]) == (204, "40")
    async with gateway.session.post(url, headers={**TUS, "X-HTTP-Method-Override": "DELETE"}) as answer:
        assert answer.status == 204
    async with gateway.session.post(url, headers=TUS) as answer:
        assert answer.status == 405


NAMED = encode_metadata({"relative_path": "a"})


@pytest.mark.parametrize(
    ("headers", "status", "kind"),
    [
        ({"Upload-Metadata": NAMED}, 400, "invalid-request"),
        ({"Upload-Length": "1"}, 400, "invalid-request"),
        ({"Upload-Length": "-1", "Upload-Metadata": NAMED}, 400, "invalid-request"),
        ({"Upload-Length": "1e3", "Upload-Metadata": NAMED}, 400, "invalid-request"),
        ({"Upload-Length": "٣", "Upload-Metadata": NAMED}, 400, "invalid-request"),
        ({"Upload-Length": "9" * 30, "Upload-Metadata": NAMED}, 400, "invalid-request"),
        ({"Upload-Length": "9" * 18, "Upload-Metadata": NAMED}, 413, "too-large"),
        ({"Upload-Defer-Length": "1", "Upload-Metadata": NAMED}, 400, "invalid-request"),
        ({"Upload-Length": "1", "Upload-Metadata": "relative_path !!"}, 400, "invalid-request"),
        ({"Upload-Length": "1", "Upload-Metadata": "relative_path YQ==,relative_path Yg=="}, 400, "invalid-request"),
        ({"Upload-Length": "1", "Upload-Metadata": "relative_path /w=="}, 400, "invalid-request"),
        ({"Upload-Length": "1", "Upload-Metadata": "color YQ=="}, 400, "invalid-request"),
        ({"Upload-Length": "1", "Upload-Metadata": ""}, 400, "invalid-request"),
        ({"Upload-Length": "1", "Upload-Metadata": encode_metadata({"filename": "../a"})}, 400, "invalid-path"),
        ({"Upload-Length": "1", "Upload-Metadata": encode_metadata({"filename": ""})}, 400, "invalid-path"),
        ({"Upload-Length": "1", "Upload-Metadata": NAMED, "Tus-Resumable": "0.2.2"}, 412, "unsupported-tus-version"),
        ({"Upload-Length": "1", "Upload-Metadata": NAMED, "Idempotency-Key": "x"}, 400, "invalid-request"),
        ({"Upload-Length": "1", "Upload-Metadata": NAMED, "Upload-Checksum": "sha1 AAAA"}, 400, "invalid-request"),
        ({"Upload-Length": "1", "Upload-Metadata": NAMED, "X-Content-Address": "blake3:x"}, 400, "invalid-request"),
    ],
)
async def test_creations_that_break_a_rule_are_refused_and_leave_nothing(
    gateway: RunningGateway, package: str, headers: dict[str, str], status: int, kind: str
) -> None:
    url = f"/v1/packages/{package}/uploads"
    async with gateway.session.post(url, headers={**TUS, **headers}) as answer:
        problem = await answer.json(content_type="application/problem+json")
        assert (answer.status, problem["type"]) == (status, f"urn:artifact-store:problem:{kind}")
        assert answer.headers["Tus-Resumable"] == "1.0.0"
        if status == 412:
            assert answer.headers["Tus-Version"] == "1.0.0"
    assert not await gateway.parts.blobs.list_objects("resumable/")


async def test_additions_that_break_a_rule_are_refused_and_change_nothing(
    gateway: RunningGateway, package: str
) -> None:
    url = await begin(gateway, package, 100)
    await add(gateway, url, 0, b"x" * 40)
    for headers, status in (
        ({}, 400),
        ({"Upload-Offset": "39"}, 409),
        ({"Upload-Offset": "-1"}, 400),
        ({"Upload-Offset": "40", "Content-Type": "application/octet-stream"}, 415),
        ({"Upload-Offset": "40", "Tus-Resumable": "2.0.0"}, 412),
    ):
        async with gateway.session.patch(url, headers={**PATCH, **headers}, data=b"y") as answer:
            assert answer.status == status
            assert answer.headers["Content-Type"] == "application/problem+json"
    assert (await add(gateway, url, 40, b"y" * 61))[0] == 413
    async with gateway.session.patch(url, headers={"Upload-Offset": "40"}, data=b"y") as answer:
        assert answer.status == 412, "no version is none that is spoken"
    assert await offset_of(gateway, url) == 40


async def test_what_a_put_would_be_refused_for_is_refused_before_a_byte_is_sent(
    gateway: RunningGateway, package: str
) -> None:
    url = await begin(gateway, package, 10, "late")
    async with gateway.session.put(f"/v1/packages/{package}/files/taken", data=b"x") as answer:
        assert answer.status == 201
    headers = {**TUS, "Upload-Length": "1", "Upload-Metadata": encode_metadata({"filename": "taken"})}
    async with gateway.session.post(f"/v1/packages/{package}/uploads", headers=headers) as answer:
        assert answer.status == 409
    async with gateway.session.post(f"/v1/packages/{package}/finalize") as answer:
        assert answer.status == 200
    status, _, problem = await add(gateway, url, 0, b"x" * 10)
    assert (status, problem["type"]) == (409, "urn:artifact-store:problem:illegal-package-state")
    async with gateway.session.post(f"/v1/packages/{uuid4()}/uploads", headers=headers) as answer:
        assert answer.status == 404


@pytest.mark.parametrize("sent", [0, 1, 65_536, 9 * MIB])
async def test_after_a_lost_connection_it_goes_on_close_to_where_it_stood(
    gateway: RunningGateway, package: str, sent: int
) -> None:
    data = some_bytes(10 * MIB)
    url = await begin(gateway, package, len(data))
    head = "".join(f"{name}: {value}\r\n" for name, value in PATCH.items())
    request = f"PATCH {url} HTTP/1.1\r\nHost: [::1]\r\n{head}Upload-Offset: 0\r\nContent-Length: {len(data)}\r\n\r\n"
    await send_and_leave(gateway.port, request.encode() + data[:sent])
    told: dict[str, str] = {}
    least = sent - MIB  # what the server had not read yet when the connection ended is lost

    async def gone_on() -> bool:
        at = await offset_of(gateway, url) or 0
        if not least <= at <= sent:
            return False
        status, headers, _ = await add(gateway, url, at, data[at:])
        told.update(headers)
        assert status in (204, 409, 423)  # until the gateway has seen that the connection is gone
        return status == 204

    await until(gone_on, 20, "the upload did not go on")
    assert told["X-Content-Address"] == f"blake3:{blake3(data).hexdigest()}"


async def test_two_clients_that_add_at_once_are_told_apart(gateway: RunningGateway, package: str) -> None:
    url = await begin(gateway, package, 8)
    began, rest = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"abcd"
        began.set()
        await rest.wait()
        yield b"efgh"

    async def send() -> int:
        async with gateway.session.patch(url, headers={**PATCH, "Upload-Offset": "0"}, data=slow()) as answer:
            return answer.status

    running = asyncio.create_task(send())
    await began.wait()

    async def busy() -> bool:
        return (await add(gateway, url, 0, b""))[0] == 423

    await until(busy, 10, "the first request never held the upload")
    status, headers, problem = await add(gateway, url, 0, b"other")
    assert (status, problem["type"]) == (423, "urn:artifact-store:problem:upload-busy")
    assert int(headers["Retry-After"]) >= 1
    rest.set()
    assert await running == 204
    async with gateway.session.get(url) as answer:
        assert (await answer.json())["file"]["content_address"] == f"blake3:{blake3(b'abcdefgh').hexdigest()}"


async def test_a_creation_whose_answer_was_lost_is_asked_for_again(gateway: RunningGateway, package: str) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    url = await begin(gateway, package, 10, **key)
    await add(gateway, url, 0, b"x" * 4)
    assert await begin(gateway, package, 10, **key) == url
    headers = {**TUS, **key, "Upload-Length": "11", "Upload-Metadata": encode_metadata({"filename": "a.bin"})}
    async with gateway.session.post(f"/v1/packages/{package}/uploads", headers=headers) as answer:
        assert answer.status == 422
