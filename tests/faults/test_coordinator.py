"""The group's coordinator is down while every leader is well: members keep their partitions for one session."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.contract.log_stage import PATIENCE_SECONDS, ready
from tests.faults.callers import Callers
from tests.faults.proxy import GROUP_REQUESTS, Network, ProxiedCluster
from tests.integration.conditions import until
from tests.integration.kafka_stage import kafka_settings, lone_writer, open_kafka_log

pytestmark = [pytest.mark.services, pytest.mark.endurance]

AWAY_SECONDS = 8.0
"""Longer than the product's own session time-out."""


async def test_writers_go_on_while_the_coordinator_is_away_for_less_than_their_session(
    cluster: ProxiedCluster, network: Network, tmp_path: Path
) -> None:
    options = {"session.timeout.ms": 60_000}
    settings = kafka_settings(f"kafka://{cluster.proxied_endpoint}/shorter", tmp_path, kafka_options=options)
    async with open_kafka_log(settings) as log, lone_writer(settings, log) as writer:
        await ready(writer)
        takeovers, callers = writer.counts.takeovers.total(), Callers(writer)
        with network.withholding(*GROUP_REQUESTS):
            await asyncio.sleep(AWAY_SECONDS)  # the fault is a time
            await callers.grow()
        await callers.end(log)
        assert writer.counts.takeovers.total() == takeovers


async def test_a_coordinator_that_is_away_for_longer_costs_all_writers_until_it_is_back(
    cluster: ProxiedCluster, network: Network, tmp_path: Path
) -> None:
    """The client library gives the assignment up by its own clock, although nobody else can have got it."""
    options = {"session.timeout.ms": 3_000, "heartbeat.interval.ms": 300}
    settings = kafka_settings(f"kafka://{cluster.proxied_endpoint}/longer", tmp_path, kafka_options=options)
    async with open_kafka_log(settings) as log, lone_writer(settings, log) as writer:
        await ready(writer)
        callers = Callers(writer)
        await callers.grow()
        with network.withholding(*GROUP_REQUESTS):

            async def given_up() -> bool:
                return not writer.status_here()

            await until(given_up, PATIENCE_SECONDS, "the partitions are kept beyond the session")
        await callers.grow()
        await callers.end(log)
