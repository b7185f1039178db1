"""With ten times the events, catching up and rebuilding keep nine tenths of their ratio to ready-made rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import catch_up, rebuild
from benchmarks.file_events import Amount
from benchmarks.full_log import AMOUNT
from benchmarks.harness import Benchmark, Plan, measure
from benchmarks.result import Result
from services.config import Settings
from tests.integration.kafka_stage import kafka_settings
from tests.services.postgres import PostgresServer

pytestmark = [pytest.mark.services, pytest.mark.processes, pytest.mark.endurance]

Opened = Callable[[Settings, Amount], AbstractAsyncContextManager[Benchmark]]

MOST_RESIDENT_MIB = 300


@pytest.mark.parametrize(
    ("plan", "opened"),
    [(catch_up.PLAN, catch_up.CatchUp.holding), (rebuild.PLAN, rebuild.Rebuild.holding)],
    ids=["catch-up", "rebuild"],
)
async def test_ten_times_the_events_keep_the_ratio(plan: Plan, opened: Opened, kafka_url: str, tmp_path: Path) -> None:
    settings = kafka_settings(kafka_url, tmp_path, kafka_partitions=6)

    async def found(amount: Amount, rounds: int) -> Result:
        with PostgresServer(tmp_path / "postgres", durable=True) as server:
            there = replace(settings, views_url=server.url())
            of_amount = replace(plan, opened=lambda given: opened(given, amount), rounds=rounds)
            return await measure(of_amount, there, print)

    usual = await found(AMOUNT, 3)
    large = await found(Amount(10 * AMOUNT.packages, AMOUNT.files), 2)
    assert large.ratio >= 0.9 * usual.ratio, f"{large.runs} to {usual.runs}"
    for result in (usual, large):
        assert result.details.get("most_resident_mib", 0) < MOST_RESIDENT_MIB
