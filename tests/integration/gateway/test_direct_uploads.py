"""Large files straight to the store: which connection carries their bytes, and what happens without the store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from blake3 import blake3

import artifact_store.client.client
from artifact_store import Client, RetryPolicy
from artifact_store.byte_streams import joined
from artifact_store.documents.resumable_uploads import TUS_RESUMABLE, UPLOAD_LENGTH, UPLOAD_METADATA, encode_metadata
from artifact_store.models import Declared
from artifact_store.transfers.push import push
from services.blobs.port import PartsKey
from services.config import Settings
from tests.buckets import direct_settings
from tests.contract.blobs_stage import some_bytes
from tests.integration.gateway.cutting_proxy import CuttingProxy, cutting_proxy
from tests.integration.http_gateway import RunningGateway, running_gateway

pytestmark = pytest.mark.services

MIB = 1 << 20
QUICK = RetryPolicy(first_pause_seconds=0.01, longest_pause_seconds=0.1)


@pytest.fixture(autouse=True)
def _small_files_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_store.client.client, "RESUMABLE_BYTES", MIB)


@pytest.fixture(params=["s3_bucket", pytest.param("seaweed_bucket", marks=pytest.mark.endurance)])
def direct(request: pytest.FixtureRequest, embedded_settings: Settings) -> Iterator[Settings]:
    """A gateway's settings with a store that clients can reach."""
    bucket: dict[str, Any] = request.getfixturevalue(request.param)
    with direct_settings(bucket) as public:
        yield Settings(**{**vars(embedded_settings), **bucket, **public})


@dataclass
class Lines:
    """A gateway, a client, and what goes over its two lines."""

    gateway: RunningGateway
    client: Client
    to_gateway: CuttingProxy
    to_store: CuttingProxy

    async def ingest(self, data: bytes, path: str = "a") -> None:
        """Send a file, and see that it arrived."""
        package = await self.client.create_package("n", "p", "s", "scratch")
        declared = Declared(len(data), blake3(data).digest())
        file_id = await self.client.ingest_file(package, path, "text/plain", data, declared=declared)
        assert await joined(await self.gateway.parts.registry.get_file(file_id)) == data


@asynccontextmanager
async def lines(settings: Settings, store_takes: Callable[[], int | None] = lambda: None) -> AsyncIterator[Lines]:
    """Both lines; each of the client's connections to the store breaks once it has taken so many bytes."""
    port = urlsplit(settings.blobs_url).port
    assert port is not None
    checked = False
    async with cutting_proxy(port, lambda: store_takes() if checked else None) as to_store:
        public = replace(settings, s3_public_url=to_store.url)
        async with (
            running_gateway(public) as gateway,
            cutting_proxy(gateway.port, lambda: None) as to_gateway,
            Client(to_gateway.url, QUICK) as client,
        ):
            checked = await gateway.parts.blobs.parts.takes_direct(PartsKey(uuid4(), "any/upload"))
            assert checked
            yield Lines(gateway, client, to_gateway, to_store)


async def test_a_pushed_file_goes_straight_to_the_store_once(direct: Settings, tmp_path: Path) -> None:
    data = some_bytes(20 * MIB + 5)
    (tmp_path / "large.bin").write_bytes(data)
    async with lines(direct) as found:
        pushed = await push(
            found.client, tmp_path / "large.bin", name="n", producer="p", subject="s", retention_class="scratch"
        )
        registry = found.gateway.parts.registry
        (file,) = (await registry.list_files(pushed.package_id)).items
        assert await joined(await registry.get_file(file.file_id)) == data
        assert found.to_gateway.passed < MIB
        assert len(data) <= found.to_store.passed < len(data) + MIB


async def test_what_the_line_to_the_store_breaks_goes_through_the_gateway(direct: Settings) -> None:
    data = some_bytes(20 * MIB + 5)
    async with lines(direct, lambda: MIB) as found:
        await found.ingest(data)
        assert found.to_store.cuts > 0
        assert found.to_gateway.passed > len(data)
        tried = found.to_store.passed
        await found.ingest(data[::-1], "b")
        assert found.to_store.passed == tried, "a store that took nothing is left alone for a while"


@pytest.mark.endurance
async def test_parts_that_arrived_stay_when_the_line_to_the_store_breaks(direct: Settings) -> None:
    data = some_bytes(40 * MIB + 5)
    allowed = iter([12 * MIB])
    async with lines(direct, lambda: next(allowed, 4096)) as found:
        await found.ingest(data)
        assert found.to_store.cuts > 0
        assert MIB < found.to_gateway.passed < len(data), "only what was missing went there"


async def test_bytes_on_their_way_to_the_store_count_for_quotas(direct: Settings) -> None:
    data = some_bytes(20 * MIB)
    async with running_gateway(direct, quotas={"bytes": 10 * MIB}) as gateway:
        package = await gateway.parts.registry.create_package("n", "p", "s", "scratch")
        said = {"relative_path": "a", "media_type": "text/plain"}
        headers = {TUS_RESUMABLE: "1.0.0", UPLOAD_LENGTH: str(len(data)), UPLOAD_METADATA: encode_metadata(said)}
        async with gateway.session.post(f"/v1/packages/{package}/uploads", headers=headers) as begun:
            assert (begun.status, begun.headers["Upload-Direct"]) == (201, str(8 * MIB))
            upload = begun.headers["Location"]
        wanted = [{"length": 8 * MIB, "crc32": 0}, {"length": 8 * MIB, "crc32": 0}]
        async with gateway.session.post(f"{upload}/parts", json={"offset": 0, "wanted": wanted}) as given:
            assert given.status == 200
            assert [part["number"] for part in (await given.json())["parts"]] == [1, 2]
        async with gateway.session.post(f"{upload}/parts", json={"offset": 0, "wanted": wanted}) as refused:
            assert refused.status == 429
