"""Connects to Kafka: the settings of each kind of client, their creation, and the meaning of their failures.

Clients are created after any fork. Their log lines go to `logging`, and no error shows a secret. Error codes are those
of the Kafka protocol guide, and librdkafka's (negative, names with a leading underscore).

All events of a package are in one partition. `partition_of` computes it from the package's id, as the clients would.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar
from uuid import UUID

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, murmur2
from confluent_kafka.admin import AdminClient

from artifact_store.errors import ArtifactStoreError, ConfigurationError, CorruptError, UnavailableError
from artifact_store.rules import parse_number
from services.config import Settings
from services.log.port import HeldError
from services.runtime.logs import Repeats

CLIENT_LOGGER = logging.getLogger("services.log.kafka.client")
"""Receives the client library's log lines; they appear when the client is next polled."""

_CLIENT_LINE = re.compile(r"(?P<facility>[A-Z_]+) \[[^\]]*#[a-z]+-\d+\] (?:\[thrd:[^\]]*\]: )?(?P<text>.*)", re.DOTALL)
"""A log line of librdkafka: its facility, client, thread and text."""

_BROKER_LINE = re.compile(
    r"(?:\w+: )?(?:\w+://)?(?P<address>[^/\s]+:\d+)(?:/\w+)?: (?P<connect>Connect to \S+ failed: )?(?P<why>.*)",
    re.DOTALL,
)
"""The text of such a line about a failed connection. One broker has several names: as itself, as the coordinator of
groups or transactions, and as a bootstrap server."""

_TOLD_ELSEWHERE = frozenset({"TXNERR", "FATAL", "MAXPOLL"})
"""Facilities whose lines also come back as errors of calls, so that our own lines name the cause."""

_Client = TypeVar("_Client")


class ClientLines(logging.Filter):
    """Makes lines of the client library readable, and limits how often each passes, whichever client writes it. An
    unavailable broker is only a warning: the others take its place, and a component that stops without it reports that
    itself.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._repeats = Repeats(clock)

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`."""
        said = record.getMessage()
        found = _CLIENT_LINE.fullmatch(said)
        if found is not None:
            if found["facility"] in _TOLD_ELSEWHERE and not CLIENT_LOGGER.isEnabledFor(logging.DEBUG):
                return False
            said = f"the Kafka client: {found['text']}"
            broker = _BROKER_LINE.fullmatch(found["text"])
            if found["facility"] == "FAIL" and broker is not None:
                record.levelno, record.levelname = logging.WARNING, "WARNING"
                named = f"the Kafka broker {broker['address']}"
                how = f"{named} cannot be reached" if broker["connect"] else f"a connection to {named} failed"
                said = f"{how}: {broker['why']}"
        line, _, _ = said.partition(" (after ")
        passed = self._repeats.passes(line, line)
        record.msg, record.args = passed, ()
        return passed is not None


CLIENT_LOGGER.addFilter(ClientLines())


def make_consumer(config: dict[str, Any]) -> Consumer:
    """Raises ConfigurationError if the client refuses a setting, UnavailableError if the system lacks resources."""
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
            # No free thread or descriptor: temporary, or another process takes over.
            raise UnavailableError(f"a Kafka client cannot be made now: {found.name()}") from None
        # The client's text may show the value; the name is enough.
        text = found.str() if found else ""
        named = next((name for name in sorted(config, key=len, reverse=True) if f'"{name}"' in text), None)
        raise ConfigurationError(
            f"the Kafka client refuses {f'the option {named}' if named else 'an option'}: "
            "mend ARTIFACT_STORE_KAFKA_OPTIONS"
        ) from None


def _note(error: KafkaError) -> None:
    CLIENT_LOGGER.debug("%s", error.name())


SESSION_TIMEOUT_MS = 6_000
"""After this long without a heartbeat a member's partitions go to others. The minimum that brokers allow by
default."""

