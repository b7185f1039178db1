"""Least privilege on Kafka: each process works with the rights of docs/security and cannot do more.

The broker accepts the product only by SASL_SSL; the plain listener is for the broker itself and the test's own admin.
"""

from __future__ import annotations

import asyncio
import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer
from confluent_kafka.admin import (  # type: ignore[attr-defined] # not in __all__
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewTopic,
    ResourcePatternType,
    ResourceType,
)

from projector import replay, run_projectors
from services.config import Settings
from services.wiring import open_log, open_views, parts
from tests.certificates import Authority
from tests.integration.conditions import until
from tests.integration.processes import output_of, run_command
from tests.services.kafka import KafkaBroker
from tests.services.process import free_ports

pytestmark = pytest.mark.services

ACLS = Path(__file__).parents[3] / "docs" / "security" / "kafka-acls.csv"
PREFIX = "lab"
OTHER = "other.events"
SECONDS = 60.0
PROCESSES = ("gateway", "projector", "replay", "migrate", "verify", "subscriber")


@dataclass(frozen=True)
class Secured:
    """A broker with an authorizer: where the product connects, and the authority of its certificate."""

    broker: KafkaBroker
    port: int
    ca: Path

    def options(self, user: str) -> dict[str, str | int]:
        return {
            "security.protocol": "sasl_ssl",
            "sasl.mechanism": "PLAIN",
            "sasl.username": user,
            "sasl.password": f"{user}-secret",
            "ssl.ca.location": str(self.ca),
        }

    def client(self, user: str) -> dict[str, Any]:
        return {"bootstrap.servers": f"127.0.0.1:{self.port}", "log_level": 0, **self.options(user)}

    def settings(self, user: str, folder: Path) -> Settings:
        return Settings(
            log_url=f"kafka://127.0.0.1:{self.port}/{PREFIX}",
            kafka_partitions=2,
            kafka_replication_factor=1,
            kafka_min_insync_replicas=1,
            kafka_options=self.options(user),
            blobs_url=f"file:{folder}/blobs",
            views_url=f"sqlite+aiosqlite:///{folder}/views.db",
            state_dir=folder / "state",
            listen="127.0.0.1:0",
        )


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    authority = Authority(folder / "certificates")
    certificate, key = authority.issue("broker", "127.0.0.1")
    store = folder / "certificates" / "broker-and-key.pem"
    store.write_text(key.read_text() + certificate.read_text() + authority.certificate.read_text())
    users = " ".join(f'user_{user}="{user}-secret"' for user in PROCESSES)
    login = f"org.apache.kafka.common.security.plain.PlainLoginModule required {users};"
    broker = KafkaBroker(
        folder / "broker",
        options={
            "listener.security.protocol.map": "CLIENT:PLAINTEXT,CONTROLLER:PLAINTEXT,SECURE:SASL_SSL",
            "listener.name.secure.sasl.enabled.mechanisms": "PLAIN",
            "listener.name.secure.plain.sasl.jaas.config": login,
            "listener.name.secure.ssl.keystore.type": "PEM",
            "listener.name.secure.ssl.keystore.location": str(store),
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",
        },
    )
    (port,) = free_ports(1)
    broker.listeners["SECURE"] = (port, port)
    with broker:
        admin = AdminClient({"bootstrap.servers": broker.endpoint})
        waiting = [
            *admin.create_topics([NewTopic(OTHER, 1, 1)]).values(),
            *admin.create_acls(list(bindings())).values(),
        ]
        for each in waiting:
            each.result(SECONDS)
        yield Secured(broker, port, authority.certificate)


def bindings() -> Iterator[AclBinding]:
    """What docs/security/kafka-acls.csv gives, as apply-kafka-acls.sh reads it."""
    kinds = {
        "topic": ResourceType.TOPIC,
        "group": ResourceType.GROUP,
        "transactional-id": ResourceType.TRANSACTIONAL_ID,
    }
    snake = {"DescribeConfigs": "DESCRIBE_CONFIGS", "AlterConfigs": "ALTER_CONFIGS"}
    with ACLS.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for operation in row["operations"].split():
                yield AclBinding(
                    kinds[row["resource"]],
                    row["name"].replace("PREFIX", PREFIX, 1),
                    ResourcePatternType[row["pattern"].upper()],
                    f"User:{row['process']}",
                    "*",
                    AclOperation[snake.get(operation, operation.upper())],
                    AclPermissionType.ALLOW,
                )


