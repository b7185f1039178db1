"""SIGKILL at random moments of an upload of 500 files: acknowledged files exist once, and the views catch up.

The client gets no help: the process is restarted on its port, and the client library's own retries do the rest. Each
test prints its seed; `KILL_SEED` in the environment repeats it.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from uuid import UUID

import pytest
from blake3 import blake3
from sqlalchemy import select
from sqlalchemy.ext.asyncio import create_async_engine

from artifact_store.events import FileIngested
from artifact_store.registry import Registry
from services.config import Settings
from services.log.sqlite.file import write_lock
from services.registry import open_registry
from services.views.projections import PROJECTIONS
from services.views.tables import retention_state
from tests.integration.conditions import until
from tests.integration.processes import ProductProcess, deployed, output_of, serving

pytestmark = pytest.mark.processes

FILES = 500
PARALLEL = 16
LARGEST_BYTES = 16 * 1024
UPLOAD_SECONDS = 120
VIEW_SECONDS = 30

long_and_short = pytest.mark.parametrize(
    "seconds", [pytest.param(20, id="short"), pytest.param(900, id="long", marks=pytest.mark.endurance)]
)
"""Rounds begin as long as there is time; the first two always do."""


class Upload:
    """One package on its way in: what was sent, what was acknowledged, and waiting for how much of it was."""

    def __init__(self, registry: Registry, rng: random.Random) -> None:
        self._registry = registry
        self.contents = {f"{i % 7}/{i:03}.bin": rng.randbytes(rng.randrange(LARGEST_BYTES)) for i in range(FILES)}
        self.acknowledged: dict[str, UUID] = {}
        self.package_id: UUID | None = None
        self._progress = asyncio.Condition()

    async def run(self) -> UUID:
        """Create, send all files, finalize. Returns the package's id."""
        package_id = self.package_id = await self._registry.create_package("kill", "lab", "faults", "scratch")
        waiting = iter(self.contents.items())

        async def send() -> None:
            for path, content in waiting:  # shared by all tasks: each file is taken once
                media_type = "application/octet-stream"
                self.acknowledged[path] = await self._registry.ingest_file(package_id, path, media_type, content)
                async with self._progress:
                    self._progress.notify_all()

        async with asyncio.TaskGroup() as group:
            for _ in range(PARALLEL):
                group.create_task(send())
        await self._registry.finalize_package(package_id)
        return package_id

    async def reached(self, count: int) -> None:
        """Wait until this many files were acknowledged."""
        async with self._progress:
            await self._progress.wait_for(lambda: len(self.acknowledged) >= count)


class Killer:
    """Kills one of the processes at random moments and starts it again."""

    def __init__(self, victims: Sequence[ProductProcess], most_kills: int, rng: random.Random) -> None:
        self._victims = victims
        self._most_kills = most_kills
        self._rng = rng
        self.kills = 0

    async def run(self, upload: Upload) -> None:
        """At least once during an upload; the very beginning and the finalization are as likely as any file."""
        for count in sorted(self._rng.choices(range(FILES + 1), k=self._rng.randint(1, self._most_kills))):
            await upload.reached(count)
            await asyncio.sleep(self._rng.uniform(0, 0.02))  # not to wait for anything: the moment is to be any
            victim = self._rng.choice(self._victims)
            await asyncio.to_thread(victim.kill)
            self.kills += 1
            await asyncio.to_thread(victim.start)


async def rounds(
    settings: Settings, url: str, victims: Sequence[ProductProcess], seconds: float, *, most_kills: int
) -> None:
    """Uploads with up to this many kills. Each is checked when it is done, and `verify` checks all at the end."""
    seed = int(os.environ.get("KILL_SEED") or random.randrange(2**32))
    rng = random.Random(seed)
    killer = Killer(victims, most_kills, rng)
    deadline = time.monotonic() + seconds
    done = 0
    async with open_registry(Settings(url=url)) as registry:
        while done < 2 or time.monotonic() < deadline:
            done += 1
            print(f"seed {seed}, round {done}, kills so far {killer.kills}")  # noqa: T201  shown when the test fails
            upload = Upload(registry, rng)
            async with asyncio.timeout(UPLOAD_SECONDS), asyncio.TaskGroup() as group:
                group.create_task(killer.run(upload))
                group.create_task(upload.run())
            await log_holds_each_file_once(registry, upload)
            await view_is_complete(registry, upload)
            await retention_is_complete(settings, done)
    assert killer.kills >= done
    output_of(settings, "verify")


