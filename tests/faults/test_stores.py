"""A blob store stops, freezes, slows down or fills up during uploads of every kind.

Clients get an acknowledgement or a problem that says what to do, only stored files are acknowledged, and the gateway
recovers by itself.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from time import monotonic

import pytest
from minio import MinioAdmin
from minio.credentials.providers import StaticProvider

from ingest_gateway.health import CHECK_SECONDS, FRESH_SECONDS
from services.config import Settings
from tests.faults.store_uploads import Stage, Upload, stage_on
from tests.integration.conditions import until
from tests.services.minio import MinioServer

pytestmark = [pytest.mark.services, pytest.mark.processes]

SEED = int(os.environ.get("FAULT_SEED", random.randrange(1 << 32)))
ROUNDS = 10
GIVEN_UP_SECONDS = 30.0
"""A store that refuses connections, or says that it is full, is not waited for; the rest is for a busy machine."""


@pytest.fixture(scope="module")
def minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MinioServer]:
    with MinioServer(tmp_path_factory.mktemp("minio")) as server:
        yield server


@pytest.fixture
async def stage(minio: MinioServer, embedded_settings: Settings) -> AsyncIterator[Stage]:
    async with stage_on(minio, embedded_settings) as opened:
        yield opened


class SmallDisk(MinioServer):
    """MinIO on a disk of little more than the 1 GiB that it wants to see free before it begins a multipart upload."""

    def command(self) -> list[str]:
        mount = f"mount -t tmpfs -o size=1200m none {self.folder / 'data'}"
        return ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh", *super().command()]

    @property
    def ballast(self) -> Path:
        """A file on that disk, which no other process sees mounted."""
        return Path(f"/proc/{self.pid}/root{self.folder}/data/ballast")

    def fill(self) -> None:
        """Leave less than the hundredth that MinIO keeps free, and more than it writes meanwhile by itself."""
        with self.ballast.open("wb") as file:
            space = os.statvfs(file.fileno())
            os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize - (6 << 20))


class Quota:
    """The bucket's quota: a byte of it makes MinIO refuse whatever comes, as it does on a full disk."""

    def __init__(self, stage: Stage) -> None:
        keys = StaticProvider(stage.minio.access_key, stage.minio.secret_key)
        self._admin = MinioAdmin(endpoint=stage.minio.endpoint, credentials=keys, secure=False)
        self._bucket = stage.at.bucket

    async def use_up(self) -> None:
        await asyncio.to_thread(self._admin.bucket_quota_set, self._bucket, 1)

    async def lift(self) -> None:
        await asyncio.to_thread(self._admin.bucket_quota_clear, self._bucket)


async def readiness(stage: Stage) -> tuple[int, str]:
    async with stage.gateway.session.get("/readyz") as answer:
        return answer.status, await answer.text()


async def assert_given_up(
    stage: Stage,
    uploads: Sequence[Upload],
    tasks: Sequence[asyncio.Task[None]],
    go_on: asyncio.Event,
    problem: str,
    unready: str,
) -> None:
    """Let uploads go on with a store that takes nothing: each is told so in time, and so is who asks for readiness."""
    began = monotonic()
    go_on.set()
    await asyncio.gather(*tasks)
    assert monotonic() - began < GIVEN_UP_SECONDS
    for upload in uploads:
        assert upload.acknowledged is None
        assert problem in upload.problems[0]["detail"]

    async def told() -> bool:
        status, why = await readiness(stage)
        return (status, unready in why) == (503, True)

    # What was found a moment before is still told.
    await until(told, FRESH_SECONDS + CHECK_SECONDS, "the gateway seems ready")


async def test_a_store_that_stops_in_the_middle_of_uploads(stage: Stage) -> None:
    uploads, go_on = await stage.uploads(), asyncio.Event()
    tasks = await stage.send(uploads, go_on)
    await asyncio.to_thread(stage.minio.kill)
    await assert_given_up(stage, uploads, tasks, go_on, "blob store", "blob store")
    await asyncio.to_thread(stage.minio.start)
    await stage.send_again(uploads)
    await stage.hold_to_promises(uploads)


async def test_a_store_that_restarts_in_the_middle_of_uploads_is_hardly_noticed(stage: Stage) -> None:
    uploads, go_on = await stage.uploads(), asyncio.Event()
    tasks = await stage.send(uploads, go_on)
    await stage.proxy.quiet()  # a request that is cut off, and its retries, have no second until the store is back
    await asyncio.to_thread(stage.minio.restart)
    go_on.set()
    await asyncio.gather(*tasks)
    assert [upload.problems for upload in uploads if upload.problems] == []
    await stage.hold_to_promises(uploads)


