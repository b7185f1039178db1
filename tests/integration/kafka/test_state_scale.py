"""A partition with a million events: how soon a writer serves it, and how much memory it takes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

import pytest
from confluent_kafka import Producer

from artifact_store.events import Event
from schemas import identifiers
from schemas.codec import encode
from schemas.headers import headers
from schemas.runs import StoredFile
from services.config import Settings
from services.core.decide import Command, CreatePackage, FinalizePackage, IngestFiles, Limits, decide
from services.core.state import PackageState, evolve
from services.log.kafka.connection import KafkaSettings, record_key
from services.runtime.clock import system_clock
from tests.integration.kafka_stage import kafka_settings, open_kafka_log, operate
from tests.services.shared import ROOT

pytestmark = [pytest.mark.services, pytest.mark.endurance]

TRANSACTION = 5_000
COLD_SECONDS = 5.0
WARM_SECONDS = 1.0
MORE_MEMORY = 100 << 20


@dataclass(frozen=True)
class Shape:
    """How many packages, with how many files each."""

    packages: int
    files: int


def commands(draw: Random, files: int) -> Iterator[Command]:
    """One package's life; digests look like real ones."""

    def command_id() -> UUID:
        return UUID(bytes=draw.randbytes(16), version=4)

    created = command_id()
    package = identifiers.package_id("ada", created)
    yield CreatePackage(package, created, "ada", "run 1", "lab", "sample", "report", "{}")
    for n in range(files):
        digest, sha256 = draw.randbytes(32), draw.randbytes(32)
        key = f"blobs/blake3/{digest.hex()}"
        file = StoredFile(f"frames/{n:06}.bin", "application/octet-stream", 4096, digest, sha256, "s3", key, 0, 4096, 7)
        yield IngestFiles(package, command_id(), "ada", (file,))
    yield FinalizePackage(package, command_id(), "ada")


def events(shape: Shape) -> Iterator[Event]:
    draw, limits = Random(7), Limits()
    for _ in range(shape.packages):
        state: PackageState | None = None
        for command in commands(draw, shape.files):
            for event in decide(state, command, system_clock(), limits):
                state = evolve(state, event)
                yield event


def produce(kafka: KafkaSettings, shape: Shape) -> int:
    """Write the packages' events in transactions, as the writer does; how many. Blocks."""
    producer = Producer(kafka.producer(0))
    producer.init_transactions(30)
    count = 0
    for count, event in enumerate(events(shape), start=1):
        if count % TRANSACTION == 1:
            producer.begin_transaction()
        key, value = record_key(event.package_id), encode(event)
        given, timestamp = headers(event, UUID(int=1), None), event.created_at // 1000
        producer.produce(kafka.topic, value, key, 0, timestamp=timestamp, headers=given)
        if count % TRANSACTION == 0:
            producer.commit_transaction(60)
    if count % TRANSACTION:
        producer.commit_transaction(60)
    return count


async def run_writer(settings: Settings) -> dict[str, Any]:
    """A writer in a process of its own, until it has closed; what it measured."""
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "tests.integration.kafka.state_process"],
        cwd=ROOT,
        env={**os.environ, **settings.environment()},
        stdout=subprocess.PIPE,
        check=True,
        timeout=3600,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    "shape", [Shape(15_200, 64), Shape(1_000_000, 0)], ids=["packages of 64 files", "a million packages"]
)
async def test_taking_over_is_quick_and_memory_bounded_after_a_million_events(
    kafka_url: str, s3_bucket: dict[str, Any], tmp_path: Path, shape: Shape, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = kafka_settings(kafka_url, tmp_path, kafka_partitions=1, **s3_bucket)
    small = replace(settings, log_url=f"{kafka_url}-small", state_dir=tmp_path / "small")
    async with open_kafka_log(small) as log:
        await asyncio.to_thread(produce, log.kafka, Shape(1_000, 0))
        few = await run_writer(small)
        await asyncio.to_thread(operate, log, lambda admin: admin.delete_topics([log.kafka.topic]))
    async with open_kafka_log(settings) as log:
        count = await asyncio.to_thread(produce, log.kafka, shape)
        end = (await log.end()).offsets[0]
    assert count >= 1_000_000 - 1_000
    first = await run_writer(settings)
    size = sum(path.stat().st_size for path in settings.state_dir.glob("*.db"))
    warm = await run_writer(settings)
    shutil.rmtree(settings.state_dir)
    cold = await run_writer(settings)
    with capsys.disabled():
        print(f"\n{shape}: {count:,} events, end {end:,}, state file {size >> 20} MiB")  # noqa: T201 - its purpose
        for name, found in (("few", few), ("log", first), ("warm", warm), ("cold", cold)):
            print(f"  {name}: {found}")  # noqa: T201 - as above
    assert [found["restored_from"] for found in (first, warm, cold)] == ["log", "file", "snapshot"]
    assert warm["seconds"] < WARM_SECONDS
    assert cold["seconds"] < COLD_SECONDS
    assert max(found["memory"] for found in (first, warm, cold)) < few["memory"] + MORE_MEMORY
