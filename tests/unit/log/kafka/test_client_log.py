"""What the Kafka client library logs reaches an operator once, not once a client and a second."""

from __future__ import annotations

import logging

import pytest

from services.log.kafka.connection import CLIENT_LOGGER, ClientLines
from services.runtime.logs import REPEAT_SECONDS

REFUSED = (
    "FAIL [{client}] [thrd:10.0.0.7:9092/1]: 10.0.0.7:9092/1: Connect to ipv4#10.0.0.7:9092 failed: Connection refused "
    "(after {n}ms in state CONNECT, {n} identical error(s) suppressed)"
)
OTHER = (
    "FAIL [{client}] [thrd:10.0.0.8:9092/2]: 10.0.0.8:9092/2: Connect to ipv4#10.0.0.8:9092 failed: Connection refused"
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
        for client in ("artifact-store#consumer-1", "http://127.0.0.1:4711#producer-22"):
            CLIENT_LOGGER.error("%s", REFUSED.format(client=client, n=second))
    CLIENT_LOGGER.error("%s", OTHER.format(client="artifact-store#consumer-1"))
    CLIENT_LOGGER.error("%s", FENCED)
    return caplog.messages


def test_a_line_comes_once_in_a_while_whichever_client_says_it_with_how_often_it_came_meanwhile(
    said: list[str],
) -> None:
    refused = [line for line in said if "10.0.0.7" in line]
    often = int(2 * REPEAT_SECONDS) - 1
    assert [line.rpartition("refused")[2] for line in refused] == [
        "",
        f" (and {often} times more)",
        f" (and {often} times more)",
    ]
    assert refused[0] == ("the Kafka client: 10.0.0.7:9092/1: Connect to ipv4#10.0.0.7:9092 failed: Connection refused")


def test_what_is_said_of_another_broker_is_not_held_back(said: list[str]) -> None:
    assert sum("10.0.0.8" in line for line in said) == 1


def test_what_comes_back_as_an_error_of_a_call_is_not_said_twice(said: list[str]) -> None:
    assert not any("transaction" in line for line in said)
