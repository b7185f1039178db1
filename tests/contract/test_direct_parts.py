"""Parts that clients send straight to the store: what an address allows, and what happens to wrong parts."""

from __future__ import annotations

import logging
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import aiohttp
import pytest
from yarl import URL

from artifact_store.errors import (
    ContentMismatchError,
    InvalidRequestError,
    UploadNotFoundError,
    UploadOffsetError,
)
from artifact_store.models import Declared
from services.blobs.port import DirectPart, PartAddress
from services.blobs.resumable.states import UploadState
from services.blobs.resumable.uploads import ResumableUploads
from services.blobs.s3.requests import CHECKSUM_CRC32, Endpoint, S3Requests
from services.blobs.s3.store import S3BlobStore
from services.config import Settings
from services.runtime.clock import system_clock
from services.wiring import open_blobs
from tests.buckets import Bucket, direct_settings
from tests.contract.blobs_stage import LIMIT, MUCH, PART, Stage, declared, endpoint, objects, s3_store, some_bytes
from tests.contract.resumable_stage import PACKAGE, Clock, CutError, Log, Scene, check_recorded, cut, new, send
from tests.services.minio import MinioServer
from tests.services.process import free_ports

pytestmark = [pytest.mark.services, MUCH]

_SAME_CRC = bytes([0x41, 0x06, 0x71, 0xDB, 0x01])
"""The generator of CRC-32, lowest bit first: added to bytes anywhere, it leaves their CRC-32 as it is."""

Sent = tuple[DirectPart, str]
Given = tuple[DirectPart, PartAddress]


def forged(data: bytes) -> bytes:
    """Other bytes with the same length and CRC-32."""
    found = bytes(a ^ b for a, b in zip(data[:5], _SAME_CRC, strict=True)) + data[5:]
    assert (found != data, len(found), zlib.crc32(found)) == (True, len(data), zlib.crc32(data))
    return found


@dataclass
class Direct:
    """A scene whose store clients can reach, and such a client."""

    scene: Scene
    session: aiohttp.ClientSession
    at: Endpoint

    async def begin(self, data: bytes, said: Declared | None = None, path: str = "a") -> UUID:
        """Begin an upload that takes parts from clients."""
        state = await self.scene.one.create(new(len(data), path=path, said=said))
        assert await self.scene.one.direct_part_bytes(state) == PART
        return state.upload_id

    async def ask(
        self, upload: UUID, data: bytes, offset: int, sent: Sequence[Sent] = (), *, count: int = 1_000
    ) -> tuple[UploadState, list[Given]]:
        """Name what was sent from the offset on, and ask for addresses of the next parts of the data."""
        end = offset + sum(part.length for part, _ in sent)
        wanted = [data[at : at + PART] for at in range(end, len(data), PART)][:count]
        lengths = [(len(part), zlib.crc32(part)) for part in wanted]
        return await self.scene.one.send_direct(PACKAGE, upload, offset, sent, lengths)

    async def put(self, given: Given, data: bytes) -> Sent:
        """Send a part, as it should be."""
        part, address = given
        async with self.session.put(
            URL(address.url, encoded=True), headers=address.headers, data=BytesIO(data)
        ) as response:
            assert response.status == 200, await response.text()
            return part, response.headers["ETag"]

    async def put_all(self, given: Sequence[Given], data: bytes, offset: int = 0) -> list[Sent]:
        """Send all parts, which follow each other from the offset on."""
        parts = [data[at : at + PART] for at in range(offset, len(data), PART)]
        return [await self.put(each, part) for each, part in zip(given, parts, strict=False)]

    async def status(self, method: str, url: str, data: bytes, **headers: str) -> int:
        """What the store answers to a request of one's own making."""
        async with self.session.request(
            method, URL(url, encoded=True), headers=headers, data=BytesIO(data)
        ) as response:
            return response.status


@pytest.fixture
def direct_bucket(any_s3_bucket: dict[str, Any]) -> Any:
    with direct_settings(any_s3_bucket) as public:
        yield {**any_s3_bucket, **public}