async def log_holds_each_file_once(registry: Registry, upload: Upload) -> None:
    """Every file that was acknowledged, under the id that was acknowledged, with the bytes that were sent."""
    events = [event async for event in registry.read_events(package_id=upload.package_id)]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    ingested = [event.payload for event in events if isinstance(event.payload, FileIngested)]
    assert len(events) == len(ingested) + 2
    assert Counter(payload.relative_path for payload in ingested) == Counter(list(upload.contents))
    assert {payload.relative_path: payload.file_id for payload in ingested} == upload.acknowledged
    for payload in ingested:
        assert payload.blake3 == blake3(upload.contents[payload.relative_path]).digest()


async def view_is_complete(registry: Registry, upload: Upload) -> None:
    """What was written through a registry is read through it at once, whatever became of the projector."""
    assert upload.package_id is not None
    package = await registry.get_package(upload.package_id)
    assert (package.status, package.last_event_sequence) == ("finalized", FILES + 2)
    page = await registry.list_files(upload.package_id, limit=FILES)
    assert page.next is None
    assert {file.relative_path: file.file_id for file in page.items} == upload.acknowledged


async def retention_is_complete(settings: Settings, packages: int) -> None:
    """The second projection comes along too; nobody waits for it but this."""
    engine = create_async_engine(settings.views_url)

    async def complete() -> bool:
        async with engine.connect() as connection:
            found = await connection.execute(select(retention_state.c.last_event_sequence))
            return list(found.scalars()) == [FILES + 2] * packages

    try:
        await until(complete, VIEW_SECONDS, f"the retention view did not hold all of {packages} packages")
    finally:
        await engine.dispose()


@pytest.mark.services
@long_and_short
async def test_a_killed_gateway_loses_and_repeats_nothing(
    real_settings: Settings, tmp_path: Path, seconds: float
) -> None:
    with deployed(real_settings, tmp_path) as processes:
        await rounds(real_settings, processes["gateway"].endpoint, [processes["gateway"]], seconds, most_kills=2)


@pytest.mark.services
@long_and_short
async def test_a_killed_projector_skips_and_repeats_nothing(
    real_settings: Settings, tmp_path: Path, seconds: float
) -> None:
    with deployed(real_settings, tmp_path) as processes:
        victims = [processes[name] for name in PROJECTIONS]
        await rounds(real_settings, processes["gateway"].endpoint, victims, seconds, most_kills=6)


@long_and_short
async def test_killing_the_one_embedded_process_loses_and_repeats_nothing(
    embedded_settings: Settings, tmp_path: Path, seconds: float
) -> None:
    with serving(embedded_settings, tmp_path) as process:
        await rounds(embedded_settings, process.endpoint, [process], seconds, most_kills=4)


async def test_a_gateway_that_is_killed_between_a_pack_and_its_events_has_acknowledged_nothing_of_it(
    embedded_settings: Settings, tmp_path: Path
) -> None:
    """The retries store the files again and record each once. No event names the content of the first pack."""
    log = Path(embedded_settings.log_url.removeprefix("sqlite:///"))
    blobs = tmp_path / "blobs" / "blobs"
    contents = {f"{number}.bin": b"content %d" % number * 50 for number in range(16)}

    def objects() -> list[int]:
        return [path.stat().st_size for path in blobs.rglob("*") if path.is_file()]

    async def stored() -> bool:
        return sum(objects()) >= sum(map(len, contents.values()))

    with serving(embedded_settings, tmp_path) as process:
        async with open_registry(Settings(url=process.endpoint)) as registry:
            packages = [await registry.create_package(f"p{n}", "lab", "faults", "scratch") for n in range(4)]
            held = ExitStack()
            held.enter_context(write_lock(log))
            sending = asyncio.gather(
                *(
                    registry.ingest_file(packages[number % 4], path, "application/octet-stream", content)
                    for number, (path, content) in enumerate(contents.items())
                )
            )
            await until(stored, 30, "the files' bytes were not stored")
            assert len(objects()) < len(contents), "no files share an object"
            assert not sending.done()
            await asyncio.to_thread(process.kill)
            held.close()
            await asyncio.to_thread(process.start)
            files = await sending
            events = [event async for event in registry.read_events()]
            ingested = [event.payload for event in events if isinstance(event.payload, FileIngested)]
            assert {payload.relative_path: payload.file_id for payload in ingested} == dict(
                zip(contents, files, strict=True)
            )
            assert len(ingested) == len(contents)
            for payload in ingested:
                content = b"".join([piece async for piece in await registry.get_file(payload.file_id)])
                assert content == contents[payload.relative_path]
    output_of(embedded_settings, "verify", "--bytes")
