"""A gateway's writer as a separate process, which stops at a chosen step of a write and reports that.

`python -m tests.faults.kafka_gateway [STEP]`, with settings from the environment. It prints `started`, and `held` when
a transaction that creates a package named `hold` has reached the step, where it stays. SIGTERM closes it in order.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from confluent_kafka import Producer

from artifact_store.events import PackageCreated
from ingest_gateway.peers.membership import kafka_writer
from services.config import Settings
from services.core.decide import Limits
from services.log.kafka import KafkaLog, driver
from services.log.sequencer.driver import Staged
from services.runtime.clock import system_clock
from tests.contract.log_stage import no_manifest

STEPS = ("decided", "produced", "committed", "read-back")
"""Before the transaction begins; when its records lie in the log; when it is committed; when it was read back."""

HOLD = "hold"
"""The name of a package whose creation is held up."""

thawed = threading.Event()
"""Set when the process was frozen and continues; held requests continue then too."""

_holding = threading.local()


def say(word: str) -> None:
    print(word, flush=True)  # noqa: T201 - the process's way to tell the test


def _creates_held(staged: Staged) -> bool:
    return any(isinstance(e.payload, PackageCreated) and e.payload.name == HOLD for e in staged.events)


def hold_at(step: str) -> None:
    """Change the writer of this process so that it stops there, once."""

    def hold(here: str) -> None:
        if here == step and getattr(_holding, "now", False):
            _holding.now = False
            say("held")
            thawed.wait()

    hand_over, commit, read_back = (
        driver.PartitionLease.hand_over,
        driver.PartitionLease.commit,
        driver.PartitionLease._read_back,
    )

    def held_hand_over(self: driver.PartitionLease, staged: Sequence[Staged]) -> list[bytes]:
        _holding.now = any(map(_creates_held, staged))
        hold("decided")
        return hand_over(self, staged)

    def held_commit(self: driver.PartitionLease, values: Sequence[bytes]) -> None:
        commit(self, values)
        hold("read-back")

    def held_read_back(self: driver.PartitionLease, values: Sequence[bytes]) -> int:
        hold("committed")
        return read_back(self, values)

    class HeldProducer(Producer):
        def commit_transaction(self, timeout: float = -1) -> None:
            self.flush(timeout)
            hold("produced")
            super().commit_transaction(timeout)

    def make_held(config: dict[str, Any]) -> Producer:
        return HeldProducer(config)

    driver.PartitionLease.hand_over = held_hand_over  # type: ignore[method-assign]  # what this program is for
    driver.PartitionLease.commit = held_commit  # type: ignore[method-assign]  # what this program is for
    driver.PartitionLease._read_back = held_read_back  # type: ignore[method-assign]  # what this program is for
    driver.make_producer = make_held  # type: ignore[attr-defined]  # what this program is for


async def main(step: str | None) -> None:
    if step is not None:
        hold_at(step)
    settings = Settings.from_env()
    log = KafkaLog(settings)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    # The system sends this one to a process that was frozen.
    loop.add_signal_handler(signal.SIGCONT, thawed.set)
    try:
        async with kafka_writer(settings, log, limits=Limits(), put_manifest=no_manifest, clock=system_clock):
            say("started")
            await stop.wait()
    finally:
        await log.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else None))