def public_of(settings: dict[str, Any]) -> Endpoint:
    """What signs for clients by these settings."""
    at, url = endpoint(settings), urlsplit(settings["s3_public_url"])
    if "s3_public_access_key" not in settings:
        return replace(at, host=url.netloc)
    keys = (settings["s3_public_access_key"], settings["s3_public_secret_key"])
    return replace(at, host=url.netloc, access_key=keys[0], secret_key=keys[1])


@pytest.fixture
async def direct(direct_bucket: dict[str, Any]) -> AsyncIterator[Direct]:
    at = endpoint(direct_bucket)
    stores = [s3_store(at, public=public_of(direct_bucket)) for _ in range(2)]
    log, clock = Log(), Clock()
    one, other = (
        ResumableUploads(store, check=log.check, record=log.record, max_file_bytes=LIMIT, clock=clock)
        for store in stores
    )
    stage = Stage(stores[0], lambda: objects(at), lambda _key, _data: None)
    async with aiohttp.ClientSession() as session:
        yield Direct(Scene(stage, log, clock, one, other, PART), session, at)
    for gateway, store in zip((one, other), stores, strict=True):
        await gateway.close()
        await store.close()


async def test_parts_that_clients_send_become_the_file_with_digests_of_what_was_read_back(direct: Direct) -> None:
    data = some_bytes(2 * PART + 4711)
    upload = await direct.begin(data, declared(data))
    state, given = await direct.ask(upload, data, 0, count=2)
    assert (state.offset, [part.length for part, _ in given]) == (0, [PART, PART])
    sent = await direct.put_all(given, data)
    state, given = await direct.ask(upload, data, 0, sent)
    assert (state.offset, [part.length for part, _ in given]) == (2 * PART, [4711])
    state, given = await direct.ask(upload, data, 2 * PART, await direct.put_all(given, data, 2 * PART))
    assert (state.complete, given) == (True, [])
    await check_recorded(direct.scene, data)
    assert direct.scene.log.blob().key.startswith("uploads/")


async def test_bytes_that_differ_in_length_or_checksum_are_refused_by_the_store(direct: Direct) -> None:
    data = some_bytes(PART + 100)
    upload = await direct.begin(data)
    _, ((part, address), _) = await direct.ask(upload, data, 0)
    wrong = bytes([data[0] ^ 1]) + data[1:PART]
    for tampered in (wrong, data[: PART - 1], data[: PART + 1]):
        headers = {**address.headers, "Content-Length": str(len(tampered))}
        assert await direct.status("PUT", address.url, tampered, **headers) in (400, 403)
        other = {**headers, CHECKSUM_CRC32: "AAAAAA=="}
        assert await direct.status("PUT", address.url, tampered, **other) in (400, 403)
    assert (await direct.scene.one.find(PACKAGE, upload)).offset == 0
    await direct.put((part, address), data[:PART])


@pytest.mark.parametrize(
    "says", [True, pytest.param(False, marks=pytest.mark.endurance)], ids=["declared", "undeclared"]
)
async def test_bytes_of_the_same_checksum_are_found_when_they_are_read_back(direct: Direct, says: bool) -> None:
    data = some_bytes(PART + 100)
    other = forged(data)
    upload = await direct.begin(data, declared(data) if says else None)
    _, given = await direct.ask(upload, data, 0)
    sent = await direct.put_all(given, other)
    if not says:
        await direct.ask(upload, data, 0, sent)
        await check_recorded(direct.scene, other)
        return
    with pytest.raises(ContentMismatchError):
        await direct.ask(upload, data, 0, sent)
    assert direct.scene.log.recorded == {}
    with pytest.raises(UploadNotFoundError):
        await direct.scene.one.find(PACKAGE, upload)
    assert {key for key in direct.scene.stage.holds() if not key.startswith("health/")} == set()


async def test_a_part_that_was_replaced_before_the_completion_is_not_taken(direct: Direct) -> None:
    """MinIO has only the later one, so that the upload ends; SeaweedFS keeps both, and takes the one that was named."""
    data = some_bytes(PART + 100)
    upload = await direct.begin(data)
    _, given = await direct.ask(upload, data, 0)
    sent = await direct.put_all(given, data)
    await direct.put(given[1], forged(data[PART:]))
    with suppress(UploadNotFoundError):
        await direct.ask(upload, data, 0, sent)
        await check_recorded(direct.scene, data)
        return
    assert direct.scene.log.recorded == {}


