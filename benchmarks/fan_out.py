"""`fan-out`: 100 subscribers that see every event of a push, in deliveries/s.

10,000 small files are pushed in archives to one gateway process, which records 10,020 events with those of the
packages. Ours are 100 followers over HTTP of that same gateway; the baseline are 100 bare Kafka consumers
(read_committed, from the topic's end) that leave every record undecoded. In both ways the clock runs from the first
archive that is sent until the last subscriber has the last event, and all subscribers only count. No projector runs.
"""

from __future__ import annotations

import asyncio
import io
import tarfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from random import Random
from typing import Any

import aiohttp
from confluent_kafka import Consumer, TopicPartition

from benchmarks.gateway_stage import Stage, gateway_stage
from benchmarks.harness import Plan
from services.config import Settings
from services.log.kafka import KafkaLog
from services.log.kafka.connection import KafkaSettings

SUBSCRIBERS = 100
PACKAGES = 10
FILES = 1_000
FILE_BYTES = 64

_EVENTS = PACKAGES * (FILES + 2)
_SECONDS = 120.0
_CONSUMED_AT_ONCE = 1_000
_MICROS = 1_000_000
_PACKAGE = {"producer": "benchmark", "subject": "fan-out", "retention_class": "scratch"}


class FanOut:
    """The same push, seen by as many subscribers in two ways; see the module."""

    def __init__(self, stage: Stage, log: KafkaLog) -> None:
        self._stage = stage
        self._log = log
        self._draw = Random(31)
        self._found: dict[str, Any] = {}

    def details(self) -> Mapping[str, Any]:
        """How much work it was, and what our last run took."""
        return {"subscribers": SUBSCRIBERS, "events": _EVENTS, **self._found}

    async def ours(self) -> float:
        """Over HTTP, as lines of JSON."""
        cpu = self._stage.gateway_cpu()
        following = {"follow": "true", "since": str(await self._log.end())}
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(_session(self._stage))
            answers = [
                await stack.enter_async_context(session.get("/v1/events", params=following)) for _ in range(SUBSCRIBERS)
            ]
            rate = await self._pushed(asyncio.gather(*map(_counted, answers)))
        self._found = {
            "gateway_cpu_micros_a_delivery": round(
                (self._stage.gateway_cpu() - cpu) / (SUBSCRIBERS * _EVENTS) * _MICROS, 2
            )
        }
        return rate

    async def baseline(self) -> float:
        """Straight from Kafka."""
        end, loop = await self._log.end(), asyncio.get_running_loop()
        with ThreadPoolExecutor(SUBSCRIBERS) as threads, _consumers(self._log.kafka, end.offsets) as consumers:
            return await self._pushed(
                asyncio.gather(*(loop.run_in_executor(threads, _consumed, consumer) for consumer in consumers))
            )

    async def _pushed(self, subscribers: asyncio.Future[list[int]]) -> float:
        """Push; deliveries a second, from the first archive to the last event that the last subscriber sees."""
        archives = [self._archive() for _ in range(PACKAGES)]
        async with _session(self._stage) as session:
            began = time.perf_counter()
            async with asyncio.TaskGroup() as tasks:
                for number, archive in enumerate(archives):
                    tasks.create_task(_push(session, number, archive))
            seen = await subscribers
        assert seen == [_EVENTS] * SUBSCRIBERS
        return sum(seen) / (time.perf_counter() - began)

    def _archive(self) -> bytes:
        """Files that were never seen before."""
        found = io.BytesIO()
        with tarfile.open(fileobj=found, mode="w") as archive:
            for number in range(FILES):
                entry = tarfile.TarInfo(f"frames/frame-{number:05}.bin")
                entry.size = FILE_BYTES
                archive.addfile(entry, io.BytesIO(self._draw.randbytes(FILE_BYTES)))
        return found.getvalue()


async def _push(session: aiohttp.ClientSession, number: int, archive: bytes) -> None:
    async with session.post("/v1/packages", json={"name": f"fan-out-{number}", **_PACKAGE}) as answer:
        package = answer.headers["Location"]
    as_tar = {"Content-Type": "application/x-tar"}
    async with session.post(f"{package}/files", data=archive, headers=as_tar) as answer:
        assert answer.status == 201, await answer.text()
    async with session.post(f"{package}/finalize") as answer:
        assert answer.status == 200, await answer.text()


async def _counted(answer: aiohttp.ClientResponse) -> int:
    """How many events came, once all have."""
    seen = 0
    async with asyncio.timeout(_SECONDS):
        while seen < _EVENTS:
            piece = await answer.content.readany()
            assert piece, "the gateway ended the stream"
            seen += piece.count(b"\n")
    return seen


@contextmanager
def _consumers(kafka: KafkaSettings, starts: Mapping[int, int]) -> Iterator[list[Consumer]]:
    """Consumers at these offsets, connected. Blocks."""
    opened = []
    try:
        for _ in range(SUBSCRIBERS):
            consumer = Consumer(kafka.reader())
            opened.append(consumer)
            consumer.assign([TopicPartition(kafka.topic, p, offset) for p, offset in starts.items()])
            consumer.consume(1, 0.1)
        yield opened
    finally:
        for consumer in opened:
            consumer.close()


def _consumed(consumer: Consumer) -> int:
    """How many records came, once all have. Blocks."""
    seen, until = 0, time.monotonic() + _SECONDS
    while seen < _EVENTS:
        found = consumer.consume(_CONSUMED_AT_ONCE, 0.05)
        for message in found:
            if (error := message.error()) is not None:
                raise RuntimeError(error.str())
        seen += len(found)
        assert time.monotonic() < until, f"{seen:,} of {_EVENTS:,} events came"
    return seen


def _session(stage: Stage) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        stage.gateway.endpoint,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
        read_bufsize=1 << 18,
    )


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[FanOut]:
    async with gateway_stage(settings, projectors=False) as stage:
        log = KafkaLog(stage.settings)
        try:
            yield FanOut(stage, log)
        finally:
            await log.close()


PLAN = Plan("fan-out", "deliveries/s", 0.5, _opened)
