"""Events with a principal on Kafka: written by any gateway, once every process can read them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from uuid import uuid4

import pytest
from confluent_kafka import Consumer

from artifact_store.errors import CommandReusedError, PushBackError
from artifact_store.models import Acknowledgement
from services.config import Settings
from services.core.access import EVERYTHING
from services.core.decide import Command, FinalizePackage, IngestCheck, IngestFiles
from services.log.kafka import KafkaLog
from services.log.kafka import writer as writers
from tests.commands import stored
from tests.contract.log_invariants import assert_recorded_once, read_valid
from tests.contract.log_stage import ready
from tests.integration.kafka_stage import PARTITIONS, create_in, gateway, lone_writer, shared

pytestmark = pytest.mark.services


async def test_a_sender_beside_the_actor_is_recorded_whichever_gateway_is_asked(kafka: Settings, log: KafkaLog) -> None:
    done: list[tuple[Command, Acknowledgement]] = []
    async with gateway(kafka, log) as one, gateway(kafka, log) as two:
        await shared(one, two)
        await ready(one)
        await ready(two)
        for n in range(PARTITIONS):
            made = replace(create_in(n), actor="ci:user", principal="ada")
            added = IngestFiles(made.package_id, uuid4(), "ci:user", (stored("a"), stored("b")), principal="ada")
            own = IngestFiles(made.package_id, uuid4(), "ci:user", (stored("c"),))
            ended = FinalizePackage(made.package_id, uuid4(), "ci:user", principal="ada")
            commands: tuple[Command, ...] = (made, added, own, ended)
            for at, command in enumerate(commands):
                done.append((command, await (one, two)[at % 2].submit(command)))
    async with lone_writer(kafka, log) as successor:
        await ready(successor)
        for command, answer in done:
            assert await successor.submit(command) == answer
            if not isinstance(command, FinalizePackage):
                with pytest.raises(CommandReusedError):
                    await successor.submit(replace(command, principal="eve"))
    events = await read_valid(log)
    assert_recorded_once(events, done)
    senders = {command.command_id: command.principal for command, _ in done}
    assert {event.command_id: event.principal for event in events} == senders


@asynccontextmanager
async def old_projector(log: KafkaLog) -> AsyncIterator[None]:
    """A member of a projection's group that cannot read version 2 of an event."""
    consumer = Consumer(
        {
            "bootstrap.servers": log.kafka.bootstrap,
            "group.id": log.kafka.projector_group("registry"),
            "client.id": "artifact-store-projector/v2",
        }
    )
    consumer.subscribe([log.kafka.topic])
    try:
        while not consumer.assignment():
            await asyncio.to_thread(consumer.poll, 0.1)
        yield
    finally:
        await asyncio.to_thread(consumer.close)


async def test_an_older_reader_never_meets_an_event_that_it_cannot_read(
    kafka: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "_READERS_SECONDS", 0.0)
    made = create_in(0)
    delegated = IngestFiles(made.package_id, uuid4(), "ci:user", (stored("a"),), principal="ada")
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        async with old_projector(log):
            await writer.submit(made)
            with pytest.raises(PushBackError, match=r"artifact-store-projector/v2 .* upgrade it or end it"):
                await writer.submit(delegated)
            with pytest.raises(PushBackError, match="artifact-store-projector/v2"):
                await writer.check_ingest(IngestCheck(made.package_id, ["a"], None, EVERYTHING, "ada"))
        await writer.submit(delegated)
    assert [event.principal for event in await read_valid(log)] == [None, "ada"]
