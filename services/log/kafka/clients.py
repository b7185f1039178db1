"""Making Kafka clients: after any fork, with their log lines routed to `logging`, and without a secret in an error."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer
from confluent_kafka.admin import AdminClient

from services.errors import ConfigurationError, UnavailableError
from services.log.kafka.failures import kafka_error

CLIENT_LOGGER = logging.getLogger("services.log.kafka.client")
"""Where the client library's own log lines go; they appear when the client is next polled."""

REPEAT_SECONDS = 60.0
"""How often the same line of the client library may come; each of its clients says it for itself, again and again."""

_CLIENT = re.compile(r"\[[^\]]*#(?:consumer|producer)-[0-9]+\] ")
_MOST_LINES = 200

_Client = TypeVar("_Client")


class Repeats(logging.Filter):
    """Lets a line pass once in a while, whichever client says it, and says how often it came in between."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._seen: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`."""
        line, _, _ = _CLIENT.sub("", record.getMessage()).partition(" (after ")
        now = self._clock()
        since, more = self._seen.get(line, (now - REPEAT_SECONDS, 0))
        if now - since < REPEAT_SECONDS:
            self._seen[line] = since, more + 1
            return False
        if len(self._seen) >= _MOST_LINES:
            self._seen.clear()
        self._seen[line] = now, 0
        record.msg, record.args = f"{line} (and {more} times more)" if more else line, ()
        return True


CLIENT_LOGGER.addFilter(Repeats())


def make_consumer(config: dict[str, Any]) -> Consumer:
    """Raises ConfigurationError for a setting that the client refuses, UnavailableError when the system has no room."""
    return _make(Consumer, config)


def make_producer(config: dict[str, Any]) -> Producer:
    """Raises as `make_consumer`."""
    return _make(Producer, config)


def make_admin(config: dict[str, Any]) -> AdminClient:
    """Raises as `make_consumer`."""
    return _make(AdminClient, config)


def _make(kind: Callable[..., _Client], config: dict[str, Any]) -> _Client:
    try:
        # Errors that matter come back from the calls; this callback only keeps the client from printing them.
        return kind({**config, "error_cb": _note}, logger=CLIENT_LOGGER)
    except KafkaException as error:
        found = kafka_error(error)
        if found is not None and found.code() != KafkaError._INVALID_ARG:
            # No thread, no descriptor: that passes, or another process takes over.
            raise UnavailableError(f"a Kafka client cannot be made now: {found.name()}") from None
        # The client's own text may show the value; the name is enough.
        text = found.str() if found else ""
        named = next((name for name in sorted(config, key=len, reverse=True) if f'"{name}"' in text), None)
        raise ConfigurationError(
            f"the Kafka client refuses {f'the option {named}' if named else 'an option'}: "
            "mend ARTIFACT_STORE_KAFKA_OPTIONS"
        ) from None


def _note(error: KafkaError) -> None:
    CLIENT_LOGGER.debug("%s", error.name())
