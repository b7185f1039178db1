"""Interrupted uploads continue: with a foreign tus client and ours, at another gateway, after processes died."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from blake3 import blake3
from tusclient.client import TusClient
from tusclient.exceptions import TusUploadFailed
from tusclient.uploader.uploader import Uploader

import artifact_store.client.client
from artifact_store import Client, RetryPolicy
from artifact_store.byte_streams import joined
from artifact_store.client.bodies import CountedSource, FileSource, FileStamp
from artifact_store.errors import CommandReusedError
from artifact_store.events import FileIngested
from artifact_store.models import Declared
from services.blobs.s3.store import S3BlobStore
from services.config import Settings
from services.wiring import open_blobs
from tests.contract.blobs_stage import endpoint, objects, some_bytes
from tests.integration.conditions import until
from tests.integration.gateway.cutting_proxy import cutting_proxy
from tests.integration.http_gateway import running_gateway
from tests.integration.processes import (
    COMMAND,
    ProductProcess,
    command_environment,
    output_of,
    run_command,
    serving,
)
from tests.services.process import free_ports

MIB = 1 << 20
ABOUT = ("--name", "n", "--producer", "p", "--subject", "s", "--retention-class", "scratch")


def tus(url: str, package: UUID | str, data: bytes, path: str, **options: Any) -> Uploader:
    """tuspy with this file at hand, which tries again and again."""
    client = TusClient(f"{url}/v1/packages/{package}/uploads")
    options = {"retries": 200, "retry_delay": 0.02, **options}
    return client.uploader(file_stream=io.BytesIO(data), metadata={"filename": path}, **options)


async def assert_clean(settings: Settings) -> None:
    """`verify` finds nothing wrong, every byte of every blob included."""
    checked = await asyncio.to_thread(run_command, settings, "verify", "--bytes", "--json")
    assert checked.returncode == 0, checked.stdout


async def assert_nothing_left(settings: Settings, keys: set[str]) -> None:
    """A day later, sweeping leaves the files' blobs alone in the store."""
    store = open_blobs(settings)
    try:
        await store.sweep(now=datetime.now(UTC) + timedelta(days=1, minutes=1))
        assert await store.list_objects("resumable/") == []
        if isinstance(store, S3BlobStore):
            found = objects(endpoint({**vars(settings), "s3_secret_key": settings.s3_secret_key.get_secret_value()}))
            assert not keys or {key for key in found if not key.startswith(("health/", "snapshots/"))} == keys
    finally:
        await store.close()


@pytest.mark.parametrize("chunk_size", [sys.maxsize, 3 * MIB], ids=["whole", "chunks"])
@pytest.mark.parametrize("checksum", [False, True], ids=["plain", "checksum"])
async def test_a_foreign_client_that_is_cut_off_again_and_again_gets_its_file_in(
    embedded_settings: Settings, chunk_size: int, checksum: bool
) -> None:
    if checksum:
        chunk_size = min(chunk_size, MIB)  # a piece with a checksum is taken whole or not at all
    rng = random.Random(chunk_size)
    data = some_bytes(20 * MIB + 5)
    async with (
        running_gateway(embedded_settings) as gateway,
        cutting_proxy(gateway.port, lambda: rng.randrange(2_000, 4 * MIB)) as proxy,
    ):
        package = await gateway.parts.registry.create_package("n", "p", "s", "scratch")
        uploader = tus(proxy.url, package, data, "a", chunk_size=chunk_size, upload_checksum=checksum)
        await asyncio.to_thread(uploader.upload)
        assert proxy.cuts >= 3
        file = await gateway.parts.registry.get_file_at(package, "a")
        assert (file.blake3, file.sha256) == (blake3(data).digest(), hashlib.sha256(data).digest())
        assert await joined(await gateway.parts.registry.get_file(file.file_id)) == data
        await gateway.parts.registry.finalize_package(package)
    await assert_clean(embedded_settings)
    await assert_nothing_left(embedded_settings, set())


async def test_our_client_sends_no_byte_twice_that_has_arrived(
    embedded_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact_store.client.client, "RESUMABLE_BYTES", MIB)
    path = tmp_path / "large.bin"
    data = some_bytes(40 * MIB)
    path.write_bytes(data)
    rng = random.Random(5)
    progress: list[int] = []
    command = uuid4()
    policy = RetryPolicy(first_pause_seconds=0.01, longest_pause_seconds=0.1)
    async with (
        running_gateway(embedded_settings) as gateway,
        cutting_proxy(gateway.port, lambda: rng.randrange(2 * MIB, 15 * MIB)) as proxy,
        Client(proxy.url, policy) as registry,
    ):
        package = await registry.create_package("n", "p", "s", "scratch")

        async def ingest() -> UUID:
            source = CountedSource(FileSource(path, FileStamp.of(path.stat())), progress.append)
            done = await registry.ingest(package, "a", "x/y", source, "me", declared=Declared(), command_id=command)
            return done.files[0].file_id

        file_id = await ingest()
        assert proxy.cuts >= 2
        assert proxy.passed < len(data) + proxy.cuts * 2 * MIB
        assert sum(progress) == len(data)
        assert await joined(await registry.get_file(file_id)) == data
        before = proxy.passed
        assert await ingest() == file_id, "a repeat answers as the first did"
        assert proxy.passed - before < MIB
        path.write_bytes(data[:-1] + b"x")
        with pytest.raises(CommandReusedError):
            await ingest()
    await assert_clean(embedded_settings)


