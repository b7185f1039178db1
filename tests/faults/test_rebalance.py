"""Partitions move between gateways while commands are in progress: each is settled once, none is refused."""

from __future__ import annotations

import pytest

from services.config import Settings
from tests.contract.log_stage import ready
from tests.faults.callers import Callers
from tests.integration.kafka_stage import gateway, open_kafka_log, shared

pytestmark = pytest.mark.services

MOVES = 3


async def test_batches_go_on_while_gateways_come_and_go(kafka: Settings) -> None:
    async with open_kafka_log(kafka) as log, gateway(kafka, log) as staying:
        await ready(staying)
        callers = Callers(staying, callers=48)
        await callers.grow()
        for _ in range(MOVES):
            async with gateway(kafka, log) as coming:
                await shared(staying, coming)
                await callers.grow(100)
            await callers.grow(100)
        await callers.end(log)