TRANSACTION_TIMEOUT_MS = 10_000
"""After this long the coordinator ends an open transaction, which may delay every reader until then."""

MAX_RECORD_BYTES = 1_048_588
"""Maximum size of a record that a client sends. The topic takes more, see TOPIC_MAX_MESSAGE_BYTES."""

TOPIC_MAX_MESSAGE_BYTES = 2 << 20
"""`max.message.bytes` of a topic that `migrate` creates: a batch with one record of the largest size fits, with its
framing."""


def bounded(queue_bytes: int, fetch_bytes: int) -> dict[str, int]:
    """The settings of a consumer whose queue holds about `queue_bytes` of records.

    A fetch returns `fetch_bytes` of each partition in compressed form, or one larger batch of records (KIP-74). The
    client decompresses all of it before it checks how full its queue is: up to 255 times as much, if LZ4 has compressed
    records that repeat themselves.
    """
    return {
        "queued.max.messages.kbytes": queue_bytes >> 10,
        "fetch.message.max.bytes": fetch_bytes,
        "fetch.max.bytes": 4 << 20,
    }


READS_ADMINISTRATIVE = 2
READS_PRINCIPALS = 3
INTERFACE = "/v3"
"""The suffix of the client ids of gateways and projectors: it shows others which records they can read.

From `/v2` on they read administrative records, from `/v3` on events with a principal. As the end of a gateway's URL it
is part of every path of its internal listener, so that gateways of every release can forward to it.
"""

PROJECTOR = "artifact-store-projector/"
"""The prefix of the client ids of projectors; their release follows."""


def release_of(client_id: str) -> str | None:
    """The release of the projector with this client id; None if the id does not contain it."""
    release, mark, _ = client_id.removeprefix(PROJECTOR).rpartition("/v")
    return release if mark and client_id.startswith(PROJECTOR) else None


def interface_of(client_id: str) -> int:
    """The number in the suffix of a client id; 1 for releases without a suffix."""
    _, mark, text = client_id.rpartition("/v")
    number = parse_number(text) if mark else None
    return 1 if number is None else number


_REFUSED = {
    "plugin.library.paths": "it loads code from a file",
    "ssl.engine.location": "it loads code from a file",
    "ssl.engine.id": "it belongs to ssl.engine.location, which loads code from a file",
    "ssl.providers": "it loads code from a file",
    "sasl.kerberos.kinit.cmd": "it runs a command",
}
"""Settings of librdkafka with which an operator could run code as this process."""

_KERBEROS_NAME = re.compile(r"[A-Za-z0-9._/@:-]*")
"""Values that librdkafka puts into the shell command that renews a Kerberos ticket."""

_ALLOWED = re.compile(
    # Security, except for the options that are refused above. `sasl.oauthbearer.*` has many names, none of which loads
    # code.
    r"security\.protocol|enable\.ssl\.certificate\.verification|enable\.sasl\.oauthbearer\.unsecure\.jwt"
    r"|sasl\.(mechanisms?|username|password)|sasl\.oauthbearer\.[a-z.]+"
    r"|sasl\.kerberos\.(service\.name|principal|keytab|min\.time\.before\.relogin)"
    r"|ssl\.(cipher\.suites|curves\.list|sigalgs\.list|endpoint\.identification\.algorithm)"
    r"|ssl\.(key|certificate|ca)\.(location|pem)|ssl\.key\.password|ssl\.ca\.certificate\.stores|ssl\.crl\.location"
    r"|ssl\.keystore\.(location|password)|https\.ca\.(location|pem)"
    # The network.
    r"|socket\.[a-z.]+|broker\.address\.(ttl|family)|client\.(dns\.lookup|rack)|connections\.max\.idle\.ms"
    r"|(reconnect|retry)\.backoff\.(max\.)?ms|(topic\.)?metadata\.(max\.age|refresh|recovery|propagation)[a-z.]*"
    r"|max\.in\.flight(\.requests\.per\.connection)?|receive\.message\.max\.bytes|enable\.metrics\.push|check\.crcs"
    # Time-outs, and how much is held, sent and read at once.
    r"|(session|request|delivery|message|transaction)\.timeout\.ms|heartbeat\.interval\.ms|max\.poll\.interval\.ms"
    r"|queued?\.[a-z.]+|fetch\.[a-z.]+|max\.partition\.fetch\.bytes|batch\.(size|num\.messages)|linger\.ms"
    r"|compression\.(type|codec|level)|(message\.send\.max\.)?retries"
    # Log lines of the client.
    r"|debug|log_level|log\.(connection\.close|thread\.name)"
)
"""The settings of librdkafka that operators may set. All others decide what the log guarantees, or may run code."""

