"""`fan-out`: 500 readers of server-sent events with ten different filters, in deliveries/s.

The log gets 4,400 events at once: bare producers send them in a transaction a partition before the clock starts, and
commit when it does. Ours are 500 readers of one gateway process, fifty with each filter. The baseline is a bare aiohttp
server (`benchmarks.bare_stream`) that writes to as many readers the very bytes that our last run wrote, in the same
chunks. In both ways the clock runs until the last reader has its last event, and all readers only count. No projector
runs. Afterwards one event comes every 20 ms, and `p99_delay_ms` is how long events take from their time to a reader.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import cbor2
import psutil
from confluent_kafka import Producer

from artifact_store.documents import times
from artifact_store.models import EventFilter
from benchmarks.gateway_stage import Stage, gateway_stage
from benchmarks.harness import Plan
from benchmarks.kafka_topics import SentRecord
from benchmarks.workload import package_commands
from schemas.headers import headers_all
from schemas.runs import encode_all, first_of
from services.config import Settings
from services.core.decide import Command, Limits, decide
from services.core.state import PackageState, evolve_all
from services.log.kafka import KafkaLog
from services.log.kafka.connection import partition_of
from services.runtime.clock import system_clock
from services.views.queries import Origin
from tests.services.process import free_ports

READERS = 500
PACKAGES = 200
FILES = 20
DELAYS = 250
"""Events that come one by one."""

_EVENTS = PACKAGES * (FILES + 2)
_SECONDS = 120.0
_TRANSACTION_SECONDS = 30.0
_APART_SECONDS = 0.02
_FILE, _CREATED, _FINALIZED = "v1.file.ingested", "v1.package.created", "v1.package.finalized"
_PRODUCERS = [f"lab/spectrometer-{number}" for number in range(4)]
_CLASSES = ("scratch", "report", "raw-evidence")
_DATA = b"\ndata: "
"""What each event has once."""

_TIME = re.compile(rb'"created_at":"([^"]+)"')

FILTERS: Sequence[EventFilter] = (
    EventFilter(),
    EventFilter(types={_FILE}),
    EventFilter(types={_CREATED, _FINALIZED}),
    EventFilter(producers={_PRODUCERS[0]}),
    EventFilter(producers=set(_PRODUCERS[1:3])),
    EventFilter(producers={_PRODUCERS[3]}, types={_FILE, _FINALIZED}),
    EventFilter(retention_classes={"scratch"}),
    EventFilter(retention_classes={"report", "raw-evidence"}),
    EventFilter(subjects={f"sample-{number}" for number in range(5)}),
    EventFilter(subjects={f"sample-{number}" for number in range(4, 10)}, retention_classes={"report"}),
)
"""Sixty packages of a hundred have one of ten subjects, four producers and three classes each."""


@dataclass(slots=True)
class _Record:
    """A record, where it goes, and what filters go by."""

    partition: int
    sent: SentRecord
    event_type: str
    origin: Origin


@dataclass(slots=True)
class _Reader:
    """What one reader has to get, and what it got."""

    expected: int
    chunks: list[bytes] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    """In seconds."""

    async def read(self, answer: aiohttp.ClientResponse, *, keep: bool = False, timed: bool = False) -> int:
        """How many events came, once all have; the HTTP chunks are kept if asked for, and delays noted."""
        seen, chunk, before = 0, bytearray(), b""
        async with asyncio.timeout(_SECONDS):
            while seen < self.expected:
                piece, ends = await answer.content.readchunk()
                assert piece or ends, "the stream has ended"
                seen += piece.count(_DATA) + (before + piece[: len(_DATA) - 1]).count(_DATA)
                before = (before + piece[1 - len(_DATA) :])[1 - len(_DATA) :]
                if keep:
                    chunk += piece
                    if ends and chunk:
                        self.chunks.append(bytes(chunk))
                        chunk.clear()
                if timed:
                    now = time.time()
                    self.delays += [now - times.from_text(at.decode()) / 1e6 for at in _TIME.findall(piece)]
        if chunk:
            self.chunks.append(bytes(chunk))
        return seen


class FanOut:
    """The same events to as many readers in two ways; see the module."""

    def __init__(self, stage: Stage, log: KafkaLog) -> None:
        self._stage = stage
        self._log = log
        self._draw = Random(31)
        self._chunks: list[list[bytes]] = [[] for _ in FILTERS]
        self._deliveries = 0
        self._found: dict[str, Any] = {}

    def details(self) -> Mapping[str, Any]:
        """How much work it was, and what our last run took."""
        return {"readers": READERS, "filters": len(FILTERS), "events": _EVENTS, **self._found}

    async def ours(self) -> float:
        """Through the gateway."""
        log = await self._log.identity()
        records = [record for _ in range(PACKAGES) for record in self._records(log, self._life(FILES))]
        process = psutil.Process(self._stage.gateway.pid)
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(_session(self._stage.gateway.endpoint))
            answers = [
                await stack.enter_async_context(session.get("/v1/events", params=_query(FILTERS[kind])))
                for kind in _kinds()
            ]
            expected = [_count(records, wanted) for wanted in FILTERS]
            readers = [_Reader(expected[kind]) for kind in _kinds()]
            producers = await asyncio.to_thread(self._hand_over, records)
            cpu = self._stage.gateway_cpu()
            began = time.perf_counter()
            reading = asyncio.gather(
                *(
                    reader.read(answer, keep=number < len(FILTERS))
                    for number, (reader, answer) in enumerate(zip(readers, answers, strict=True))
                )
            )
            await asyncio.gather(*(asyncio.to_thread(p.commit_transaction, _TRANSACTION_SECONDS) for p in producers))
            seen = await reading
            took = time.perf_counter() - began
            cpu = self._stage.gateway_cpu() - cpu
            memory = process.memory_info().rss
            delays = await self._delays(log, answers)
        assert seen == [reader.expected for reader in readers]
        self._chunks = [reader.chunks for reader in readers[: len(FILTERS)]]
        self._deliveries = sum(seen)
        chunks = sum(map(len, self._chunks))
        self._found |= {
            "deliveries": self._deliveries,
            "kib_a_chunk": round(sum(len(c) for kind in self._chunks for c in kind) / chunks / 1024, 1),
            "gateway_cpu_micros_a_delivery": round(cpu / self._deliveries * 1e6, 3),
            "gateway_mib": round(memory / 2**20),
            "p99_delay_ms": round(delays[len(delays) * 99 // 100] * 1000, 1),
        }
        return self._deliveries / took

    async def baseline(self) -> float:
        """The same bytes by a bare server; what an earlier run of ours wrote."""
        if not self._deliveries:
            await self.ours()
        file = self._stage.folder / "chunks.cbor"
        file.write_bytes(cbor2.dumps(self._chunks))
        events = [sum(chunk.count(_DATA) for chunk in chunks) for chunks in self._chunks]
        async with AsyncExitStack() as stack:
            url, server = stack.enter_context(_bare_server(file))
            session = await stack.enter_async_context(_session(url))
            answers = [await stack.enter_async_context(session.get(f"/{kind}")) for kind in _kinds()]
            for answer in answers:
                assert await answer.content.readuntil(b"\n\n") == b":\n\n"
            readers = [_Reader(events[kind]) for kind in _kinds()]
            idle = server.cpu_times()
            began = time.perf_counter()
            reading = asyncio.gather(*(r.read(a) for r, a in zip(readers, answers, strict=True)))
            async with session.post("/go") as answer:
                assert answer.status == 200
            seen = await reading
            took = time.perf_counter() - began
            spent = server.cpu_times()
        assert sum(seen) == self._deliveries
        micros = (spent.user + spent.system - idle.user - idle.system) / self._deliveries * 1e6
        self._found["bare_cpu_micros_a_delivery"] = round(micros, 3)
        return self._deliveries / took

    def _life(self, files: int) -> list[Command]:
        """The commands of a package that was never seen before."""
        commands, draw = package_commands(self._draw, files, max(1, files)), self._draw
        create = replace(
            commands.create,
            producer=draw.choice(_PRODUCERS),
            subject=f"sample-{draw.randrange(10)}",
            retention_class=draw.choice(_CLASSES),
        )
        return [create, *commands.ingests, commands.finalize]

    def _records(self, log: UUID, commands: Sequence[Command]) -> list[_Record]:
        """What these commands become now."""
        state: PackageState | None = None
        found = []
        for command in commands:
            events = decide(state, command, system_clock(), Limits())
            state = evolve_all(state, events)
            first, made = first_of(events), state.created
            origin = Origin.of(made)
            partition = partition_of(first.package_id, self._log.kafka.partitions)
            of_each = headers_all(events, log, made, [None])
            for value, heads in zip(encode_all(events), of_each, strict=True):
                sent = SentRecord(str(first.package_id).encode(), value, list(heads.items()), first.created_at // 1000)
                found.append(_Record(partition, sent, first.event_type, origin))
        return found

    def _hand_over(self, records: Sequence[_Record]) -> list[Producer]:
        """Send the records in open transactions, one a partition; who has them waits to commit. Blocks."""
        topic, producers = self._log.kafka.topic, []
        for partition in range(self._log.kafka.partitions):
            producers.append(producer := _stranger(self._log, partition))
            producer.begin_transaction()
            for each in records:
                if each.partition == partition:
                    _produce(producer, topic, each)
            producer.flush(_TRANSACTION_SECONDS)
        return producers

    async def _delays(self, log: UUID, answers: Sequence[aiohttp.ClientResponse]) -> list[float]:
        """Create one package every _APART_SECONDS; how long each took to each reader, in seconds, sorted."""
        kafka = self._log.kafka
        creations = [self._life(0)[:1] for _ in range(DELAYS)]
        records = [record for commands in creations for record in self._records(log, commands)]
        expected = [_count(records, wanted) for wanted in FILTERS]
        readers = [_Reader(expected[kind]) for kind in _kinds()]
        reading = asyncio.gather(*(r.read(a, timed=True) for r, a in zip(readers, answers, strict=True)))
        producers = [await asyncio.to_thread(_stranger, self._log, p) for p in range(kafka.partitions)]
        due = time.perf_counter()
        for commands in creations:
            due += _APART_SECONDS
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            (record,) = self._records(log, commands)
            producer = producers[record.partition]
            producer.begin_transaction()
            _produce(producer, kafka.topic, record)
            await asyncio.to_thread(producer.commit_transaction, _TRANSACTION_SECONDS)
        await reading
        return sorted(delay for reader in readers for delay in reader.delays)


def _kinds() -> list[int]:
    """The filter's number of each reader; the first readers have different ones."""
    return [number % len(FILTERS) for number in range(READERS)]


