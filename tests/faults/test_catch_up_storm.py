"""Exactly once in effect: whatever happens to processes, groups and database, each view equals one quiet fold.

`CATCH_UPS=3 make endurance` runs fewer of the long ones.
"""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.archives import digests_of
from tests.faults.catch_up_storm import QUICK, CatchUp, Storm, fresh_database, write_history
from tests.integration.kafka_stage import kafka_settings, open_kafka_log
from tests.services.postgres import PostgresServer

pytestmark = [pytest.mark.services, pytest.mark.processes]

SHORT = Storm(catch_ups=1, events=6_000, disturbances=3)
LONG = Storm(catch_ups=int(os.environ.get("CATCH_UPS", "20")), events=100_000, disturbances=10)


@pytest.mark.parametrize("storm", [SHORT, pytest.param(LONG, marks=pytest.mark.endurance)], ids=["short", "long"])
async def test_the_views_are_those_of_one_undisturbed_fold(storm: Storm, kafka_url: str, tmp_path: Path) -> None:
    settings = kafka_settings(kafka_url, tmp_path, kafka_partitions=6, kafka_options=QUICK)
    draw = random.Random(storm.events)
    async with open_kafka_log(settings) as log:
        await asyncio.to_thread(write_history, log, storm.events)
        expected = await digests_of(log, tmp_path)
        with PostgresServer(tmp_path / "postgres") as server:
            for number in range(storm.catch_ups):
                url = await fresh_database(server)
                fold = CatchUp(replace(settings, views_url=url), tmp_path / str(number), server, draw)
                found = await fold.run(log, storm.disturbances)
                assert found == expected, f"catch-up {number} after {fold.done}"
                assert len(fold.done) == storm.disturbances