_PREFIX = re.compile(r"[A-Za-z0-9._-]{1,200}")
_ENTRY = re.compile(r"[A-Za-z0-9.\-]+:[0-9]{1,5}|\[[0-9A-Fa-f:.]+\]:[0-9]{1,5}")


@dataclass(frozen=True, slots=True)
class KafkaSettings:
    """Where the topic is and which properties it must have. `options` may contain secrets and are never shown."""

    bootstrap: str
    prefix: str
    partitions: int
    replication_factor: int
    min_insync_replicas: int
    options: Mapping[str, str | int | float] = field(repr=False)
    schema_registry_url: str | None = field(default=None, repr=False)
    """May hold a password."""

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Read `kafka://host:port[,host:port]/PREFIX`. Raises ConfigurationError, never showing the URL."""
        scheme, _, rest = settings.log_url.partition("://")
        bootstrap, _, prefix = rest.partition("/")
        if scheme != "kafka" or not all(_ENTRY.fullmatch(entry) for entry in bootstrap.split(",")):
            raise ConfigurationError(
                "ARTIFACT_STORE_LOG_URL must be kafka://host:port[,host:port]/PREFIX; "
                "credentials belong in ARTIFACT_STORE_KAFKA_OPTIONS"
            )
        if not _PREFIX.fullmatch(prefix):
            raise ConfigurationError(
                "ARTIFACT_STORE_LOG_URL must end in /PREFIX: up to 200 letters, digits, '.', '_' and '-'"
            )
        for name, value in settings.kafka_options.items():
            _check_option(name, value)
        return cls(
            bootstrap=bootstrap,
            prefix=prefix,
            partitions=settings.kafka_partitions,
            replication_factor=settings.kafka_replication_factor,
            min_insync_replicas=settings.kafka_min_insync_replicas,
            options={name: _text(value) for name, value in settings.kafka_options.items()},
            schema_registry_url=settings.schema_registry_url,
        )

    @property
    def topic(self) -> str:
        """The one topic, the log of record."""
        return f"{self.prefix}.events"

    @property
    def writers_group(self) -> str:
        """The consumer group whose members are the gateways."""
        return f"{self.prefix}.writers"

    @property
    def aside_group(self) -> str:
        """The consumer group of gateways that leave partitions to others for a while; operators see them there."""
        return f"{self.writers_group}.aside"

    def projector_group(self, projection: str) -> str:
        """The consumer group whose members run one projection."""
        return f"{self.prefix}.projector.{projection}"

    def admin(self) -> dict[str, Any]:
        """The settings of an admin client, for requests about topic, offsets and groups."""
        return self._client("artifact-store")

    def reader(self, own: Mapping[str, int] | None = None) -> dict[str, Any]:
        """The settings of a consumer with assigned partitions, which sees only committed events and never resets its
        offsets by itself. `own` are settings in which this reader differs from others, unless options set them.
        """
        return {
            "fetch.wait.max.ms": 500,
            # After this time (by default a minute) the client gives up a silent broker, and looks up the new leaders of
            # its partitions. Such a broker loses its session with the cluster after 9 s.
            "socket.timeout.ms": 10_000,
            **bounded(16 << 20, 256 << 10),
            "queued.min.messages": 20_000,
            # A full queue is checked again after this time, by default 1 s.
            "fetch.queue.backoff.ms": 20,
            "check.crcs": True,
            **(own or {}),
            **self._client("artifact-store"),
            # The client requires a name although it joins no group.
            "group.id": f"{self.prefix}.readers",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",
        }

    def member(self, group: str, client_id: str, own: Mapping[str, int]) -> dict[str, Any]:
        """The settings of a consumer in a group that hands over partitions one by one. The whole group sees
        `client_id`.

        `own` are settings in which this group's members differ from readers, unless options set them.
        """
        return {
            "session.timeout.ms": SESSION_TIMEOUT_MS,
            # A member learns of a rebalance from its heartbeat: this limits the time of a hand-over.
            "heartbeat.interval.ms": 500,
            **self.reader(own),
            "client.id": client_id,
            "group.id": group,
            "group.protocol": "classic",
            "partition.assignment.strategy": "cooperative-sticky",
        }

    def producer(self, partition: int) -> dict[str, Any]:
        """The settings of the transactional producer of one partition's writer."""
        return {
            "compression.type": "lz4",
            # Only while a batch is being produced: a commit flushes without waiting.
            "linger.ms": 5,
            # The broker refuses a transaction that begins while the previous one's markers are being written; the
            # default of 100 ms makes back-to-back transactions ten times slower.
            "retry.backoff.ms": 2,
            "retry.backoff.max.ms": 500,
            "transaction.timeout.ms": TRANSACTION_TIMEOUT_MS,
            "queue.buffering.max.messages": 200_000,
            "queue.buffering.max.kbytes": 256 << 10,
            **self._client("artifact-store"),
            "message.max.bytes": MAX_RECORD_BYTES,
            "acks": "all",
            "enable.idempotence": True,
            "transactional.id": f"{self.topic}-{partition}",
        }

    def _client(self, client_id: str) -> dict[str, Any]:
        return {
            # Only errors: a coordinator that is busy for a moment is not worth a line.
            "log_level": 3,
            "socket.keepalive.enable": True,
            "reconnect.backoff.max.ms": 1_000,
            "socket.connection.setup.timeout.ms": 10_000,
            **self.options,
            "bootstrap.servers": self.bootstrap,
            "client.id": client_id,
        }


