"""A partition whose writer makes little progress, or none.

Memory and waiting times are bounded, refusals say when to try again, the client library tries again, and acknowledged
commands are in the log once.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import psutil
import pytest

from artifact_store import Client
from artifact_store.client.transport import RetryPolicy
from schemas import identifiers
from services.config import Settings
from services.log.kafka.writer import SUBMIT_SECONDS
from services.log.sequencer.queue import CHECK_SECONDS, MAX_WAITING_BYTES
from tests.contract.log_invariants import read_valid
from tests.faults.proxy import END_TXN, Network, ProxiedCluster
from tests.integration.conditions import until
from tests.integration.http_gateway import RunningGateway, running_gateway
from tests.integration.kafka_stage import kafka_settings, open_kafka_log
from tests.integration.processes import ProductProcess, output_of

pytestmark = [pytest.mark.services, pytest.mark.processes]

TRANSACTION_SECONDS = 3.0
"""How long each transaction takes here; below the time-out after which it would be given up."""

METADATA = {"filling": "x" * 60_000}
COMMANDS = 1_000
"""As many of these commands as make nearly twice what may wait."""

AT_A_TIME = 600
MORE_MEMORY = 6 * MAX_WAITING_BYTES
"""A command that waits is held as text, beside what its request came in, and several times while it is appended."""

SLACK_SECONDS = 5.0
"""For the machine: the gateway's only core decodes all of these requests."""

BUSY = (429, 503)

LONGEST_SECONDS = 10.0
"""Clients that wait no longer hear the cause."""


@dataclass
class Flood:
    """Plain clients that send each command once, and what became of it."""

    url: str
    statuses: Counter[int] = field(default_factory=Counter)
    acknowledged: set[UUID] = field(default_factory=set)
    without_retry_after: int = 0
    longest: float = 0.0

    async def run(self) -> None:
        """All commands, as many at a time as connections."""
        left = iter(range(COMMANDS))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def send() -> None:
                for _ in left:
                    await self._one(session)

            await asyncio.gather(*(send() for _ in range(AT_A_TIME)))

    async def _one(self, session: aiohttp.ClientSession) -> None:
        command, began = uuid4(), monotonic()
        body = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch", "metadata": METADATA}
        headers = {"Idempotency-Key": str(command), "X-Actor": "ada"}
        async with session.post(f"{self.url}/v1/packages", json=body, headers=headers) as answer:
            await answer.read()
        self.longest = max(self.longest, monotonic() - began)
        self.statuses[answer.status] += 1
        if answer.status == 201:
            self.acknowledged.add(identifiers.package_id("ada", command))
        elif int(answer.headers.get("Retry-After", 0)) < 1:
            self.without_retry_after += 1


async def question(url: str, package: UUID) -> tuple[int, float]:
    """Ask whether a file would be taken, as every upload does before its body; status, and how long it took."""
    began = monotonic()
    async with (
        aiohttp.ClientSession() as session,
        session.put(f"{url}/v1/packages/{package}/files/a", data=b"x") as answer,
    ):
        await answer.read()
        return answer.status, monotonic() - began


async def test_an_overloaded_partition_pushes_back_within_bounds_and_loses_nothing(
    cluster: ProxiedCluster, network: Network, tmp_path: Path
) -> None:
    settings = kafka_settings(
        f"kafka://{cluster.proxied_endpoint}/overload",
        tmp_path,
        kafka_partitions=1,
        blobs_url=f"file:{tmp_path / 'blobs'}",
        views_url=f"sqlite+aiosqlite:///{tmp_path / 'views.db'}",
    )
    await asyncio.to_thread(output_of, settings, "migrate")
    process = ProductProcess(settings, tmp_path / "gateway", "gateway")
    await asyncio.to_thread(process.__enter__)
    try:
        await overload(settings, network, process)
    finally:
        await asyncio.to_thread(process.__exit__, None, None, None)


