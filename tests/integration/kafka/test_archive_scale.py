"""Archives of many events: time grows linearly, memory does not grow, and a registry is restored from one.

`pytest -s` shows the measurements.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from artifact_store.byte_streams import from_any
from artifact_store.events import Event
from artifact_store.models import Declared
from artifact_store.position import Position
from services.blobs.port import BlobStore
from services.config import Settings
from services.log.kafka import KafkaFiller, KafkaLog
from services.wiring import open_blobs, open_log
from tests.archives import FILES, as_records, digests_of, long_history, records_of
from tests.buckets import Bucket
from tests.conftest import Endpoints
from tests.integration.kafka.test_archive import another, whole
from tests.integration.kafka_stage import open_kafka_log

pytestmark = [pytest.mark.services, pytest.mark.processes, pytest.mark.endurance]

FEW, MANY = (int(os.environ.get("ARCHIVE_EVENTS", "300000")) // part for part in (3, 1))
KILLED = 20_000
"""So many records has a topic whose copying is killed."""

MOST_MIB = 350
MORE_MIB = 48
"""Most memory of a command, and how much more it may take for three times as many events."""

_LOOK_SECONDS = 0.1
_PER_FLUSH = 50
"""So many packages are written at a time."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a command took and printed. `processor` and `wall` in s, `mib` at its most."""

    wall: float
    processor: float
    mib: float
    answer: Mapping[str, Any]


def measured(settings: Settings, *arguments: str | Path) -> Run:
    """Run a command in a process of its own."""
    began = time.monotonic()
    command = [sys.executable, "-m", "services.cli", *map(str, arguments), "--json", "--quiet"]
    environment = {**os.environ, **settings.environment()}
    most = 0.0
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(command, env=environment, stdout=printed)
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            most = max(most, _most_mib(process.pid))
            time.sleep(_LOOK_SECONDS)
        _, status, used = ended
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        told = printed.read()
    assert process.returncode == 0, told
    found = Run(time.monotonic() - began, used.ru_utime + used.ru_stime, most, json.loads(told))
    print(f"{' '.join(map(str, arguments[:2]))}: {found}")  # noqa: T201 - figures for people
    return found


def _most_mib(pid: int) -> float:
    """The most memory that the process has had since its program began: `ru_maxrss` counts what it was forked from."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0.0)


async def fill(log: KafkaLog, events: int, blobs: BlobStore | None = None) -> None:
    """Fill the log with packages of 100 events each, and the store with their packs."""
    filler = KafkaFiller(log)
    await filler.begin()
    waiting: list[Event] = []
    backend = "local" if blobs is None else blobs.backend_id
    for number, (made, pack) in enumerate(long_history(events // (FILES + 2), backend), 1):
        waiting += made
        if blobs is not None:
            await blobs.store(from_any(pack), declared=Declared(len(pack)), max_bytes=len(pack))
        if number % _PER_FLUSH == 0 or number == events // (FILES + 2):
            for p, records in (await as_records(log, waiting)).items():
                await filler.append(p, records)
            waiting.clear()
    await filler.settle()
    await filler.close()


async def test_time_grows_as_the_events_do_and_memory_does_not(kafka: Settings, tmp_path: Path) -> None:
    runs: dict[int, list[Run]] = {}
    for events in (FEW, MANY):
        async with another(kafka, f"from-{events}") as log, another(kafka, f"to-{events}", kafka_partitions=5) as new:
            await log.migrate()
            await fill(log, events)
            source = replace(kafka, log_url=f"{kafka.log_url}-from-{events}")
            target = replace(kafka, log_url=f"{kafka.log_url}-to-{events}", kafka_partitions=5)
            file = replace(kafka, log_url=f"sqlite:///{tmp_path}/{events}.db")
            archive = tmp_path / f"{events}.archive"
            runs[events] = [
                await asyncio.to_thread(measured, source, "log", "export", archive),
                await asyncio.to_thread(measured, target, "log", "import", archive),
                await asyncio.to_thread(measured, file, "log", "import", archive),
            ]
            assert [run.answer["events"] for run in runs[events]] == [events] * 3
            if events == MANY:
                embedded = open_log(file)
                digests = [await digests_of(each, tmp_path) for each in (log, new, embedded)]
                await embedded.close()
                assert digests[0] == digests[1] == digests[2]
    for few, many in zip(runs[FEW], runs[MANY], strict=True):
        # The processor's time, because others may use the machine meanwhile.
        assert many.processor <= 1.25 * MANY / FEW * few.processor
        assert many.mib <= min(MOST_MIB, few.mib + MORE_MIB)


async def test_a_copy_that_is_killed_again_and_again_has_each_record_once(kafka: Settings, log: KafkaLog) -> None:
    await fill(log, KILLED)
    source = await records_of(log)
    command = [sys.executable, "-m", "services.cli", "log", "copy", log.kafka.prefix, f"{log.kafka.prefix}-copy"]
    environment = {**os.environ, **kafka.environment()}
    async with another(kafka, "copy") as copy:
        await copy.migrate()
        for share in (0.1, 0.3, 0.5, 0.7, 0.9):
            process = await asyncio.create_subprocess_exec(*command, env=environment)
            while sum((await copy.end()).offsets.values()) < share * KILLED:
                assert process.returncode is None
                await asyncio.sleep(_LOOK_SECONDS)
            process.kill()
            await process.wait()
        done = await asyncio.to_thread(measured, kafka, *command[3:])
        assert whole(await records_of(copy)) == whole(source)
        compared = await asyncio.to_thread(measured, kafka, "log", "compare", *command[5:])
        assert compared.answer == {"records": KILLED, "missing": 0, "repeated": 0}
    assert 0.9 * KILLED / 2 < done.answer["resumed"] < done.answer["records"] == KILLED


async def test_a_registry_is_restored_into_an_empty_cluster(
    real_settings: Settings, endpoints: Endpoints, tmp_path: Path
) -> None:
    keys = (endpoints.s3_access_key, endpoints.s3_secret_key, endpoints.s3_region)
    blobs = open_blobs(real_settings)
    async with open_kafka_log(real_settings) as log, another(real_settings, "restored"):
        await fill(log, MANY, blobs)
        await blobs.close()
        archive = tmp_path / "all.archive"
        exported = await asyncio.to_thread(measured, real_settings, "log", "export", archive, "--blobs")
        with Bucket(endpoints.s3, *keys) as bucket:
            settings = replace(real_settings, log_url=f"{real_settings.log_url}-restored", **bucket.settings)
            imported = await asyncio.to_thread(measured, settings, "log", "import", archive, "--blobs")
            end = await asyncio.to_thread(measured, settings, "log", "position", archive, exported.answer["position"])
            # Behind the last event of each partition lies the end of its transaction.
            behind = {p: offset + 1 for p, offset in Position.parse(end.answer["position"]).offsets.items()}
            assert behind == Position.parse(imported.answer["position"]).offsets
            views = replace(settings, views_url=f"sqlite+aiosqlite:///{tmp_path}/views.db")
            await asyncio.to_thread(measured, views, "migrate")
            for projection in ("registry", "retention", "usage"):
                await asyncio.to_thread(measured, views, "replay", projection, "--in-place")
            verified = await asyncio.to_thread(measured, views, "verify", "--bytes")
        assert verified.answer["views"] == await digests_of(log, tmp_path)
    assert imported.answer["digest"] == exported.answer["digest"]
    assert verified.answer["violation_count"] == verified.answer["healed"] == 0
    assert verified.answer["files"] == MANY // (FILES + 2) * FILES
    assert exported.mib < MOST_MIB
    assert imported.mib < MOST_MIB
