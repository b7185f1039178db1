"""Making Kafka clients: after any fork, with their log lines routed to `logging`, and without a secret in an error."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer
from confluent_kafka.admin import AdminClient

from services.errors import ConfigurationError
from services.log.kafka.failures import kafka_error

CLIENT_LOGGER = logging.getLogger("services.log.kafka.client")
"""Where the client library's own log lines go; they appear when the client is next polled."""

_Client = TypeVar("_Client")


def make_consumer(config: dict[str, Any]) -> Consumer:
    """Raises ConfigurationError for a setting that the client refuses."""
    return _make(Consumer, config)


def make_producer(config: dict[str, Any]) -> Producer:
    """Raises ConfigurationError for a setting that the client refuses."""
    return _make(Producer, config)


def make_admin(config: dict[str, Any]) -> AdminClient:
    """Raises ConfigurationError for a setting that the client refuses."""
    return _make(AdminClient, config)


def _make(kind: Callable[..., _Client], config: dict[str, Any]) -> _Client:
    try:
        # Errors that matter come back from the calls; this callback only keeps the client from printing them.
        return kind({**config, "error_cb": _note}, logger=CLIENT_LOGGER)
    except KafkaException as error:
        found = kafka_error(error)
        # The client's own text may show the value; the name is enough.
        text = found.str() if found else ""
        named = next((name for name in sorted(config, key=len, reverse=True) if f'"{name}"' in text), None)
        raise ConfigurationError(
            f"the Kafka client refuses {f'the option {named}' if named else 'an option'}: "
            "mend ARTIFACT_STORE_KAFKA_OPTIONS"
        ) from None


def _note(error: KafkaError) -> None:
    CLIENT_LOGGER.info("%s", error.name())
