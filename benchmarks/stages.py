"""`python -m benchmarks.stages`: what the stages of a command cost the gateway's Python threads, in µs an event.

The whole way of a batch of commands, by the code that serves it, but in one thread and one stage after the other: from
`submit` to the answer that wakes up who waits for it, and the checkpoint. Only transactions are missing: the records go
through the mock broker inside the Kafka client, which knows none.

Processor time of this thread alone, the least of many passes, so that what else the machine does hardly matters. A
gateway under load takes a third more and above: its threads take the caches from each other.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from time import thread_time
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

from confluent_kafka import Producer

from artifact_store.events import PackageCreated
from benchmarks.workload import package_commands
from schemas.headers import headers_all
from schemas.runs import FileRun, encode_all
from services.config import Settings
from services.core.decide import Command, IngestFiles, IngestTogether, Limits, acknowledge, decide
from services.log.kafka.cluster import Cluster
from services.log.kafka.connection import KafkaSettings, partition_of
from services.log.kafka.tail import Reader
from services.log.sequencer.partition_writer import PartitionWriter, WriterContext
from services.log.sequencer.queue import Request, RequestQueue, runs_of
from services.log.state.partition_state import PartitionState
from services.log.state.state_file import LogPartition, StateFile
from services.runtime.processes import collect_rarely

_CREATED = PackageCreated("run", "lab/spectrometer-3", "sample-1", "raw-evidence", 3650, "{}")
_PACKAGES = 15
_FILES = 64
_PASSES = 100
_NOW = 1_900_000_000_000_000
_PARTITIONS = 6
_SECONDS = 30.0
_LIMITS = Limits()


class _Stages:
    """The least processor time of any pass, by stage."""

    def __init__(self) -> None:
        self.least: dict[str, float] = {}
        self._spent: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of the block to the stage's in this pass."""
        began = thread_time()
        yield
        self._spent[stage] += thread_time() - began

    def end_pass(self) -> None:
        """Compare it with those before."""
        for stage, spent in self._spent.items():
            self.least[stage] = min(self.least.get(stage, spent), spent)
        self._spent.clear()


class _Mock(Cluster):
    """The mock broker has no settings that would tell the framing."""

    def framing(self) -> None:
        """See `Cluster`."""


class _Broker:
    """One partition in the Kafka client's mock broker."""

    def __init__(self) -> None:
        mock: dict[str, Any] = {"test.mock.num.brokers": 1, "log_level": 0, "compression.type": "lz4"}
        self._producer = Producer(mock)
        (broker,) = self._producer.list_topics(timeout=_SECONDS).brokers.values()
        self._kafka = KafkaSettings.of(Settings(log_url=f"kafka://{broker.host}:{broker.port}/bench"))
        self._producer.list_topics(self._kafka.topic, timeout=_SECONDS)  # makes it
        self.tail = Reader(self._kafka, {0: 0}, _Mock(self._kafka))

    def produce(self, run: FileRun, values: Sequence[bytes]) -> None:
        """As a lease does it."""
        topic, key, timestamp = self._kafka.topic, str(run.package_id).encode(), run.created_at // 1000
        of_each = headers_all(run, UUID(int=1), _CREATED, [None] * len(run.commands))
        for value, headers in zip(values, of_each, strict=True):
            self._producer.produce(topic, value, key, 0, timestamp=timestamp, headers=headers)

    def flush(self) -> None:
        """Wait until everything is there."""
        self._producer.flush(_SECONDS)


async def stages(files_a_command: int, passes: int = _PASSES) -> dict[str, float]:
    """µs an event by stage."""
    draw, found, broker = Random(22), _Stages(), _Broker()
    collect_rarely()
    with tempfile.TemporaryDirectory() as folder:
        place = LogPartition(UUID(int=1), "bench.events", 0)
        state = PartitionState(StateFile.create(Path(folder) / "state.db", place))
        for _ in range(passes):
            packages = [package_commands(draw, _FILES, files_a_command) for _ in range(_PACKAGES)]
            _carry_out(state, [package.create for package in packages])
            decided = await _ingest(found, state, [command for package in packages for command in package.ingests])
            _append(found, broker, decided)
            last = _carry_out(state, [package.finalize for package in packages])
            state.confirm(0, last)
            with found.timed("checkpoint, once an event"):
                state.save()
            found.end_pass()
        state.close()
    broker.tail.close()
    return {stage: seconds / (_PACKAGES * _FILES) * 1_000_000 for stage, seconds in found.least.items()}


async def _ingest(
    found: _Stages, state: PartitionState, commands: Sequence[Command]
) -> list[tuple[FileRun, list[bytes]]]:
    loop, decided = asyncio.get_running_loop(), []
    # Its thread is not started: what it would do is done here.
    writer = PartitionWriter(0, cast("WriterContext", SimpleNamespace(loop=loop, submit_seconds=_SECONDS)))
    waiting: RequestQueue = writer._queue
    with found.timed("submit: find the partition"):
        for command in commands:
            partition_of(command.package_id, _PARTITIONS)
    with found.timed("submit: future, queue, deadline"):
        answers = [writer.submit(command) for command in commands]
    batch: list[Request] = []
    with found.timed("take a batch from the queue"):
        while len(batch) < len(commands):
            batch += waiting.take(0) or []
    settled: list[tuple[Request, Any]] = []
    with found.timed("bring a package's commands together"):
        runs = runs_of(batch)
    for run in runs:
        own = tuple(cast("IngestFiles", request.asked) for request in run)
        with found.timed("look up the package's state"):
            before = state.package(own[0].package_id)
        with found.timed("decide: rules, ids, digests"):
            events = cast("FileRun", decide(before, IngestTogether(own[0].package_id, own), _NOW, _LIMITS))
        with found.timed("encode"):
            values = encode_all(events)
        with found.timed("fold into the state"):
            after = state.fold(before, events)
        with found.timed("acknowledge"):
            settled += [(request, acknowledge(after, command)) for request, command in zip(run, own, strict=True)]
        decided.append((events, values))
    waited = asyncio.gather(*answers)
    with found.timed("settle and wake up"):
        writer._deliver(settled)
        await waited
    return decided


def _append(found: _Stages, broker: _Broker, decided: Sequence[tuple[FileRun, list[bytes]]]) -> None:
    with found.timed("headers and produce"):
        for run, its_values in decided:
            broker.produce(run, its_values)
    broker.flush()
    values = [value for _, its_values in decided for value in its_values]
    seen: list[bytes | None] = []
    with found.timed("read back and compare"):
        while len(seen) < len(values):
            seen += broker.tail.take_values(len(values) - len(seen), _SECONDS)[0]
        if seen != values:
            raise RuntimeError("the mock broker gave other records back")


def _carry_out(state: PartitionState, commands: Sequence[Command]) -> bytes:
    """Decide and fold; the last record's value."""
    value = b""
    for command in commands:
        package = state.package(command.package_id)
        events = decide(package, command, _NOW, _LIMITS)
        state.fold(package, events)
        value = encode_all(events)[-1]
    return value


def main() -> int:
    """Prints a Markdown table."""
    single, many = asyncio.run(stages(1)), asyncio.run(stages(_FILES))
    print(f"| stage | one file a command | {_FILES} |\n| --- | --- | --- |")
    for stage, micros in single.items():
        print(f"| {stage} | {micros:.1f} | {many[stage]:.1f} |")
    print(f"| together | {sum(single.values()):.1f} | {sum(many.values()):.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
