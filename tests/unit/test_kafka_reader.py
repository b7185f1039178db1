"""What a reader of given partitions says when the broker answers an error in place of a record."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.config import Settings
from services.errors import CorruptError
from services.log.kafka.reader import Reader
from services.log.kafka.settings import KafkaSettings


@pytest.fixture
def beyond() -> Iterator[Reader]:
    """It reads from an offset beyond the end, in a broker that the client library plays itself."""
    options = {"test.mock.num.brokers": 1, "allow.auto.create.topics": "true"}
    settings = Settings(log_url="kafka://127.0.0.1:9/made", kafka_options=options)
    reader = Reader(KafkaSettings.of(settings), {0: 5})
    yield reader
    reader.close()


def test_taking_exactly_so_many_records_raises_the_error_that_comes_in_their_place(beyond: Reader) -> None:
    with pytest.raises(CorruptError, match="reading the log"):
        beyond.take_exactly(1, 30)


def test_taking_what_is_there_raises_the_error_that_comes_in_its_place(beyond: Reader) -> None:
    with pytest.raises(CorruptError, match="reading the log"):
        beyond.take(10, 30)