async def overload(settings: Settings, network: Network, process: ProductProcess) -> None:
    gateway = psutil.Process(process.pid)
    flood, memory = Flood(process.endpoint), [gateway.memory_info().rss]
    policy = RetryPolicy(total_seconds=180.0)
    async with Client(process.endpoint, policy, notify=lambda _error, _seconds: None) as client:
        package = await client.create_package("n", "p", "s", "scratch", "ada", {})
        with network.holding(TRANSACTION_SECONDS, END_TXN):
            flooding = asyncio.ensure_future(flood.run())

            async def refused() -> bool:
                memory.append(gateway.memory_info().rss)
                return sum(flood.statuses[status] for status in BUSY) > 0 or flooding.done()

            await until(refused, 60, "nothing is pushed back")
            insisting = [
                asyncio.ensure_future(client.create_package(f"{n}", "p", "s", "scratch", "ada", {})) for n in range(20)
            ]
            asked = await question(process.endpoint, package)

            async def over() -> bool:
                memory.append(gateway.memory_info().rss)
                return flooding.done()

            await until(over, 150, "the flood does not end")
            await flooding
        packages = await asyncio.gather(*insisting)
    grown = max(memory) - memory[0]
    print(  # noqa: T201 - figures are half of its purpose
        f"{dict(flood.statuses)} after {flood.longest:.1f} s at most, {grown >> 20} MiB more, a question {asked}"
    )
    async with open_kafka_log(settings) as log:
        recorded = Counter(event.package_id for event in await read_valid(log))
    expected = {package, *packages, *flood.acknowledged}
    assert {recorded[found] for found in expected} == {1}
    assert set(flood.statuses) <= {201, *BUSY}
    assert flood.statuses[201] > 0
    assert any(flood.statuses[status] for status in BUSY), "nothing was pushed back"
    assert flood.without_retry_after == 0
    # The gateway reads and decodes these requests for as long as they may wait for the log.
    assert flood.longest < 2 * SUBMIT_SECONDS + SLACK_SECONDS
    assert grown < MORE_MEMORY
    # A question that nobody answers is refused early: nothing is recorded by it.
    assert asked[0] in (201, *BUSY)
    assert asked[1] < 2 * (CHECK_SECONDS + SLACK_SECONDS)


@dataclass(frozen=True)
class Answered:
    """What a plain client heard of a write, and when."""

    status: int
    problem: dict[str, str]
    retry_after: str | None
    seconds: float


async def write(gateway: RunningGateway, method: str, path: str, key: UUID, **body: Any) -> Answered:
    began, headers = monotonic(), {"Idempotency-Key": str(key)}
    async with gateway.session.request(method, path, headers=headers, **body) as answer:
        found = await answer.json()
        return Answered(answer.status, found, answer.headers.get("Retry-After"), monotonic() - began)


@pytest.mark.parametrize(
    ("fault", "mend"),
    [("freeze", "thaw"), pytest.param("kill", "start", marks=pytest.mark.endurance)],
)
async def test_while_kafka_is_away_every_write_is_answered_in_time_and_told_why(
    cluster: ProxiedCluster, tmp_path: Path, fault: str, mend: str
) -> None:
    broker = cluster.brokers[0]
    settings = kafka_settings(
        f"kafka://{broker.endpoint}/away-{fault}",
        tmp_path,
        blobs_url=f"file:{tmp_path / 'blobs'}",
        views_url=f"sqlite+aiosqlite:///{tmp_path / 'views.db'}",
    )
    async with open_kafka_log(settings) as log:
        async with running_gateway(settings) as gateway:
            await gateway.parts.blobs.migrate()
            packages = [
                await gateway.parts.registry.create_package("n", "p", "s", "scratch", "ada", {}) for _ in range(2)
            ]
            new = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch"}
            writes: list[tuple[str, str, UUID, dict[str, Any]]] = [
                *(("POST", "/v1/packages", uuid4(), {"json": new}) for _ in range(4)),
                ("PUT", f"/v1/packages/{packages[0]}/files/a", uuid4(), {"data": b"x"}),
                ("POST", f"/v1/packages/{packages[1]}/finalize", uuid4(), {}),
            ]
            await asyncio.to_thread(getattr(broker, fault))
            try:
                refused = await asyncio.gather(*(write(gateway, m, p, key, **body) for m, p, key, body in writes))
            finally:
                await asyncio.to_thread(getattr(broker, mend))

            async def all_done() -> bool:
                again = await asyncio.gather(*(write(gateway, m, p, key, **body) for m, p, key, body in writes))
                return all(answer.status in (200, 201) for answer in again)

            await until(all_done, 60, "writes do not go on")
        recorded = await read_valid(log)
    for answer in refused:
        assert answer.status == 503, answer
        assert answer.seconds < LONGEST_SECONDS, answer
        assert answer.retry_after is not None
        assert "partition" in answer.problem["detail"], answer
        assert "KafkaError" not in answer.problem["detail"]
    # Nobody knows what became of a command that was on its way.
    assert all("unknown" in answer.problem["detail"] for answer in (*refused[:4], refused[5])), refused
    assert len(recorded) == len(packages) + len(writes)
