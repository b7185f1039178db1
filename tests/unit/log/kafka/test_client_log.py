"""Messages of the Kafka client library reach an operator once, not once for each client and second."""

from __future__ import annotations

import logging

import pytest

from services.log.kafka.connection import CLIENT_LOGGER, ClientLines
from services.runtime.logs import REPEAT_SECONDS

REFUSED = (
    "FAIL [{client}] [thrd:{name}]: {name}: Connect to ipv4#10.0.0.7:9092 failed: Connection refused "
    "(after {n}ms in state CONNECT, {n} identical error(s) suppressed)"
)
OTHER = (
    "FAIL [{client}] [thrd:10.0.0.8:9092/2]: 10.0.0.8:9092/2: Connect to ipv4#10.0.0.8:9092 failed: Connection refused"
)
LOST = (
    "FAIL [artifact-store#consumer-1] [thrd:sasl_ssl://kafka-1:9093/bootstrap]: sasl_ssl://kafka-1:9093/bootstrap: "
    "Disconnected (after 2ms in state UP)"
)

FENCED = (
    "TXNERR [artifact-store#producer-3] [thrd:127.0.0.1:9092/1]: Current transaction failed in state InTransaction: "
    "ProduceRequest for events [0] with 1 message(s) failed: Local: Message timed out"
)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that come through while the clock stands where the test puts it."""
    now = [0.0]
    monkeypatch.setattr(CLIENT_LOGGER, "filters", [ClientLines(lambda: now[0])])
    caplog.set_level(logging.INFO, CLIENT_LOGGER.name)
    for second in range(int(2.5 * REPEAT_SECONDS)):
        now[0] = float(second)
        for client, name in (
            ("artifact-store#consumer-1", "10.0.0.7:9092/1"),
            ("http://127.0.0.1:4711#producer-22", "10.0.0.7:9092/bootstrap"),
            ("http://127.0.0.1:4711#producer-22", "TxnCoordinator: 10.0.0.7:9092"),
        ):
            CLIENT_LOGGER.error("%s", REFUSED.format(client=client, name=name, n=second))
    CLIENT_LOGGER.error("%s", OTHER.format(client="artifact-store#consumer-1"))
    CLIENT_LOGGER.error("%s", LOST)
    CLIENT_LOGGER.error("%s", FENCED)
    return caplog.messages


def test_a_broker_is_named_once_in_a_while_by_whichever_name_and_client_with_how_often_it_was_meanwhile(
    said: list[str],
) -> None:
    refused = [line for line in said if "10.0.0.7" in line]
    often = int(3 * REPEAT_SECONDS) - 1
    assert [line.rpartition("refused")[2] for line in refused] == [
        "",
        f" (and {often} times more)",
        f" (and {often} times more)",
    ]
    assert refused[0] == "the Kafka broker 10.0.0.7:9092 cannot be reached: Connection refused"


def test_a_connection_that_was_lost_is_named_with_its_cause(said: list[str]) -> None:
    assert "a connection to the Kafka broker kafka-1:9093 failed: Disconnected" in said


def test_what_one_broker_does_is_no_error(said: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert said
    assert {record.levelname for record in caplog.get_records("setup")} == {"WARNING"}


def test_what_is_said_of_another_broker_is_not_held_back(said: list[str]) -> None:
    assert sum("10.0.0.8" in line for line in said) == 1


def test_what_comes_back_as_an_error_of_a_call_is_not_said_twice(said: list[str]) -> None:
    assert not any("transaction" in line for line in said)
