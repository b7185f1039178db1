"""A writer on a full disk keeps its state in memory, reports that, and returns to its file when it can."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from artifact_store.models import Acknowledgement
from services.core.decide import Command
from services.log.kafka import KafkaWriter
from tests.contract.log_invariants import assert_recorded_once, read_valid
from tests.contract.log_stage import PATIENCE_SECONDS, ready
from tests.integration.conditions import until
from tests.integration.kafka_stage import create_in, kafka_settings, lone_writer, open_kafka_log

pytestmark = pytest.mark.services

DISK_KIB = 4_000


@pytest.mark.parametrize("begin", ["with a file", "without a file"])
async def test_commands_are_acknowledged_while_the_disk_of_the_state_is_full(
    kafka_url: str, tmp_path: Path, begin: str
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size={DISK_KIB}k none {disk}"
    child = await asyncio.create_subprocess_exec(
        *("unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"),
        *(sys.executable, "-m", "tests.faults.test_state_disk_full", kafka_url, str(disk), begin),
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await child.communicate()
    assert child.returncode == 0, said.decode()


def fill(path: Path) -> None:
    """Take all that is left of a small disk."""
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    try:
        while True:
            os.write(file, bytes(512))
    except OSError:
        os.close(file)


async def scenario(url: str, disk: Path, begin: str) -> None:
    """Run on the small disk."""
    settings = kafka_settings(url, disk, kafka_partitions=1)
    (disk / "state").mkdir()
    async with open_kafka_log(settings) as log:
        commands = [create_in(0) for _ in range(3_000)]
        done: list[tuple[Command, Acknowledgement]] = []

        async def carry_out(writer: KafkaWriter, number: int) -> None:
            some, commands[:number] = commands[:number], []
            done.extend(zip(some, await asyncio.gather(*map(writer.submit, some)), strict=True))

        async def saved(writer: KafkaWriter) -> bool:
            await carry_out(writer, 1)
            return (await writer.status())[0].memory_only is None

        async def in_memory(writer: KafkaWriter) -> bool:
            return not await saved(writer)

        if begin == "with a file":
            async with lone_writer(settings, log) as writer:
                await ready(writer)
                await carry_out(writer, 100)
        fill(disk / "other")
        async with lone_writer(settings, log) as writer:
            await ready(writer)
            await until(lambda: in_memory(writer), PATIENCE_SECONDS, "a full disk is not shown")
            await carry_out(writer, 1_000)
            assert (await writer.status())[0].restored_from == ("file" if begin == "with a file" else "log")
            (disk / "other").unlink()
            await until(lambda: saved(writer), PATIENCE_SECONDS, "the state does not go back to its file")
            assert writer.counts.failed_takeovers == 0
        async with lone_writer(settings, log) as writer:
            await ready(writer)
            assert (await writer.status())[0].restored_from == "file"
            await carry_out(writer, 1)
        assert_recorded_once(await read_valid(log), done)


if __name__ == "__main__":
    from services.log.state import state_file

    state_file.SPARE_BYTES = 0
    asyncio.run(scenario(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
