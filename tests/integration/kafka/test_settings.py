"""The settings of a Kafka log: accepted values, and no secret is ever shown."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest
from confluent_kafka import murmur2

from artifact_store.errors import ConfigurationError
from services.config import Settings
from services.log.kafka.connection import KafkaSettings, partition_of


@pytest.mark.parametrize(
    "url",
    [
        "kafka://127.0.0.1:9092",
        "kafka://127.0.0.1/prefix",
        "kafka://ada:secret@127.0.0.1:9092/prefix",
        "kafka://127.0.0.1:9092/prefix/more",
        "kafka://127.0.0.1:9092/ünicode",
        "kafka:///prefix",
    ],
)
def test_a_log_url_of_another_form_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        KafkaSettings.of(Settings(log_url=url))
    assert "secret" not in refused.value.detail
    assert url not in refused.value.detail


def test_several_brokers_and_further_client_settings_are_taken() -> None:
    found = KafkaSettings.of(
        Settings(
            log_url="kafka://one:9092,two.example:9093,[::1]:9094/lab.run_1",
            kafka_options={"sasl.password": "hidden-value", "socket.nagle.disable": True, "session.timeout.ms": 9000},
        )
    )
    assert found.bootstrap == "one:9092,two.example:9093,[::1]:9094"
    assert found.topic == "lab.run_1.events"
    assert found.admin()["socket.nagle.disable"] == "true"
    assert found.member(found.writers_group, "x", {})["session.timeout.ms"] == 9000
    assert "hidden-value" not in repr(found)


@pytest.mark.parametrize(
    "name", ["acks", "isolation.level", "transactional.id", "enable.auto.commit", "group.id", "no.such"]
)
def test_client_settings_that_the_guarantees_stand_on_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        KafkaSettings.of(Settings(log_url="kafka://h:1/p", kafka_options={name: "1"}))


@pytest.mark.parametrize(
    "name",
    ["plugin.library.paths", "ssl.engine.location", "ssl.engine.id", "ssl.providers", "sasl.kerberos.kinit.cmd"],
)
def test_client_settings_that_run_code_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}: it .*(loads code|runs a command)") as refused:
        KafkaSettings.of(Settings(log_url="kafka://h:1/p", kafka_options={name: "hidden-value"}))
    assert "hidden-value" not in refused.value.detail


def test_a_kerberos_name_cannot_extend_the_command_that_it_goes_into() -> None:
    options = {"sasl.kerberos.principal": "kafka/host.example@REALM", "sasl.kerberos.keytab": "/etc/kafka.keytab"}
    assert KafkaSettings.of(Settings(log_url="kafka://h:1/p", kafka_options=options)).options == options
    with pytest.raises(ConfigurationError, match=r"sasl\.kerberos\.principal .*shell command"):
        KafkaSettings.of(Settings(log_url="kafka://h:1/p", kafka_options={"sasl.kerberos.principal": "x; touch y"}))


@pytest.mark.parametrize(
    "name",
    [
        "security.protocol",
        "ssl.ca.location",
        "ssl.ca.pem",
        "ssl.certificate.location",
        "ssl.certificate.pem",
        "ssl.key.location",
        "ssl.key.pem",
        "ssl.key.password",
        "ssl.keystore.location",
        "ssl.keystore.password",
        "ssl.crl.location",
        "ssl.cipher.suites",
        "ssl.curves.list",
        "ssl.sigalgs.list",
        "ssl.endpoint.identification.algorithm",
        "enable.ssl.certificate.verification",
        "https.ca.location",
        "sasl.mechanism",
        "sasl.mechanisms",
        "sasl.username",
        "sasl.password",
        "sasl.kerberos.service.name",
        "sasl.oauthbearer.method",
        "sasl.oauthbearer.client.secret",
        "sasl.oauthbearer.token.endpoint.url",
        "sasl.oauthbearer.assertion.private.key.file",
    ],
)
def test_every_other_client_setting_of_security_can_be_set(name: str) -> None:
    found = KafkaSettings.of(Settings(log_url="kafka://h:1/p", kafka_options={name: "value"}))
    assert found.admin()[name] == "value"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_the_partitioner_is_the_one_of_kafka_s_own_java_client(key: bytes, expected: int) -> None:
    """Vectors of `UtilsTest.testMurmur2` in Apache Kafka."""
    assert murmur2(key, 2**31 - 1) == (expected & 0x7FFFFFFF) % (2**31 - 1)


def test_a_package_s_partition_comes_from_the_text_of_its_id() -> None:
    package = UUID("00000000-0000-4000-8000-000000000001")
    assert partition_of(package, 6) == murmur2(b"00000000-0000-4000-8000-000000000001", 6)
    assert {partition_of(uuid4(), 6) for _ in range(500)} == set(range(6))
