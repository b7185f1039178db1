"""What the settings say to Kafka: names derived from the log's URL, and the client configuration of each role."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from services.config import Settings
from services.errors import ConfigurationError

SESSION_TIMEOUT_MS = 6_000
"""After this long without a heartbeat a member's partitions go to others; the least that brokers allow by default."""

TRANSACTION_TIMEOUT_MS = 10_000
"""After this long the coordinator ends an open transaction; until then it may hold up every reader."""

MAX_RECORD_BYTES = 1_048_588
"""What a client sends in one record; the topic takes more, see TOPIC_MAX_MESSAGE_BYTES."""

TOPIC_MAX_MESSAGE_BYTES = 2 << 20
"""`max.message.bytes` of a topic that `migrate` makes: a batch of one largest record fits with its framing."""

INTERFACE = "/v2"
"""What client ids of gateways and projectors end with that can read administrative records.

As the end of a gateway's URL it is part of every path of its internal listener, so that gateways without it can forward
to one that has it.
"""

# What the guarantees of the log stand on; these are not for ARTIFACT_STORE_KAFKA_OPTIONS.
_RESERVED = frozenset(
    {
        "acks",
        "auto.offset.reset",
        "bootstrap.servers",
        "client.id",
        "enable.auto.commit",
        "enable.auto.offset.store",
        "enable.idempotence",
        "enable.partition.eof",
        "group.id",
        "group.instance.id",
        "group.protocol",
        "isolation.level",
        "message.max.bytes",
        "metadata.broker.list",
        "partition.assignment.strategy",
        "request.required.acks",
        "transactional.id",
    }
)
_PREFIX = re.compile(r"[A-Za-z0-9._-]{1,200}")
_ENTRY = re.compile(r"[A-Za-z0-9.\-]+:[0-9]{1,5}|\[[0-9A-Fa-f:.]+\]:[0-9]{1,5}")


@dataclass(frozen=True, slots=True)
class KafkaSettings:
    """Where the topic is and how it must be; `options` may hold secrets and are never shown."""

    bootstrap: str
    prefix: str
    partitions: int
    replication_factor: int
    min_insync_replicas: int
    options: Mapping[str, str | int | float] = field(repr=False)

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Read `kafka://host:port[,host:port]/PREFIX`. Raises ConfigurationError, never showing the URL."""
        scheme, _, rest = settings.log_url.partition("://")
        bootstrap, _, prefix = rest.partition("/")
        if scheme != "kafka" or not all(_ENTRY.fullmatch(entry) for entry in bootstrap.split(",")):
            raise ConfigurationError(
                "ARTIFACT_STORE_LOG_URL must be kafka://host:port[,host:port]/PREFIX; "
                "credentials belong into ARTIFACT_STORE_KAFKA_OPTIONS"
            )
        if not _PREFIX.fullmatch(prefix):
            raise ConfigurationError(
                "ARTIFACT_STORE_LOG_URL must end in /PREFIX: up to 200 letters, digits, '.', '_' and '-'"
            )
        if reserved := sorted(_RESERVED & settings.kafka_options.keys()):
            raise ConfigurationError(
                f"ARTIFACT_STORE_KAFKA_OPTIONS must not set {', '.join(reserved)}: the log's guarantees stand on it"
            )
        return cls(
            bootstrap=bootstrap,
            prefix=prefix,
            partitions=settings.kafka_partitions,
            replication_factor=settings.kafka_replication_factor,
            min_insync_replicas=settings.kafka_min_insync_replicas,
            options={name: _text(value) for name, value in settings.kafka_options.items()},
        )

    @property
    def topic(self) -> str:
        """The one topic, the log of record."""
        return f"{self.prefix}.events"

    @property
    def writers_group(self) -> str:
        """The consumer group whose members are the gateways."""
        return f"{self.prefix}.writers"

    def projector_group(self, projection: str) -> str:
        """The consumer group whose members run one projection."""
        return f"{self.prefix}.projector.{projection}"

    def admin(self) -> dict[str, Any]:
        """For questions about topic, offsets and groups."""
        return self._client("artifact-store")

    def reader(self) -> dict[str, Any]:
        """A consumer that is given its partitions and sees committed events alone; it never resets by itself."""
        return {
            "fetch.wait.max.ms": 500,
            # A broker that keeps still is given up after so long, and its partitions' new leaders are looked for: by
            # default a minute. It has lost its session with the cluster after 9 s.
            "socket.timeout.ms": 10_000,
            "fetch.message.max.bytes": 4 << 20,
            # Bounds what one reader holds. A full queue is looked at again after the back-off, by default 1 s.
            "queued.max.messages.kbytes": 16 << 10,
            "queued.min.messages": 20_000,
            "fetch.queue.backoff.ms": 20,
            "check.crcs": True,
            **self._client("artifact-store"),
            # The client wants a name although it joins no group.
            "group.id": f"{self.prefix}.readers",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",
        }

    def member(self, group: str, client_id: str, own: Mapping[str, int]) -> dict[str, Any]:
        """A consumer in a group that hands partitions over one by one; `client_id` is seen by the whole group.

        `own` is what members of this group do otherwise than readers, unless options say it.
        """
        return {
            "session.timeout.ms": SESSION_TIMEOUT_MS,
            # A member learns of a rebalance by its heartbeat: this bounds how long a hand-over takes.
            "heartbeat.interval.ms": 500,
            **self.reader(),
            **own,
            **self.options,
            "client.id": client_id,
            "group.id": group,
            "group.protocol": "classic",
            "partition.assignment.strategy": "cooperative-sticky",
        }

    def producer(self, partition: int) -> dict[str, Any]:
        """The transactional producer of one partition's writer."""
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
            # Errors alone: that a coordinator is busy for a moment is no news.
            "log_level": 3,
            "socket.keepalive.enable": True,
            "reconnect.backoff.max.ms": 1_000,
            "socket.connection.setup.timeout.ms": 10_000,
            **self.options,
            "bootstrap.servers": self.bootstrap,
            "client.id": client_id,
        }


def _text(value: str | int | float | bool) -> str | int | float:
    return str(value).lower() if isinstance(value, bool) else value