async def test_a_store_that_freezes_for_a_while_only_delays_uploads(stage: Stage) -> None:
    uploads, go_on = await stage.uploads(), asyncio.Event()
    tasks = await stage.send(uploads, go_on)
    with stage.proxy.silent():
        go_on.set()
        await asyncio.wait(tasks, timeout=2.0)
        assert [upload.path for upload in uploads if upload.acknowledged or upload.problems] == []
    await asyncio.gather(*tasks)
    assert [upload.problems for upload in uploads if upload.problems] == []
    await stage.hold_to_promises(uploads)


async def test_a_store_that_turns_slow_is_waited_for(stage: Stage) -> None:
    uploads, go_on = await stage.uploads(), asyncio.Event()
    tasks = await stage.send(uploads, go_on)
    with stage.proxy.slow(0.2):
        go_on.set()
        await asyncio.gather(*tasks)
    assert [upload.problems for upload in uploads if upload.problems] == []
    await stage.hold_to_promises(uploads)


async def test_a_store_that_is_full_in_the_middle_of_uploads(stage: Stage) -> None:
    uploads, go_on = await stage.uploads(), asyncio.Event()
    quota = Quota(stage)
    tasks = await stage.send(uploads, go_on)
    await quota.use_up()
    await assert_given_up(stage, uploads, tasks, go_on, "is full: make room", "is full")
    await quota.lift()
    await stage.send_again(uploads)
    await stage.hold_to_promises(uploads)


@pytest.mark.endurance
async def test_a_store_that_is_silent_for_long_is_given_up_and_found_again(stage: Stage) -> None:
    uploads, go_on = await stage.uploads(), asyncio.Event()
    tasks = await stage.send(uploads, go_on)
    with stage.proxy.silent():
        go_on.set()
        await asyncio.gather(*tasks)
    for upload in uploads:
        assert upload.acknowledged is None
        assert "gave no answer in time" in upload.problems[0]["detail"]
    await stage.send_again(uploads)
    await stage.hold_to_promises(uploads)


@pytest.mark.endurance
@pytest.mark.parametrize("number", range(ROUNDS))
async def test_any_of_these_at_any_moment(stage: Stage, number: int) -> None:
    draw = random.Random(SEED + number)
    print(f"FAULT_SEED={SEED}, round {number}")  # noqa: T201 - to repeat it
    uploads, go_on = await stage.uploads(draw), asyncio.Event()
    quota = Quota(stage)
    tasks = await stage.send(uploads, go_on)
    for fault in draw.sample(["killed", "restarted", "silent", "slow", "cut", "full"], 2):
        go_on.set()
        match fault:
            case "killed":
                await asyncio.to_thread(stage.minio.kill)
                await asyncio.wait(tasks, timeout=draw.uniform(0, 6))
                await asyncio.to_thread(stage.minio.start)
            case "restarted":
                await asyncio.to_thread(stage.minio.restart)
            case "silent":
                with stage.proxy.silent():
                    await asyncio.wait(tasks, timeout=draw.uniform(0, 60))
            case "slow":
                with stage.proxy.slow(draw.uniform(0, 2)):
                    await asyncio.wait(tasks, timeout=30)
            case "cut":
                await stage.proxy.cut()
            case "full":
                await quota.use_up()
                await asyncio.wait(tasks, timeout=draw.uniform(0, 6))
                await quota.lift()
    await asyncio.gather(*tasks)
    await stage.send_again(uploads)
    await stage.hold_to_promises(uploads)


@pytest.mark.endurance
async def test_a_disk_that_is_full_in_the_middle_of_uploads(tmp_path: Path, embedded_settings: Settings) -> None:
    with SmallDisk(tmp_path / "minio") as minio:
        async with stage_on(minio, embedded_settings) as stage:
            uploads, go_on = await stage.uploads(), asyncio.Event()
            tasks = await stage.send(uploads, go_on)
            minio.fill()
            go_on.set()
            await asyncio.gather(*tasks)
            for upload in uploads:
                assert upload.acknowledged is None
                assert "is full: make room" in upload.problems[0]["detail"]
            minio.ballast.unlink()
            await stage.send_again(uploads)
            await stage.hold_to_promises(uploads)