async def test_an_address_replaces_nothing_once_the_upload_is_complete(direct: Direct) -> None:
    data = some_bytes(PART + 100)
    upload = await direct.begin(data, declared(data))
    _, given = await direct.ask(upload, data, 0)
    await direct.ask(upload, data, 0, await direct.put_all(given, data))
    for (_, address), part in zip(given, (data[:PART], data[PART:]), strict=True):
        assert await direct.status("PUT", address.url, forged(part), **address.headers) == 404
    await check_recorded(direct.scene, data)


async def test_an_abandoned_upload_leaves_nothing_and_its_addresses_are_dead(direct: Direct) -> None:
    data = some_bytes(PART + 100)
    upload = await direct.begin(data)
    _, given = await direct.ask(upload, data, 0)
    await direct.put(given[0], data[:PART])
    direct.scene.clock.now += timedelta(days=1, seconds=1)
    assert await direct.scene.sweep() == 1
    with pytest.raises(UploadNotFoundError):
        await direct.scene.one.find(PACKAGE, upload)
    assert await direct.status("PUT", given[1][1].url, data[PART:], **given[1][1].headers) == 404
    assert {key for key in direct.scene.stage.holds() if not key.startswith("health/")} == set()


async def test_an_address_grants_one_part_for_a_while_and_nothing_else(
    direct: Direct, direct_bucket: dict[str, Any]
) -> None:
    data = some_bytes(PART + 100)
    other = await direct.begin(data, path="b")
    _, foreign = await direct.ask(other, data, 0)
    upload = await direct.begin(data)
    _, given = await direct.ask(upload, data, 0)
    url, headers, piece = given[0][1].url, given[0][1].headers, data[:PART]
    where, _, query = url.partition("?")
    another_key = foreign[0][1].url.partition("?")[0]
    for method, changed in (
        ("PUT", f"{another_key}?{query}"),
        ("PUT", url.replace("partNumber=1", "partNumber=2")),
        ("PUT", f"{where}?{query.partition('&uploadId')[0]}&{query.partition('&')[2].partition('&')[2]}"),
        ("PUT", f"{url}&versionId=1"),
        ("PUT", url.replace("X-Amz-Expires=900", "X-Amz-Expires=90000")),
        ("GET", url),
        ("DELETE", url),
        ("POST", url),
    ):
        assert await direct.status(method, changed, piece, **headers) in (400, 403), changed
    store = direct.scene.stage.store
    await store.put_object("snapshots/secret", b"nobody's business")
    for source in ("snapshots/secret", "health/write-probe", foreign[0][1].url):
        copying = {**headers, "x-amz-copy-source": f"/{direct.at.bucket}/{source}"}
        assert await direct.status("PUT", url, piece, **copying) == 403
    # An address of an hour ago.
    requests = S3Requests(public_of(direct_bucket))
    asked = {"partNumber": "1", "uploadId": url.partition("uploadId=")[2].partition("&")[0]}
    long_ago = store.clock.now() - timedelta(hours=1)
    key = urlsplit(where).path.removeprefix(f"/{direct.at.bucket}/")
    expired = requests.presign(key, asked, headers, 900, long_ago)
    assert await direct.status("PUT", expired, piece, **headers) == 403
    await requests.close()
    await direct.put(given[0], piece)


async def test_what_is_said_of_parts_must_fit(direct: Direct) -> None:
    data = some_bytes(2 * PART + 100)
    upload = await direct.begin(data)
    _, given = await direct.ask(upload, data, 0)
    (first, etag), (second, _) = await direct.put_all(given[:2], data)
    one = direct.scene.one
    for sent, wanted in (
        ([(replace(first, length=PART - 1), etag)], []),
        ([(replace(first, number=99), etag)], []),
        ([(second, etag), (first, etag)], []),
        ([], [(PART, 0), (PART, 0), (101, 0)]),
        ([], [(PART, 0), (PART, 0), (100, 0), (0, 0)]),
    ):
        with pytest.raises(InvalidRequestError):
            await one.send_direct(PACKAGE, upload, 0, sent, wanted)
    with pytest.raises(UploadOffsetError):
        await one.send_direct(PACKAGE, upload, PART, [], [])
    assert (await one.find(PACKAGE, upload)).offset == 0


