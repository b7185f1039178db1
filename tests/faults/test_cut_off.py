"""A gateway that cannot reach one of several brokers leaves that broker's partitions to a gateway that can."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from services.log.kafka import KafkaLog, KafkaWriter, driver
from services.log.kafka import ownership as group
from services.log.sequencer import partition_writer as writer
from tests.contract.log_stage import ready
from tests.faults.callers import Callers
from tests.faults.proxy import ProxiedCluster
from tests.faults.torture.leaders import coordinated_by, in_sync, leaders
from tests.integration.conditions import until
from tests.integration.kafka_stage import gateway, kafka_settings, open_kafka_log, owned, shared

pytestmark = pytest.mark.services

QUICK = {"session.timeout.ms": 3_000, "heartbeat.interval.ms": 300, "transaction.timeout.ms": 2_000}


@pytest.fixture(autouse=True)
def patient_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be written waits for as long as the fault lasts, which on a busy machine is long."""
    monkeypatch.setattr("tests.contract.log_stage.PATIENCE_SECONDS", 200.0)
    monkeypatch.setattr("tests.faults.callers.PATIENCE_SECONDS", 200.0)


async def away(cluster: ProxiedCluster, log: KafkaLog, owner: KafkaWriter) -> int | None:
    """The number of a broker that leads a partition of the owner and does not keep its group; None: there is none."""
    led = await asyncio.to_thread(leaders, cluster.endpoint, log.kafka.topic)
    groups = await asyncio.to_thread(leaders, cluster.endpoint, "__consumer_offsets")
    keeper = groups[coordinated_by(log.kafka.writers_group, len(groups))]
    found = [led[partition] for partition in sorted(await owned(owner)) if led[partition] != keeper]
    return found[0] - 1 if found else None


async def test_what_cannot_be_written_from_here_is_written_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "COMMIT_SECONDS", 4.0)
    monkeypatch.setattr(driver, "INIT_SECONDS", 4.0)
    monkeypatch.setattr(writer, "_GIVE_WAY_SECONDS", 3.0)
    monkeypatch.setattr(group, "AWAY_SECONDS", (10.0, 20.0))
    with ProxiedCluster(tmp_path / "cluster") as cluster:
        near = kafka_settings(f"kafka://{cluster.endpoint}/cut-off", tmp_path / "near", kafka_options=QUICK)
        far = kafka_settings(f"kafka://{cluster.proxied_endpoint}/cut-off", tmp_path / "far", kafka_options=QUICK)
        far_log = KafkaLog(far)
        async with open_kafka_log(near) as log, cluster.network() as network:

            async def whole() -> bool:
                return await asyncio.to_thread(in_sync, cluster)

            await until(whole, 60, "the brokers are not all there")
            await far_log.check()
            # It owns two of the three partitions, which different brokers lead: one of them does not keep the group.
            async with gateway(far, far_log) as owner:
                await ready(owner)
                async with gateway(near, log) as other:
                    await shared(other, owner)
                    broker = await away(cluster, log, owner)
                    assert broker is not None
                    callers = Callers(other, owner)
                    await callers.grow()
                    with network.without(broker):

                        async def taken_over() -> bool:
                            return all(status.since is not None for status in await other.status())

                        await until(taken_over, 120, "nobody takes over what cannot be written to")
                        await callers.grow()
                        assert await owner.ready() is None, "it can answer for all partitions: it forwards"
                    await shared(other, owner)
                    await callers.grow()
                    await callers.end(log)
        await far_log.close()