def _query(wanted: EventFilter) -> list[tuple[str, str]]:
    fields = (
        ("producer", wanted.producers),
        ("subject", wanted.subjects),
        ("retention_class", wanted.retention_classes),
        ("type", wanted.types),
    )
    asked = [(name, value) for name, values in fields for value in sorted(values)]
    return [("follow", "true"), ("since", "now"), ("manifests", "false"), *asked]


def _count(records: Sequence[_Record], wanted: EventFilter) -> int:
    """How many of the records a filter takes."""
    return sum(
        (not wanted.types or record.event_type in wanted.types) and wanted.includes(*record.origin)
        for record in records
    )


def _stranger(log: KafkaLog, partition: int) -> Producer:
    """A producer of transactions that do not fence off the gateway's. Blocks."""
    producer = Producer(log.kafka.producer(partition) | {"transactional.id": f"stranger-{uuid4()}"})
    producer.init_transactions(_TRANSACTION_SECONDS)
    return producer


def _produce(producer: Producer, topic: str, record: _Record) -> None:
    sent = record.sent
    producer.produce(topic, sent.value, sent.key, record.partition, timestamp=sent.timestamp, headers=sent.headers)


def _session(url: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        url,
        connector=aiohttp.TCPConnector(limit=0),
        headers={"Accept": "text/event-stream"},
        timeout=aiohttp.ClientTimeout(total=None),
        read_bufsize=1 << 18,
    )


@contextmanager
def _bare_server(file: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Its URL and process, once it listens. Blocks."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "benchmarks.bare_stream", str(port), str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"serving\n"
            yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
        finally:
            process.kill()


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[FanOut]:
    async with gateway_stage(settings, projectors=False) as stage:
        log = KafkaLog(stage.settings)
        try:
            yield FanOut(stage, log)
        finally:
            await log.close()


PLAN = Plan("fan-out", "deliveries/s", 0.9, _opened)