@pytest.mark.endurance
async def test_gateways_and_the_store_take_turns_with_the_parts_of_one_upload(direct: Direct) -> None:
    data = some_bytes(4 * PART + 100)
    upload = await direct.begin(data, declared(data))
    await send(direct.scene.other, upload, data, 0, PART)
    _, given = await direct.ask(upload, data, PART, count=2)
    sent = await direct.put_all(given[:1], data, PART)
    await direct.ask(upload, data, PART, sent, count=0)
    await send(direct.scene.other, upload, data, 2 * PART, 3 * PART)
    # The address that was given before may be used late: it is that of a number which nobody else has.
    await direct.put(given[1], data[2 * PART : 3 * PART])
    _, given = await direct.ask(upload, data, 3 * PART)
    await direct.ask(upload, data, 3 * PART, await direct.put_all(given, data, 3 * PART))
    await check_recorded(direct.scene, data)


@pytest.mark.endurance
async def test_bytes_behind_the_last_whole_part_keep_an_upload_at_the_gateways(direct: Direct) -> None:
    data = some_bytes(2 * PART)
    upload = await direct.begin(data)
    with pytest.raises(CutError):
        await direct.scene.one.append(PACKAGE, upload, 0, cut(data[: PART + 1]))
    state = await direct.scene.one.find(PACKAGE, upload)
    assert (state.offset, await direct.scene.one.direct_part_bytes(state)) == (PART + 1, None)
    assert await direct.scene.one.send_direct(PACKAGE, upload, PART + 1, [], [(PART - 1, 0)]) == (state, [])
    await send(direct.scene.one, upload, data, PART + 1, 2 * PART)
    await check_recorded(direct.scene, data)


@pytest.mark.endurance
async def test_a_wrong_clock_of_the_gateway_does_not_matter(direct_bucket: dict[str, Any]) -> None:
    public = public_of(direct_bucket)
    store = s3_store(endpoint(direct_bucket), public=public, own_clock=lambda: system_clock() - 3600 * 1_000_000)
    await assert_usable(store, True)


@pytest.mark.endurance
@pytest.mark.parametrize("wrong", ["region", "secret", "unreachable"])
async def test_a_store_that_clients_could_not_use_is_found_before_one_is_sent_to_it(
    s3_bucket: dict[str, Any], caplog: pytest.LogCaptureFixture, wrong: str
) -> None:
    changes: dict[str, dict[str, Any]] = {
        "region": {"region": "mars-west-1"},
        "secret": {"secret_key": "another-secret"},
        "unreachable": {"host": f"127.0.0.1:{free_ports(1)[0]}"},
    }
    with direct_settings(s3_bucket) as public:
        at = replace(public_of({**s3_bucket, **public}), **changes[wrong])
        with caplog.at_level(logging.WARNING):
            await assert_usable(s3_store(endpoint(s3_bucket), public=at), False)
    assert "large files come through the gateways" in caplog.text


async def test_a_key_by_which_a_part_could_become_a_copy_of_any_object_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """MinIO takes headers that were not signed: there, the gateway's own key must not sign for clients."""
    with (
        MinioServer(tmp_path / "minio") as server,
        Bucket(server.endpoint, server.access_key, server.secret_key, server.region) as bucket,
    ):
        store = open_blobs(Settings(**bucket.settings, s3_public_url=f"http://{server.endpoint}"))
        assert isinstance(store, S3BlobStore)
        with caplog.at_level(logging.WARNING):
            await assert_usable(store, False)
    assert "s3-direct.json" in caplog.text


async def assert_usable(store: S3BlobStore, expected: bool) -> None:
    """Whether clients are sent to the store, and that this leaves nothing behind."""
    try:
        uploads = ResumableUploads(store, check=Log().check, record=Log().record, max_file_bytes=LIMIT)
        begun = await uploads.create(new(1 << 30))
        assert (await uploads.direct_part_bytes(begun) is not None) == expected
        await uploads.remove(PACKAGE, begun.upload_id)
        assert await store.list_objects("resumable/") == []
    finally:
        await store.close()
