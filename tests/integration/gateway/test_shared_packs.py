"""Files of several packages that are sent at the same time share objects, and otherwise are like any others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from uuid import UUID

import pytest

from artifact_store import Client
from artifact_store.archives.bundle import SMALL_FILE_BYTES
from artifact_store.errors import ContentMismatchError, CorruptError
from artifact_store.events import FileIngested
from artifact_store.models import Declared
from services.blobs.packs import SALT_BYTES
from services.config import Settings
from services.core.decide import IngestCheck
from services.verify import Report, verify
from tests.integration.http_gateway import RunningGateway, running_gateway
from tests.integration.processes import output_of

FILES = 64
CLASSES = ("scratch", "scratch", "raw-evidence")


@pytest.fixture(params=["embedded", pytest.param("real", marks=[pytest.mark.services, pytest.mark.processes])])
def settings(request: pytest.FixtureRequest) -> Settings:
    found: Settings = request.getfixturevalue(f"{request.param}_settings")
    return found


@pytest.fixture
async def gateway(settings: Settings) -> AsyncIterator[RunningGateway]:
    await asyncio.to_thread(output_of, settings, "migrate")
    async with running_gateway(settings, wait_seconds=30.0) as running:
        yield running


async def checked(gateway: RunningGateway) -> Report:
    return await verify(gateway.parts.log, gateway.parts.blobs, gateway.parts.views, check_bytes=True)


async def test_files_of_several_packages_share_objects_by_retention_class(gateway: RunningGateway) -> None:
    draw = Random(17)
    contents = [draw.randbytes(draw.randrange(1, 20_000)) for _ in range(FILES)]
    wrong = Declared(len(contents[5]), blake3=bytes(32))
    async with Client(gateway.url) as client:
        packages = [await client.create_package(f"p{n}", "lab", "s", kept) for n, kept in enumerate(CLASSES)]

        async def send(number: int) -> UUID:
            package, said = packages[number % len(packages)], wrong if number == 5 else None
            return await client.ingest_file(package, f"{number}.bin", "x/y", contents[number], declared=said)

        # Each package's first file is asked about, one package after the other: they are not together yet.
        sent: list[UUID | BaseException] = [await send(number) for number in range(len(packages))]
        sent += await asyncio.gather(*map(send, range(len(packages), FILES)), return_exceptions=True)
        assert isinstance(sent[5], ContentMismatchError)
        files = {number: id_ for number, id_ in enumerate(sent) if isinstance(id_, UUID)}
        assert len(files) == FILES - 1
        for number, id_ in files.items():
            assert b"".join([piece async for piece in await client.get_file(id_)]) == contents[number]
        for package in packages:
            await client.finalize_package(package)

        events = [event async for event in client.read_events()]
        receipts = {event.payload.file_id: event for event in events if isinstance(event.payload, FileIngested)}
        assert set(receipts) == set(files.values())
        objects = [set[str](), set[str](), set[str]()]
        for event in receipts.values():
            assert isinstance(event.payload, FileIngested)
            objects[packages.index(event.package_id)].add(event.payload.receipt.key)
    first, second, evidence = objects
    assert first & second, "packages of one class have no object in common"
    assert not evidence & (first | second), "objects hold files of two retention classes"
    assert len(first | second | evidence) < FILES // 2
    report = await checked(gateway)
    assert report.violations == []
    ends = (report.bytes or 0) - sum(len(contents[number]) for number in files)
    assert 0 < ends <= len(first | second | evidence) * SALT_BYTES


async def test_damage_in_a_shared_object_costs_one_file_and_is_healed_by_its_bytes(
    embedded_settings: Settings, tmp_path: Path
) -> None:
    contents = [b"content %d " % number * 100 for number in range(16)]
    async with running_gateway(embedded_settings) as gateway, Client(gateway.url) as client:
        package = await client.create_package("p", "lab", "s", "scratch")
        files = await asyncio.gather(
            *(client.ingest_file(package, f"{n}.bin", "x/y", data) for n, data in enumerate(contents))
        )
        events = [event.payload async for event in client.read_events()]
        receipts = {event.file_id: event.receipt for event in events if isinstance(event, FileIngested)}
        hit = next(number for number, id_ in enumerate(files) if receipts[id_].offset > 0)
        shared = tmp_path / "blobs" / receipts[files[hit]].key
        data = bytearray(shared.read_bytes())
        data[receipts[files[hit]].offset] ^= 1
        shared.write_bytes(data)

        async def read(number: int) -> bytes:
            return b"".join([piece async for piece in await client.get_file(files[number])])

        with pytest.raises(CorruptError):
            await read(hit)
        assert [await read(n) for n in range(16) if n != hit] == [data for n, data in enumerate(contents) if n != hit]
        found = await checked(gateway)
        assert [violation.kind for violation in found.violations] == ["blob-damaged"]
        assert list(found.set_aside) == [receipts[files[hit]].key]
        assert [await read(n) for n in range(16) if n != hit] == [data for n, data in enumerate(contents) if n != hit]

        other = await client.create_package("q", "lab", "s", "scratch")
        await client.ingest_file(other, "again.bin", "x/y", contents[hit])
        assert await read(hit) == contents[hit]
        healed = await checked(gateway)
        assert (healed.violations, healed.healed > 0) == ([], True)


async def test_the_writer_is_not_asked_about_each_small_file(
    embedded_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is refused is asked about again: of what nobody takes, one body lies in the store at most."""
    async with running_gateway(embedded_settings) as gateway:
        writer, asked = gateway.parts.writer, list[tuple[UUID, str]]()
        check = writer.check_ingest

        async def noted(question: IngestCheck) -> str | None:
            asked.append((question.package_id, question.relative_paths[0]))
            return await check(question)

        monkeypatch.setattr(writer, "check_ingest", noted)
        package, other = [
            await gateway.parts.registry.create_package(name, "lab", "s", "scratch") for name in ("p", "q")
        ]

        async def put(package: UUID, path: str, data: bytes, **headers: str) -> int:
            url = f"/v1/packages/{package}/files/{path}"
            async with gateway.session.put(url, data=data, headers=headers) as answer:
                return answer.status

        for number in range(5):
            assert await put(package, f"{number}", b"%d" % number) == 201
        assert asked == [(package, "0")]
        assert [await put(package, "0", b"refused %d" % number) for number in range(5)] == [409] * 5
        assert asked[1:] == [(package, "0")] * 4
        stored = {path.read_bytes() for path in (tmp_path / "blobs" / "blobs").rglob("*") if path.is_file()}
        assert stored == {b"0", b"1", b"2", b"3", b"4", b"refused 0"}

        asked.clear()
        assert await put(package, "5", b"5") == 201
        assert await put(package, "6", b"6") == 201
        assert await put(package, "7", b"7", **{"X-Actor": "another"}) == 201
        assert await put(other, "0", b"0") == 201
        assert await put(package, "large", bytes(SMALL_FILE_BYTES + 1)) == 201
        assert asked == [(package, "5"), (package, "7"), (other, "0"), (package, "large")]