@pytest.mark.processes
async def test_a_push_that_was_killed_goes_on_where_it_stopped(embedded_settings: Settings, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    data = some_bytes(100 * MIB)
    (tree / "large.bin").write_bytes(data)
    (tree / "small").write_bytes(b"small")
    with serving(embedded_settings, tmp_path) as server:
        async with cutting_proxy(server.port, lambda: None) as proxy:
            environment = command_environment(None, proxy.url, tmp_path / "home")
            command = [*COMMAND, "push", str(tree), *ABOUT, "--json"]
            proxy.stall_at = 80 * MIB
            with subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ) as first:
                await proxy.stalled.wait()
                first.send_signal(signal.SIGKILL)
            proxy.go.set()
            again = await asyncio.create_subprocess_exec(
                *command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            output, said = await again.communicate()
            assert again.returncode == 0, said.decode()
            assert b"was interrupted" in said
            assert proxy.passed < len(data) + 32 * MIB
        pushed = json.loads(output)
        there = tmp_path / "pulled"
        output_of(None, "pull", pushed["package_id"], there, url=server.endpoint)
    assert (there / "large.bin").read_bytes() == data
    assert pushed["files"] == 2
    await assert_clean(embedded_settings)
    await assert_nothing_left(embedded_settings, set())


@pytest.mark.services
@pytest.mark.processes
async def test_another_gateway_goes_on_with_an_upload_whose_gateway_was_killed(
    real_settings: Settings, tmp_path: Path
) -> None:
    output_of(real_settings, "migrate")
    data = some_bytes(50 * MIB + 77)
    ports = free_ports(2)
    one, two = (ProductProcess(real_settings, tmp_path / str(port), "gateway", port=port) for port in ports)
    with one, two, ProductProcess(real_settings, tmp_path / "registry", "projector", "registry", listens=False):
        async with Client(two.endpoint) as registry, cutting_proxy(one.port, lambda: None) as proxy:
            package = await registry.create_package("n", "p", "s", "scratch")
            uploader = tus(proxy.url, package, data, "a", retries=0)
            uploader.chunk_size = 10 * MIB
            await asyncio.to_thread(uploader.upload_chunk)
            proxy.stall_at = proxy.passed + 25 * MIB
            uploader.chunk_size = len(data)
            sending = asyncio.create_task(asyncio.to_thread(uploader.upload))
            await proxy.stalled.wait()
            one.kill()
            proxy.go.set()
            with pytest.raises(TusUploadFailed):
                await sending
            there = str(uploader.url).replace(proxy.url, two.endpoint)
            after = tus(two.endpoint, package, data, "a", retry_delay=0.5)
            after.set_url(there)
            at = after.get_offset()
            assert at >= 10 * MIB
            after.offset = at
            await asyncio.to_thread(after.upload, len(data) - 9 * MIB)
            one.restart()
            last = tus(one.endpoint, package, data, "a")
            last.set_url(there.replace(two.endpoint, one.endpoint))
            last.offset = last.get_offset()
            await asyncio.to_thread(last.upload)
            file = await registry.get_file_at(package, "a")
            assert (file.blake3, file.sha256) == (blake3(data).digest(), hashlib.sha256(data).digest())
            assert await joined(await registry.get_file(file.file_id)) == data
            sequence = (await registry.get_package(package)).last_event_sequence
            assert sequence == 2

            async def projected() -> bool:
                return (await registry.get_package(package, wait_sequence=2)).last_event_sequence == 2

            await until(projected, 30, "the view never showed the file")
    await assert_nothing_left(real_settings, set())


@pytest.mark.endurance
@pytest.mark.services
@pytest.mark.timeout(1800)
async def test_a_thousand_uploads_each_cut_at_a_random_byte_end_whole(real_settings: Settings, tmp_path: Path) -> None:
    """Seeded by UPLOADS_SEED; UPLOADS says how many."""
    seed, count = int(os.environ.get("UPLOADS_SEED", "1")), int(os.environ.get("UPLOADS", "1000"))
    rng = random.Random(seed)
    output_of(real_settings, "migrate")
    sizes = [rng.randrange(1, 300_000) if rng.random() < 0.93 else rng.randrange(MIB, 20 * MIB) for _ in range(count)]
    with ProductProcess(real_settings, tmp_path / "gateway", "gateway") as gateway:
        turns = asyncio.Semaphore(4)
        async with Client(gateway.endpoint) as registry:
            package = await registry.create_package("n", "p", "s", "scratch")

            async def upload(number: int, size: int) -> tuple[str, tuple[bytes, bytes]]:
                data = random.Random(f"{seed}-{number}").randbytes(size)
                cut_at: list[int | None] = [None, rng.randrange(size) + 1_000]  # behind the creation
                async with turns, cutting_proxy(gateway.port, lambda: cut_at.pop(0) if cut_at else None) as proxy:
                    await asyncio.to_thread(tus(proxy.url, package, data, f"{number:04d}").upload)
                return f"{number:04d}", (blake3(data).digest(), hashlib.sha256(data).digest())

            expected = await asyncio.gather(*(upload(number, size) for number, size in enumerate(sizes)))
            files = [e.payload async for e in registry.read_events(package_id=package) if e.sequence > 1]
            await registry.finalize_package(package)
    found = {file.relative_path: (file.blake3, file.sha256) for file in files if isinstance(file, FileIngested)}
    assert len(files) == len(found) == count
    assert found == dict(expected)
    await assert_clean(real_settings)
    await assert_nothing_left(real_settings, {file.receipt.key for file in files if isinstance(file, FileIngested)})