def _check_option(name: str, value: str | float | bool) -> None:
    """Raises ConfigurationError, without the value."""
    if (why := _REFUSED.get(name)) is not None:
        raise ConfigurationError(f"ARTIFACT_STORE_KAFKA_OPTIONS must not set {name}: {why}")
    if not _ALLOWED.fullmatch(name):
        raise ConfigurationError(
            f"ARTIFACT_STORE_KAFKA_OPTIONS must not set {name}: only security, network, time-outs, sizes and log lines "
            "can be set, because the log's guarantees depend on the rest"
        )
    if name.startswith("sasl.kerberos.") and not _KERBEROS_NAME.fullmatch(str(value)):
        raise ConfigurationError(
            f"{name} in ARTIFACT_STORE_KAFKA_OPTIONS goes into a shell command: use only letters, digits and ._/@:-"
        )


def _text(value: str | int | float | bool) -> str | int | float:
    return str(value).lower() if isinstance(value, bool) else value


def record_key(package_id: UUID) -> bytes:
    """The key of every record of the package: its id as text."""
    return str(package_id).encode()


def partition_of(package_id: UUID, partitions: int) -> int:
    """murmur2 of the key, made positive, modulo the count: Java's `BuiltInPartitioner.partitionForKey`."""
    return int(murmur2(record_key(package_id), partitions))


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