async def test_every_process_works_with_its_rights(secured: Secured, tmp_path: Path) -> None:
    as_user = {user: secured.settings(user, tmp_path) for user in PROCESSES}
    log = open_log(as_user["migrate"])
    await log.migrate()
    await log.close()
    async with parts(as_user["gateway"]) as opened:
        await opened.blobs.migrate()
        await opened.views.migrate()
        package = await opened.registry.create_package("n", "p", "s", "scratch")
        await opened.registry.ingest_file(package, "a", "text/plain", b"bytes")
        await opened.registry.finalize_package(package)

    stop = asyncio.Event()
    projecting = asyncio.create_task(run_projectors(as_user["projector"], ["registry"], stop))
    log, views = open_log(as_user["gateway"]), open_views(as_user["gateway"])

    async def caught_up() -> bool:
        return sum((await log.lag("registry")).values()) == 0 and bool(await log.committed("registry"))

    try:
        await until(caught_up, SECONDS, "the projector did not catch up")
    finally:
        stop.set()
        assert await projecting == {}
        await views.close()
        await log.close()
    await replay(as_user["replay"], "registry")
    log = open_log(replace(as_user["verify"]))
    try:
        assert len([event async for event in log.read()]) == 3
    finally:
        await log.close()
    assert await asyncio.to_thread(read_as_subscriber, secured) == 3
    found = json.loads(await asyncio.to_thread(output_of, as_user["verify"], "status", "--json"))
    assert {writer["trouble"] for writer in found["writers"]} == {"no process writes to it"}
    doctor = await asyncio.to_thread(run_command, as_user["verify"], "doctor", "--json")
    causes = {finding["part"]: finding["cause"] for finding in json.loads(doctor.stdout)["findings"]}
    assert causes["log"].startswith(as_user["verify"].log_url)
    assert causes["gateways"] == "0 processes"


def read_as_subscriber(secured: Secured) -> int:
    """How many events an ordinary consumer sees."""
    consumer = Consumer(
        {**secured.client("subscriber"), "group.id": f"{PREFIX}.subscriber.search", "auto.offset.reset": "earliest"}
    )
    consumer.subscribe([f"{PREFIX}.events"])
    seen = 0
    try:
        for _ in range(int(SECONDS)):
            for message in consumer.consume(10, 1.0):
                assert message.error() is None, message.error()
                seen += 1
            if seen == 3:
                break
    finally:
        consumer.close()
    return seen


def refused(act: Any, *codes: int) -> None:
    """Whether the broker refuses what `act` does, for want of a right."""
    with pytest.raises(KafkaException) as caught:
        act()
    assert caught.value.args[0].code() in codes, caught.value


def begin_as_writer(secured: Secured, user: str) -> None:
    producer = Producer({**secured.client(user), "transactional.id": f"{PREFIX}.events-0"})
    producer.init_transactions(20.0)


def join(secured: Secured, user: str, group: str, topic: str) -> None:
    consumer = Consumer({**secured.client(user), "group.id": group, "auto.offset.reset": "earliest"})
    try:
        consumer.subscribe([topic])
        for _ in range(20):
            for message in consumer.consume(1, 1.0):
                if message.error() is not None:
                    raise KafkaException(message.error())
    finally:
        consumer.close()


def create_topic(secured: Secured, user: str) -> None:
    admin = AdminClient(secured.client(user))
    admin.create_topics([NewTopic(f"{PREFIX}.more", 1, 1)])[f"{PREFIX}.more"].result(20)


def produce_plainly(secured: Secured, user: str) -> None:
    """A record without a transaction: what a rogue member would append."""
    errors: list[KafkaError | None] = []
    producer = Producer(secured.client(user))
    producer.produce(f"{PREFIX}.events", b"x", on_delivery=lambda error, _: errors.append(error))
    producer.flush(20)
    if errors and errors[0] is not None:
        raise KafkaException(errors[0])


@pytest.mark.parametrize("user", PROCESSES)
def test_no_process_may_do_what_another_does(secured: Secured, user: str) -> None:
    topic, group = KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED
    refused(lambda: create_topic(secured, user), topic)
    refused(lambda: join(secured, user, f"{PREFIX}.readers", OTHER), topic, group)
    if user != "gateway":
        refused(lambda: begin_as_writer(secured, user), KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED)
        refused(lambda: join(secured, user, f"{PREFIX}.writers", f"{PREFIX}.events"), group, topic)
        refused(lambda: produce_plainly(secured, user), topic)
    if user not in ("projector", "replay"):
        refused(lambda: join(secured, user, f"{PREFIX}.projector.registry", f"{PREFIX}.events"), group, topic)


def test_a_stranger_is_not_let_in_at_all(secured: Secured) -> None:
    told: list[KafkaError] = []
    config: dict[str, Any] = {**secured.client("gateway"), "sasl.password": "guess", "error_cb": told.append}
    admin = AdminClient(config)
    with pytest.raises(KafkaException):
        admin.list_topics(timeout=1)
    admin.poll(1.0)
    assert KafkaError._AUTHENTICATION in {error.code() for error in told}
