"""Archives over HTTP: many files in one request, all or none, and a whole package in one answer."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import sys
import tarfile
from collections.abc import AsyncIterator, Mapping
from typing import Any
from uuid import uuid4

import pytest
from blake3 import blake3

from artifact_store.archives.bundle import SMALL_FILE_BYTES
from services.config import Settings
from services.verify import verify
from services.wiring import open_blobs, open_log, open_views
from tests.integration.conditions import until
from tests.integration.http_gateway import RunningGateway, running_gateway

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PACKAGE = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch"}
TAR = {"Content-Type": "application/x-tar"}
FILES = {
    "b/läs mig ✓.txt": "håll i hatten".encode(),
    "a.json": b"{}",
    "empty": b"",
    "same as a": b"{}",
    "deep/" + "/".join(["segment"] * 30) + "/leaf.bin": bytes(range(256)) * 16,
    "large.bin": bytes(range(251)) * 5_000,
    "exactly small": bytes(SMALL_FILE_BYTES),
    "just above": b"x" * (SMALL_FILE_BYTES + 1),
}


@pytest.fixture
async def gateway(settings: Settings) -> AsyncIterator[RunningGateway]:
    for part in (open_log(settings), open_blobs(settings), open_views(settings)):
        await part.migrate()
        await part.close()
    async with running_gateway(settings) as running:

        async def ready() -> bool:
            return await running.parts.writer.ready() is None

        await until(ready, 30, "the writer is not ready")
        yield running


@pytest.fixture
async def embedded(embedded_settings: Settings) -> AsyncIterator[RunningGateway]:
    """For what the parts beneath have no say in."""
    async with running_gateway(embedded_settings) as running:
        yield running


def tar_of(files: Mapping[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


async def package(gateway: RunningGateway) -> str:
    async with gateway.session.post("/v1/packages", json=PACKAGE) as answer:
        return str((await answer.json())["package_id"])


async def send(
    gateway: RunningGateway, package_id: str, body: Any, headers: Mapping[str, str] = TAR, status: int = 201
) -> dict[str, Any]:
    sent = io.BytesIO(body) if isinstance(body, bytes) else body
    async with gateway.session.post(f"/v1/packages/{package_id}/files", data=sent, headers=headers) as answer:
        found: dict[str, Any] = await answer.json(content_type=None)
        assert answer.status == status, found
        return found


async def finalized(gateway: RunningGateway, package_id: str) -> str:
    async with gateway.session.post(f"/v1/packages/{package_id}/finalize") as answer:
        assert answer.status == 200
        return str((await answer.json())["manifest_digest"])


async def content(gateway: RunningGateway, file_id: str, **headers: str) -> bytes:
    async with gateway.session.get(f"/v1/files/{file_id}/content", headers=headers) as answer:
        assert answer.status in (200, 206)
        return await answer.read()


async def clean(gateway: RunningGateway) -> None:
    """Nothing in log, blobs or views breaks an invariant."""
    report = await verify(gateway.parts.log, gateway.parts.blobs, gateway.parts.views, check_bytes=True)
    assert report.violations == []


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
async def test_an_archive_becomes_its_files(gateway: RunningGateway, form: int) -> None:
    package_id = await package(gateway)
    done = await send(gateway, package_id, tar_of(FILES, form))
    assert [file["relative_path"] for file in done["files"]] == list(FILES)
    assert [file["sequence"] for file in done["files"]] == list(range(2, len(FILES) + 2))
    assert done["sequence"] == len(FILES) + 1
    for file in done["files"]:
        data = FILES[file["relative_path"]]
        assert file["content_address"] == f"blake3:{blake3(data).hexdigest()}"
        assert file["sha256"] == hashlib.sha256(data).hexdigest()
        assert await content(gateway, file["file_id"]) == data
    async with gateway.session.get(f"/v1/packages/{package_id}/files/b/l%C3%A4s%20mig%20%E2%9C%93.txt") as answer:
        assert (await answer.json())["media_type"] == "text/plain"
    await finalized(gateway, package_id)
    await clean(gateway)


async def test_small_files_lie_in_packs_and_are_read_by_range(gateway: RunningGateway) -> None:
    package_id = await package(gateway)
    done = await send(gateway, package_id, tar_of({f"{n:03}": b"%05d" % n * 100 for n in range(200)}))
    events = [event async for event in gateway.parts.log.read() if event.sequence > 1]
    receipts = [event.payload.receipt for event in events]  # type: ignore[union-attr]  # all are of files
    assert len({receipt.key for receipt in receipts}) == 1
    assert [receipt.offset for receipt in receipts] == [500 * n for n in range(200)]
    file = done["files"][7]
    assert await content(gateway, file["file_id"], Range="bytes=3-11") == (b"00007" * 3)[3:12]
    async with gateway.session.head(f"/v1/files/{file['file_id']}/content") as answer:
        assert answer.headers["ETag"] == f'"{file["content_address"]}"'
        assert answer.headers["Content-Length"] == "500"
    await clean(gateway)


async def test_the_same_archive_again_stores_nothing_new(gateway: RunningGateway) -> None:
    held = []
    for _ in range(2):
        await send(gateway, await package(gateway), tar_of({f"{n:03}": b"%d" % n for n in range(50)}))
        keys = {
            event.payload.receipt.key  # type: ignore[union-attr]  # all are of files
            async for event in gateway.parts.log.read()
            if event.sequence > 1
        }
        held.append(keys)
    assert held[0] == held[1]


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
@pytest.mark.parametrize("by", ["header", "media type"])
async def test_an_archive_may_be_compressed(embedded: RunningGateway, coding: str, by: str) -> None:
    data = tar_of(FILES)
    # Two members or frames, one behind the other, are one body (RFC 1952 §2.2, RFC 8878 §3.1).
    half = len(data) // 2
    compress = gzip.compress if coding == "gzip" else zstd.compress
    body = compress(data[:half]) + compress(data[half:])
    headers = {**TAR, "Content-Encoding": coding} if by == "header" else {"Content-Type": f"application/{coding}"}
    done = await send(embedded, await package(embedded), body, headers)
    assert len(done["files"]) == len(FILES)
    problem = await send(embedded, await package(embedded), body[:-20], headers, status=422)
    assert problem["type"].endswith(":invalid-archive")
    problem = await send(embedded, await package(embedded), b"no " + body, headers, status=422)
    assert problem["type"].endswith(":invalid-archive")


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
async def test_a_bomb_is_refused_before_it_is_unpacked(embedded: RunningGateway, coding: str) -> None:
    zeros = tar_of({"zeros": bytes(256 << 20)})
    body = gzip.compress(zeros, 1) if coding == "gzip" else zstd.compress(zeros)
    package_id = await package(embedded)
    problem = await send(embedded, package_id, body, {**TAR, "Content-Encoding": coding}, status=413)
    assert problem["type"].endswith(":too-large")
    assert await embedded.events() == 1


async def test_another_form_is_not_taken(embedded: RunningGateway) -> None:
    for headers in (
        {"Content-Type": "application/x-tar", "Content-Encoding": "br"},
        {"Content-Type": "application/x-tar", "Content-Encoding": "gzip, gzip"},
        {"Content-Type": "application/gzip", "Content-Encoding": "gzip"},
        {"Content-Type": "application/zip"},
        {"Content-Type": "text/plain"},
    ):
        problem = await send(embedded, await package(embedded), tar_of(FILES), headers, status=415)
        assert problem["type"].endswith(":unsupported-media-type")


async def test_one_bad_entry_leaves_nothing_recorded(gateway: RunningGateway) -> None:
    package_id = await package(gateway)
    await send(gateway, package_id, tar_of({"there": b"1"}))
    cases = [
        (tar_of({"new": b"1", "../up": b"2"}), 400, "invalid-path", "'../up'"),
        (tar_of({"new": b"1", "there": b"2"}), 409, "duplicate-relative-path", "'there'"),
        (tar_of({"new": b"1", "there/below": b"2"}), 409, "path-conflict", "'there/below' cannot lie in 'there'"),
        (tar_of({"new": b"1", "new/below": b"2"}), 409, "path-conflict", "'new' cannot be a file"),
        (tar_of({"new": b"1"}) + tar_of({"more": b"1"}), 422, "invalid-archive", "follow"),
        (tar_of({"new": b"1", "large": bytes(1 << 20)})[: 1 << 20], 422, "invalid-archive", "cut off"),
        (tar_of({}), 400, "invalid-request", "at least one"),
    ]
    for body, status, kind, said in cases:
        problem = await send(gateway, package_id, body, status=status)
        assert (problem["type"].rpartition(":")[2], said in problem["detail"]) == (kind, True), problem
    assert await gateway.events() == 2
    await clean(gateway)


async def test_what_is_known_beforehand_is_said_before_the_body(gateway: RunningGateway) -> None:
    closed = await package(gateway)
    await finalized(gateway, closed)

    asked: list[str] = []

    async def body() -> AsyncIterator[bytes]:
        asked.append("the body")
        yield tar_of(FILES)

    for package_id, status in ((closed, 409), (str(uuid4()), 404)):
        async with gateway.session.post(
            f"/v1/packages/{package_id}/files", data=body(), headers=TAR, expect100=True
        ) as answer:
            assert answer.status == status
    assert asked == []


async def test_a_repeat_answers_as_the_first_did(gateway: RunningGateway) -> None:
    package_id = await package(gateway)
    headers = {**TAR, "Idempotency-Key": str(uuid4()), "X-Actor": "somebody"}

    async def sent() -> dict[str, Any]:  # without the position: a log on Kafka does not know it for a repeat
        return {**await send(gateway, package_id, tar_of(FILES), headers), "position": None}

    first = await sent()
    assert await sent() == first
    problem = await send(gateway, package_id, tar_of({"a": b"1"}), headers, status=422)
    assert problem["type"].endswith(":command-reused")
    await finalized(gateway, package_id)
    assert await sent() == first
    assert {event.actor async for event in gateway.parts.log.read() if 1 < event.sequence <= len(FILES)} == {"somebody"}


async def test_a_body_that_breaks_off_leaves_nothing_recorded(gateway: RunningGateway) -> None:
    package_id = await package(gateway)
    data = tar_of(FILES)
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    head = f"POST /v1/packages/{package_id}/files HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/x-tar\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data[: len(data) // 2])
    await writer.drain()
    writer.close()
    await reader.read()
    done = await send(gateway, package_id, data)
    assert done["sequence"] == len(FILES) + 1
    await clean(gateway)


async def test_ten_thousand_files_are_one_command_and_one_more_is_too_many(gateway: RunningGateway) -> None:
    package_id = await package(gateway)
    files = {f"{n // 100:02}/{n:05}.txt": b"%d" % n for n in range(10_001)}
    problem = await send(gateway, package_id, tar_of(files), status=413)
    assert "10,000" in problem["detail"]
    files.popitem()
    done = await send(gateway, package_id, tar_of(files))
    assert done["sequence"] == 10_001
    assert await content(gateway, done["files"][1234]["file_id"]) == b"1234"
    await finalized(gateway, package_id)
    assert await archived(gateway, package_id) == files


async def archived(gateway: RunningGateway, package_id: str, query: str = "", **headers: str) -> dict[str, bytes]:
    async with gateway.session.get(f"/v1/packages/{package_id}/archive{query}", headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        data = await answer.read()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {m.name: file.read() for m in archive if (file := archive.extractfile(m)) is not None}


async def test_a_package_comes_as_an_archive_by_the_bytes_of_its_paths(gateway: RunningGateway) -> None:
    package_id = await package(gateway)
    await send(gateway, package_id, tar_of(FILES))
    path = f"/v1/packages/{package_id}/archive"
    async with gateway.session.get(path) as answer:
        assert answer.status == 409
    digest = await finalized(gateway, package_id)
    found = await archived(gateway, package_id)
    assert found == FILES
    assert list(found) == sorted(FILES, key=str.encode)
    async with gateway.session.get(path) as answer:
        assert answer.headers["ETag"] == f'"tar-1:{digest}"'
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Content-Disposition"].startswith("attachment; ")
        first = await answer.read()
    async with gateway.session.get(path) as answer:
        assert await answer.read() == first
    async with gateway.session.get(path, headers={"If-None-Match": f'"tar-1:{digest}"'}) as answer:
        assert answer.status == 304
    async with gateway.session.head(path) as answer:
        assert answer.status == 200
    small = {name for name, data in FILES.items() if len(data) <= SMALL_FILE_BYTES}
    assert set(await archived(gateway, package_id, f"?largest={SMALL_FILE_BYTES}")) == small
    assert set(await archived(gateway, package_id, "?after=empty")) == {n for n in FILES if n.encode() > b"empty"}
    for query in ("?after=../x", "?largest=-1", "?largest=x"):
        async with gateway.session.get(path + query) as answer:
            assert answer.status == 400


async def test_files_are_ingested_by_name_once_their_bytes_are_there(gateway: RunningGateway) -> None:
    small = {name: data for name, data in FILES.items() if len(data) <= SMALL_FILE_BYTES}
    pack = blake3(b"".join(dict.fromkeys(small.values()))).hexdigest()
    alone = blake3(FILES["just above"]).hexdigest()
    asked = {"addresses": [f"blake3:{pack}", f"blake3:{alone}", f"blake3:{'0' * 64}"]}
    async with gateway.session.post("/v1/blobs/known", json=asked) as answer:
        assert await answer.json() == {"known": []}
    first = await send(gateway, await package(gateway), tar_of(FILES))
    async with gateway.session.post("/v1/blobs/known", json=asked) as answer:
        assert set((await answer.json())["known"]) == {f"blake3:{pack}", f"blake3:{alone}"}

    offsets: dict[bytes, int] = {}
    for data in small.values():
        offsets.setdefault(data, sum(map(len, offsets)))
    named = [
        {
            "relative_path": name,
            "media_type": "text/plain",
            "size_bytes": len(data),
            "content_address": f"blake3:{blake3(data).hexdigest()}",
            **({"blob": f"blake3:{pack}", "offset": offsets[data]} if name in small else {}),
        }
        for name, data in FILES.items()
        if name != "large.bin"
    ]
    package_id = await package(gateway)
    done = await _name(gateway, package_id, named, 201)
    before = {file["relative_path"]: file for file in first["files"]}
    for file in done["files"]:
        assert file["sha256"] == before[file["relative_path"]]["sha256"]
        assert await content(gateway, file["file_id"]) == FILES[file["relative_path"]]
    other = await package(gateway)
    for wrong in ({"offset": 1}, {"blob": f"blake3:{'0' * 64}"}, {"offset": 1 << 40}):
        problem = await _name(gateway, other, [{**named[0], **wrong}], 422)
        assert problem["type"].endswith(":unknown-content")
    for wrong in ({"content_address": "x"}, {"offset": -1}, {"size_bytes": "1"}, {"more": 1}):
        await _name(gateway, other, [{**named[0], **wrong}], 400)
    await _name(gateway, package_id, named, 409)
    await clean(gateway)


async def _name(gateway: RunningGateway, package_id: str, files: list[dict[str, Any]], status: int) -> dict[str, Any]:
    async with gateway.session.post(f"/v1/packages/{package_id}/files", json={"files": files}) as answer:
        found: dict[str, Any] = await answer.json(content_type=None)
        assert answer.status == status, found
        return found
