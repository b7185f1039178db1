"""Between a writer and its broker, requests are delayed, answers get lost and connections break.

librdkafka speaks the older transaction protocol, in which a late request of an earlier transaction can be taken for one
of a later transaction (KIP-890 explains this, and ends it for clients that speak the newer protocol). Each test prints
its seed; `FAULT_SEED` repeats it.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from artifact_store.errors import UnavailableError
from services.log.kafka import KafkaLog, driver
from services.log.kafka import cluster as questions
from tests.contract.log_stage import ready
from tests.faults.callers import Callers
from tests.faults.proxy import ADD_PARTITIONS_TO_TXN, END_TXN, LIST_OFFSETS, PRODUCE, Network, ProxiedCluster
from tests.integration.conditions import until
from tests.integration.kafka_stage import gateway, kafka_settings, lone_writer, open_kafka_log, shared

pytestmark = pytest.mark.services

QUICK = {"session.timeout.ms": 1_500, "heartbeat.interval.ms": 300, "transaction.timeout.ms": 2_000}
"""What cannot be heard is given up soon."""

COMMIT_SECONDS = 4.0
"""As in the product: longer than a transaction may take until the coordinator ends it."""

TOO_LATE_SECONDS = 6.0
"""Longer than both."""

NAMES = {END_TXN: "end-txn", PRODUCE: "produce", ADD_PARTITIONS_TO_TXN: "add-partitions"}
every_kind = pytest.mark.parametrize("kind", NAMES, ids=NAMES.values())


@pytest.fixture(autouse=True)
def quick_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "COMMIT_SECONDS", COMMIT_SECONDS)


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("FAULT_SEED") or random.randrange(2**32))
    print(f"seed {seed}")  # noqa: T201  shown when the test fails
    return random.Random(seed)


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """A topic of the test's own."""
    return "".join(c if c.isalnum() else "-" for c in request.node.name)


async def arrived(network: Network, kind: int, more: int = 1) -> None:
    """Wait until this many more requests of the kind were held up."""
    enough = network.delayed[kind] + more

    async def there() -> bool:
        return network.delayed[kind] >= enough

    await until(there, 30, f"no {NAMES[kind]} was sent")


async def on_one_writer(
    cluster: ProxiedCluster, folder: Path, prefix: str, faults: Callable[[Callers], Awaitable[None]]
) -> None:
    """Load on a writer behind the network, faults, more load, the oracle."""
    settings = kafka_settings(f"kafka://{cluster.proxied_endpoint}/{prefix}", folder, kafka_options=QUICK)
    async with open_kafka_log(settings) as log, lone_writer(settings, log) as writer:
        await ready(writer)
        callers = Callers(writer)
        await callers.grow()
        await faults(callers)
        await ready(writer)
        await callers.grow()
        await callers.end(log)


@every_kind
async def test_a_request_that_comes_while_its_transaction_lasts_is_only_late(
    cluster: ProxiedCluster, network: Network, tmp_path: Path, prefix: str, kind: int
) -> None:
    async def late(callers: Callers) -> None:
        with network.holding(1.0, kind):
            await arrived(network, kind)
        await callers.grow()

    await on_one_writer(cluster, tmp_path, prefix, late)


@every_kind
async def test_a_request_that_comes_when_its_transaction_has_timed_out_changes_nothing(
    cluster: ProxiedCluster, network: Network, tmp_path: Path, prefix: str, kind: int
) -> None:
    async def too_late(callers: Callers) -> None:
        with network.holding(TOO_LATE_SECONDS, kind):
            await arrived(network, kind)
        await callers.grow()
        await asyncio.sleep(TOO_LATE_SECONDS)  # in which what was held comes, to a partition that has moved on
        await callers.grow()

    await on_one_writer(cluster, tmp_path, prefix, too_late)


@every_kind
async def test_a_request_that_was_sent_again_and_comes_a_second_time_in_a_later_transaction_changes_nothing(
    cluster: ProxiedCluster, network: Network, tmp_path: Path, prefix: str, kind: int, rng: random.Random
) -> None:
    async def twice(callers: Callers) -> None:
        for _ in range(8):
            with network.holding(rng.uniform(0.05, 1.2), kind):
                await arrived(network, kind)
            network.cut()
            await callers.grow(100)

    await on_one_writer(cluster, tmp_path, prefix, twice)


@every_kind
async def test_an_answer_that_is_lost_leaves_nothing_in_doubt(
    cluster: ProxiedCluster, network: Network, tmp_path: Path, prefix: str, kind: int
) -> None:
    async def lost(callers: Callers) -> None:
        for _ in range(5):
            before = network.lost[kind]
            with network.losing_answers(kind):

                async def seen(before: int = before) -> bool:
                    return network.lost[kind] > before

                await until(seen, 30, "no answer was lost")
            await callers.grow()

    await on_one_writer(cluster, tmp_path, prefix, lost)


async def test_connections_that_break_again_and_again_are_only_a_delay(
    cluster: ProxiedCluster, network: Network, tmp_path: Path, prefix: str, rng: random.Random
) -> None:
    async def cuts(callers: Callers) -> None:
        for _ in range(30):
            network.cut()
            await asyncio.sleep(rng.uniform(0, 0.2))  # not to wait for anything: the moment is to be any
        await callers.grow()

    await on_one_writer(cluster, tmp_path, prefix, cuts)


async def test_an_owner_that_cannot_be_heard_and_comes_back_neither_writes_nor_disturbs_its_successor(
    cluster: ProxiedCluster, network: Network, tmp_path: Path, prefix: str
) -> None:
    near = kafka_settings(f"kafka://{cluster.endpoint}/{prefix}", tmp_path / "near", kafka_options=QUICK)
    far = kafka_settings(f"kafka://{cluster.proxied_endpoint}/{prefix}", tmp_path / "far", kafka_options=QUICK)
    far_log = KafkaLog(far)
    async with open_kafka_log(near) as log:
        await far_log.check()
        async with gateway(near, log) as successor, gateway(far, far_log) as owner:
            await shared(successor, owner)
            callers = Callers(successor, owner)
            await callers.grow()
            with network.silent():

                async def taken_over() -> bool:
                    return all(status.since is not None for status in await successor.status())

                await until(taken_over, 30, "nobody takes over")
                await asyncio.sleep(4)  # the fault is a time: longer than a transaction may take
            await shared(successor, owner)
            await callers.grow()
            await callers.end(log)
    await far_log.close()


async def test_a_lost_answer_about_the_end_of_the_log_is_never_taken_for_an_empty_log(
    cluster: ProxiedCluster, network: Network, tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unheard(callers: Callers) -> None:
        await callers.grow()

    await on_one_writer(cluster, tmp_path, prefix, unheard)
    settings = kafka_settings(f"kafka://{cluster.proxied_endpoint}/{prefix}", tmp_path, kafka_options=QUICK)
    async with open_kafka_log(settings) as log:
        ask = log.cluster.high_watermark
        assert (await log.blocking(lambda: ask([0])))[0] > 0
        with monkeypatch.context() as impatient, network.losing_answers(LIST_OFFSETS):
            impatient.setattr(questions, "ANSWER_SECONDS", 1.0)
            with pytest.raises(UnavailableError):
                await log.blocking(lambda: ask([0]))
        assert network.lost[LIST_OFFSETS] > 0
        assert (await log.blocking(lambda: ask([0])))[0] > 0
