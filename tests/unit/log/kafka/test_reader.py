"""A reader of given partitions when the broker answers with an error instead of a record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest

from artifact_store.errors import CorruptError, UnavailableError
from services.config import Settings
from services.log.kafka.cluster import Cluster
from services.log.kafka.connection import KafkaSettings
from services.log.kafka.tail import Reader


@pytest.fixture
def beyond() -> Iterator[Reader]:
    """It reads from an offset beyond the end, in a broker that the client library plays itself, and others agree."""
    options: dict[str, str | int | float] = {"test.mock.num.brokers": 1, "allow.auto.create.topics": "true"}
    kafka = replace(KafkaSettings.of(Settings(log_url="kafka://127.0.0.1:9/made")), options=options)
    reader = Reader(kafka, {0: 5}, Agreeing(kafka))
    yield reader
    reader.close()


class Agreeing(Cluster):
    """Whatever lies outside of one broker's log lies outside of every broker's. The played broker has no settings."""

    def framing(self) -> None:
        """See `Cluster`."""

    def outside(self, offsets: Mapping[int, int]) -> dict[int, tuple[int, int]]:
        """See `Cluster`."""
        return dict.fromkeys(offsets, (0, 0))


class Denying(Cluster):
    """Whatever lies outside of one broker's log lies in those of the others."""

    def outside(self, offsets: Mapping[int, int]) -> dict[int, tuple[int, int]]:
        """See `Cluster`."""
        return {}


def test_one_broker_that_lacks_an_offset_is_not_believed(beyond: Reader) -> None:
    beyond._cluster = Denying(beyond._cluster._kafka)
    with pytest.raises(UnavailableError, match="cut off from the others"):
        beyond.take(10, 30)


def test_taking_values_raises_the_error_that_comes_in_their_place(beyond: Reader) -> None:
    with pytest.raises(CorruptError, match="reading the log"):
        beyond.take_values(1, 30)


def test_taking_what_is_there_raises_the_error_that_comes_in_its_place(beyond: Reader) -> None:
    with pytest.raises(CorruptError, match="reading the log"):
        beyond.take(10, 30)
