"""What a failure of the Kafka client means to the caller: the error tree in place of error codes.

Codes are those of the Kafka protocol guide, and librdkafka's own (negative, names with a leading underscore).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from confluent_kafka import KafkaError, KafkaException

from services.errors import ArtifactStoreError, ConfigurationError, CorruptError, PushBackError, UnavailableError

_HELD_SECONDS = 10.0

_FORBIDDEN = frozenset(
    {
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
        KafkaError.SASL_AUTHENTICATION_FAILED,
        KafkaError.UNSUPPORTED_SASL_MECHANISM,
        KafkaError._AUTHENTICATION,
    }
)
_NO_TOPIC = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION})
_OUTSIDE = frozenset({KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE, KafkaError._LOG_TRUNCATION})
_BAD_RECORD = frozenset(
    {
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.RECORD_LIST_TOO_LARGE,
        KafkaError.INVALID_MSG,
        KafkaError.INVALID_MSG_SIZE,
        KafkaError.INVALID_RECORD,
        KafkaError.POLICY_VIOLATION,
    }
)


class HeldError(PushBackError):
    """A partition is not written to while something is wrong that an operator has to mend; the text says what and how.

    With `own_clock` the cause is this machine's clock, so that other gateways may be able to write.
    """

    def __init__(self, detail: str, *, own_clock: bool = False) -> None:
        super().__init__(detail, _HELD_SECONDS)
        self.own_clock = own_clock


class OutsideError(CorruptError):
    """The broker that answered does not hold the offset that was to be read, or holds another log up to it."""


def explained(error: KafkaError, doing: str) -> ArtifactStoreError:
    """The error of our tree for a client's error; `doing` says what was tried, as in `reading the log`."""
    code = error.code()
    if code in _FORBIDDEN:
        return ConfigurationError(
            f"Kafka refuses {doing}: {error.name()}; mend the credentials in ARTIFACT_STORE_KAFKA_OPTIONS or the rights"
        )
    if code == KafkaError.INVALID_TIMESTAMP:
        return HeldError(
            "Kafka refuses the time of an event: this machine's clock is further ahead of a broker's than "
            "message.timestamp.after.max.ms of the topic. Set the clock that is wrong, best by NTP on all machines",
            own_clock=True,
        )
    if code in _NO_TOPIC:
        return ConfigurationError(
            f"Kafka has no such topic while {doing}; make it by `artifact-store migrate`, "
            "unless it was deleted: then restore it"
        )
    if code in _OUTSIDE:
        return OutsideError(f"{doing}: the offset is not in the log any more; it was truncated, re-created or restored")
    return UnavailableError(f"Kafka cannot be used for {doing} now: {error.name()}: {error.str()}")


def kafka_error(error: BaseException) -> KafkaError | None:
    """The client's error inside an exception, if there is one."""
    found: Any = error.args[0] if isinstance(error, KafkaException) and error.args else None
    return found if isinstance(found, KafkaError) else None


def refusal(error: BaseException, doing: str) -> ArtifactStoreError | None:
    """The error of our tree if the exception says that a right is missing or a clock is wrong; None for all others."""
    found = kafka_error(error)
    mendable = found is not None and found.code() in {*_FORBIDDEN, KafkaError.INVALID_TIMESTAMP}
    return explained(found, doing) if found is not None and mendable else None


def spoiled_by_record(error: BaseException) -> bool:
    """Whether a transaction failed for what is in its records, so that trying them again cannot help."""
    found = kafka_error(error)
    return found is not None and found.code() in _BAD_RECORD


@contextmanager
def explaining(doing: str) -> Iterator[None]:
    """Turn the client's exceptions within into errors of our tree."""
    try:
        yield
    except KafkaException as error:
        found = kafka_error(error)
        if found is None:
            raise UnavailableError(f"Kafka cannot be used for {doing} now") from error
        raise explained(found, doing) from error
    except TimeoutError as error:
        raise UnavailableError(f"Kafka gave no answer in time while {doing}") from error
