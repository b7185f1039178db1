"""A separate process asks for the members of a group: its answers, and the cost of its end and its silence."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from artifact_store.errors import ConfigurationError, UnavailableError
from services.config import Settings
from services.log.kafka import KafkaLog, group_process
from services.log.kafka.group_process import GroupProcess
from tests.contract.log_stage import ready
from tests.integration.conditions import until
from tests.integration.kafka_stage import lone_writer
from tests.services.process import Identity

pytestmark = pytest.mark.services

SECONDS = 30.0

PARENT = """
import json, sys
from services.log.kafka.connection import KafkaSettings
from services.log.kafka.group_process import GroupProcess
print(GroupProcess(KafkaSettings(**json.loads(sys.argv[1])))._start().pid, flush=True)
sys.stdin.read()
"""


async def test_an_asker_that_aborts_is_replaced_and_costs_no_answer(kafka: Settings, log: KafkaLog) -> None:
    group, asker = log.kafka.writers_group, GroupProcess(log.kafka)
    try:
        async with lone_writer(kafka, log) as writer:
            await ready(writer)
            expected = await asyncio.to_thread(log.cluster.members, group)
            assert expected
            assert expected[0].partitions
            assert await asyncio.to_thread(asker.members, group) == expected
            first = asker._child
            assert first is not None
            os.kill(first.pid, signal.SIGABRT)
            assert await asyncio.to_thread(asker.members, group) == expected
            second = asker._child
            assert second is not None
            assert second.pid != first.pid
            # It ends in the middle of a question.
            os.kill(second.pid, signal.SIGSTOP)
            asked = [asyncio.create_task(asyncio.to_thread(asker.members, group)) for _ in range(3)]

            async def under_way() -> bool:
                return asker._asking.locked()

            await until(under_way, SECONDS, "nobody asks")
            os.kill(second.pid, signal.SIGABRT)
            os.kill(second.pid, signal.SIGCONT)
            assert await asyncio.gather(*asked) == [expected] * 3
    finally:
        await asyncio.to_thread(asker.close)
    assert asker._child is None


async def test_an_asker_that_keeps_silent_is_replaced_in_time(
    kafka: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, asker = log.kafka.writers_group, GroupProcess(log.kafka)
    try:
        async with lone_writer(kafka, log) as writer:
            await ready(writer)
            expected = await asyncio.to_thread(asker.members, group)
            assert asker._child is not None
            os.kill(asker._child.pid, signal.SIGSTOP)
            monkeypatch.setattr(group_process, "_CHILD_SECONDS", 0.2)
            with pytest.raises(UnavailableError, match="nobody says who"):
                await asyncio.to_thread(asker.members, group)
            monkeypatch.undo()
            assert await asyncio.to_thread(asker.members, group) == expected
    finally:
        await asyncio.to_thread(asker.close)


@pytest.mark.parametrize(("lasting", "kind"), [("true", ConfigurationError), ("false", UnavailableError)])
async def test_an_asker_s_error_is_ours(
    log: KafkaLog, monkeypatch: pytest.MonkeyPatch, lasting: str, kind: type[Exception]
) -> None:
    answer = f'{{"error": "no right to describe it", "lasting": {lasting}}}'
    monkeypatch.setattr(group_process, "_CHILD", f"input(); input(); print({answer!r}, flush=True); input()")
    asker = GroupProcess(log.kafka)
    try:
        with pytest.raises(kind, match="no right to describe it"):
            await asyncio.to_thread(asker.members, "a group")
    finally:
        await asyncio.to_thread(asker.close)


async def test_an_asker_ends_with_a_gateway_that_is_killed() -> None:
    settings = (
        '{"bootstrap": "127.0.0.1:1", "prefix": "x", "partitions": 1, "replication_factor": 1, '
        '"min_insync_replicas": 1, "options": {}}'
    )
    command = [sys.executable, "-c", PARENT, settings]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = Identity.of(int(await asyncio.to_thread(parent.stdout.readline)))
        assert child is not None
        parent.kill()

    async def gone() -> bool:
        return not child.running

    await until(gone, SECONDS, "the asker outlives its parent")