_CAUSES = {
    **dict.fromkeys((KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._RESOLVE), "no broker is reached"),
    **dict.fromkeys(
        (KafkaError._TIMED_OUT, KafkaError._MSG_TIMED_OUT, KafkaError._TIMED_OUT_QUEUE, KafkaError.REQUEST_TIMED_OUT),
        "the brokers gave no answer in time",
    ),
    **dict.fromkeys(
        (KafkaError.NOT_ENOUGH_REPLICAS, KafkaError.NOT_ENOUGH_REPLICAS_AFTER_APPEND),
        "fewer replicas are in sync than min.insync.replicas of the topic",
    ),
    **dict.fromkeys(
        (
            KafkaError.COORDINATOR_NOT_AVAILABLE,
            KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
            KafkaError.NOT_COORDINATOR,
            KafkaError._WAIT_COORD,
        ),
        "its coordinator is between two brokers",
    ),
    **dict.fromkeys(
        (
            KafkaError.NOT_LEADER_FOR_PARTITION,
            KafkaError.LEADER_NOT_AVAILABLE,
            KafkaError.FENCED_LEADER_EPOCH,
            KafkaError.UNKNOWN_LEADER_EPOCH,
        ),
        "the leader of the partition is between two brokers",
    ),
    **dict.fromkeys(
        (KafkaError._FENCED, KafkaError.INVALID_PRODUCER_EPOCH, KafkaError.PRODUCER_FENCED),
        "another process has taken over the partition",
    ),
    **dict.fromkeys(
        (
            KafkaError._STATE,
            KafkaError._INCONSISTENT,
            KafkaError._PURGE_QUEUE,
            KafkaError._PURGE_INFLIGHT,
            KafkaError.INVALID_TXN_STATE,
            KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER,
        ),
        "a transaction was interrupted, and the client does not know its end",
    ),
}
"""Our words for temporary errors. The client's own texts name its threads and functions."""


def cause_of(error: KafkaError) -> str:
    """The cause of the client's error, for operators."""
    code: int = error.code()
    if (known := _CAUSES.get(code)) is not None:
        return known
    name = error.name().lstrip("_")
    return f"a broker answered {name}" if code > 0 else f"the Kafka client failed with {name}"


class OutsideError(CorruptError):
    """The broker that answered does not hold the requested offset, or holds another log up to it."""


def explained(error: KafkaError, doing: str) -> ArtifactStoreError:
    """Our error for a client's error. `doing` names the operation, as in `reading the log`."""
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
            f"the topic does not exist ({doing}): run `artifact-store migrate` to create it; "
            "if it was deleted, restore it from a mirror or backup first"
        )
    if code in _OUTSIDE:
        return OutsideError(
            f"{doing}: the offset is no longer in the log; the log was truncated, created again or restored"
        )
    return UnavailableError(f"Kafka cannot be used for {doing} now: {cause_of(error)}")


def kafka_error(error: BaseException) -> KafkaError | None:
    """The client's error inside an exception, if there is one."""
    found: Any = error.args[0] if isinstance(error, KafkaException) and error.args else None
    return found if isinstance(found, KafkaError) else None


def refusal(error: BaseException, doing: str) -> ArtifactStoreError | None:
    """Our error if the exception reports a missing right or a wrong clock; None for all others."""
    found = kafka_error(error)
    mendable = found is not None and found.code() in {*_FORBIDDEN, KafkaError.INVALID_TIMESTAMP}
    return explained(found, doing) if found is not None and mendable else None


def spoiled_by_record(error: BaseException) -> bool:
    """Whether a transaction failed because of its records, so that trying them again cannot help."""
    found = kafka_error(error)
    return found is not None and found.code() in _BAD_RECORD


@contextmanager
def explaining(doing: str) -> Iterator[None]:
    """Turn the client's exceptions inside the block into our errors."""
    try:
        yield
    except KafkaException as error:
        found = kafka_error(error)
        if found is None:
            raise UnavailableError(f"Kafka cannot be used for {doing} now") from error
        raise explained(found, doing) from error
    except TimeoutError as error:
        raise UnavailableError(f"Kafka gave no answer in time while {doing}") from error
