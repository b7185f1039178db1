"""The topic: how `migrate` creates it, which properties it must have, and the guard that stops writing otherwise.

At the start, `check` refuses a topic that could lose events. While a process writes, `Guard` looks at the topic's
settings every few seconds for all of its writers, which ask the guard before each batch. When the cluster does not
answer, the guard keeps what it knew.

Times never decrease within a partition. One event from a clock that is a day ahead would give its time to all events of
the next day, and retries of everything before it would no longer be answered. So this module compares this machine's
clock with the blob store's and with the partition's last event; a setting of the topic compares it with the brokers'.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from artifact_store.errors import ConfigurationError, UnavailableError
from services.log.kafka.cluster import CONFLUENT, FRAMING, Cluster, Topic
from services.log.kafka.connection import MAX_RECORD_BYTES, TOPIC_MAX_MESSAGE_BYTES, KafkaSettings
from services.log.port import HeldError
from services.runtime.clock import FAR_SECONDS, Clock, StoreClock, span, system_clock

_FIXED = {
    "cleanup.policy": "delete",
    "retention.ms": "-1",
    "retention.bytes": "-1",
    "unclean.leader.election.enable": "false",
    "message.timestamp.type": "CreateTime",
}
"""Settings that must have exactly these values: nothing is compacted or deleted, and no acknowledged record is lost to
a stale replica."""


_NO_FRAMING = "86400000"
"""Kafka's default for FRAMING."""

TIMES_AHEAD = "message.timestamp.after.max.ms"

TIMES_AHEAD_MS = 3_600_000
"""How far the time of an event may be ahead of a broker's clock: Kafka's own default, far below the 24 hours for which
retries are answered. A gateway whose clock is further ahead cannot write."""


def migrate(kafka: KafkaSettings, cluster: Cluster) -> Topic:
    """Create the topic, or check the existing one. Blocks. Raises as `check`.

    If the settings name a schema registry, the schemas are registered first, and a topic that is created then has
    Confluent's framing permanently. Earlier releases let events have any time: `migrate` corrects that, unless a
    partition already holds a future time.
    """
    _check_replication(kafka)
    registry = cluster.registry
    if registry is not None:
        registry.register()
    created = cluster.create_topic(
        {
            **_FIXED,
            "min.insync.replicas": str(kafka.min_insync_replicas),
            "max.message.bytes": str(TOPIC_MAX_MESSAGE_BYTES),
            TIMES_AHEAD: str(TIMES_AHEAD_MS),
            **({} if registry is None else {FRAMING: CONFLUENT}),
        }
    )
    if not created and needless(kafka, cluster, cluster.topic_settings()) is not None:
        with suppress(ConfigurationError):  # without the right to change it, the guard tells operators what to do
            cluster.set_on_topic({TIMES_AHEAD: str(TIMES_AHEAD_MS)})
    return check(kafka, cluster)


def check(kafka: KafkaSettings, cluster: Cluster, *, starting: bool = True) -> Topic:
    """The check at the start; blocks. A process that is no longer `starting` continues if only the limit on times is
    too wide.

    Raises:
        ConfigurationError: the topic is missing, or could lose or has lost events, or the schema registry differs from
            the state that `migrate` leaves. Names all causes, each with its remedy.
        UnavailableError: the cluster or the registry cannot be reached.
    """
    _check_replication(kafka)
    topic = cluster.topic()
    cluster.framing()
    settings = cluster.topic_settings()
    troubles = [*_shape_troubles(kafka, topic), *hazards(kafka, topic, settings), *losses(cluster, topic)]
    if starting and (too_free := needless(kafka, cluster, settings)) is not None:
        troubles.append(too_free)
    registry = cluster.registry
    if starting and registry is not None and (trouble := registry.trouble()) is not None:
        troubles.append(trouble)
    if troubles:
        raise ConfigurationError(unfit(kafka, troubles))
    return topic


def hazards(kafka: KafkaSettings, topic: Topic, settings: Mapping[str, str]) -> list[str]:
    """Properties of the topic and its `settings` that could lose events, each with its remedy."""
    return [*_replica_troubles(kafka, topic), *_setting_troubles(kafka, settings)]


def losses(cluster: Cluster, topic: Topic) -> list[str]:
    """What the topic has lost, with the remedy. Blocks. Asks the leaders of all partitions.

    Raises UnavailableError, and ConfigurationError if the topic or the right to see it is missing.
    """
    lost = {p: offset for p, offset in cluster.earliest(range(topic.partitions)).items() if offset > 0}
    if not lost:
        return []
    trouble = (
        f"partitions {', '.join(map(str, sorted(lost)))} do not begin at offset 0: events are gone. Restore the "
        "topic from a mirror or backup, or begin a new log: another prefix in ARTIFACT_STORE_LOG_URL, then "
        "`artifact-store migrate`"
    )
    return [trouble]


def unfit(kafka: KafkaSettings, troubles: Sequence[str]) -> str:
    """All troubles in one sentence."""
    return f"topic {kafka.topic} cannot be the log of record: " + "; ".join(troubles)


def _check_replication(kafka: KafkaSettings) -> None:
    if kafka.min_insync_replicas > kafka.replication_factor:
        raise ConfigurationError(
            "ARTIFACT_STORE_KAFKA_MIN_INSYNC_REPLICAS must not be above ARTIFACT_STORE_KAFKA_REPLICATION_FACTOR: "
            "nothing could ever be written"
        )


def _shape_troubles(kafka: KafkaSettings, topic: Topic) -> list[str]:
    if topic.partitions == kafka.partitions:
        return []
    trouble = (
        f"it has {topic.partitions} partitions, the settings say {kafka.partitions}: if it was made with "
        f"{topic.partitions}, set ARTIFACT_STORE_KAFKA_PARTITIONS={topic.partitions}; if partitions were added "
        "later, packages lie in the wrong ones: copy the events to a new topic of the first count"
    )
    return [trouble]


def _replica_troubles(kafka: KafkaSettings, topic: Topic) -> list[str]:
    if topic.replicas >= kafka.replication_factor:
        return []
    trouble = (
        f"a partition has {topic.replicas} replicas, the settings ask for {kafka.replication_factor}: "
        f"`kafka-reassign-partitions.sh --bootstrap-server {kafka.bootstrap} --execute "
        "--reassignment-json-file FILE` adds replicas"
    )
    return [trouble]


def _setting_troubles(kafka: KafkaSettings, settings: Mapping[str, str]) -> list[str]:
    wanted = {name: value for name, value in _FIXED.items() if settings.get(name) != value}
    if _number(settings, "min.insync.replicas") < kafka.min_insync_replicas:
        wanted["min.insync.replicas"] = str(kafka.min_insync_replicas)
    if _number(settings, "max.message.bytes") < MAX_RECORD_BYTES:
        wanted["max.message.bytes"] = str(TOPIC_MAX_MESSAGE_BYTES)
    if not wanted:
        return []
    is_now = ", ".join(f"{name}={settings.get(name)}" for name in wanted)
    return [f"{is_now}: `{command(kafka, wanted)}` mends it"]


def command(kafka: KafkaSettings, wanted: Mapping[str, str | int]) -> str:
    """The command line of Kafka's tool that gives the topic these settings."""
    change = ",".join(f"{name}={value}" for name, value in wanted.items())
    return (
        f"kafka-configs.sh --bootstrap-server {kafka.bootstrap} --alter --entity-type topics "
        f"--entity-name {kafka.topic} --add-config {change}"
    )


def times_ahead_ms(settings: Mapping[str, str]) -> int:
    """How far ahead of its clock a broker lets the time of an event be."""
    return int(settings.get(TIMES_AHEAD, TIMES_AHEAD_MS))


def needless(kafka: KafkaSettings, cluster: Cluster, settings: Mapping[str, str]) -> str | None:
    """The problem, if events may have times further ahead than is needed to write to every partition. Blocks.

    Does not ask the cluster while the limit is the usual one. Raises as `losses`.
    """
    if times_ahead_ms(settings) <= TIMES_AHEAD_MS:
        return None
    latest = cluster.latest_times(range(cluster.topic().partitions))
    if max(latest.values(), default=0) > system_clock() // 1000 + TIMES_AHEAD_MS:
        return None
    return (
        f"{TIMES_AHEAD}={settings[TIMES_AHEAD]} lets a wrong clock set the time of a partition far ahead, and no "
        f"partition needs it: `{command(kafka, {TIMES_AHEAD: TIMES_AHEAD_MS})}` mends it"
    )


def _number(settings: Mapping[str, str], name: str) -> int:
    return int(settings.get(name, "0"))


_MICROS = 1_000_000

_LOG = logging.getLogger(__name__)


class Guard:
    """Stops the writers of one process while the topic or a clock is wrong. `look` is for one thread at a time,
    everything else for any."""

    def __init__(self, kafka: KafkaSettings, cluster: Cluster, clock: Clock, store: StoreClock | None = None) -> None:
        """`clock` is this machine's, `store` the blob store's, if it has one."""
        self._kafka = kafka
        self._cluster = cluster
        self._clock = clock
        self._store = store
        self._trouble: str | None = None
        self._losses: list[str] = []
        self._ahead_seconds = FAR_SECONDS
        """How far the last event of a partition may be ahead of our clock."""
        self._needless: str | None = None

    @property
    def trouble(self) -> str | None:
        """Why this process may not write to any partition, and the remedy; None if nothing is wrong."""
        return self._trouble or (None if self._store is None else self._store.trouble())

    @property
    def drifted(self) -> bool:
        """Whether the topic's settings differ from what they should be."""
        return self._trouble is not None or self._needless is not None

    @property
    def skew_seconds(self) -> float | None:
        """How far this machine's clock is ahead of the blob store's (negative: behind); None if that is unknown."""
        ahead = None if self._store is None else self._store.ahead()
        return None if ahead is None else ahead / _MICROS

    def look(self) -> None:
        """Check the topic again; keep the previous result if the cluster does not answer. Blocks. Never raises.

        Any broker knows the settings, but only its leader knows the content of a partition. A leader that cannot be
        reached must not hide changed settings.
        """
        with self._asking("settings"):
            settings, topic = self._cluster.topic_settings(), self._cluster.topic()
            unsafe = [*hazards(self._kafka, topic, settings), *self._framing_changed(settings)]
            self._trouble_is([*unsafe, *self._losses])
            allowed = times_ahead_ms(settings)
            # If an operator lets Kafka accept a time that is far ahead, so do we.
            self._ahead_seconds = FAR_SECONDS if allowed <= TIMES_AHEAD_MS else allowed / 1000
            with self._asking("partitions"):
                self._losses = losses(self._cluster, topic)
                self._trouble_is([*unsafe, *self._losses])
                too_free = needless(self._kafka, self._cluster, settings)
                if too_free is not None and too_free != self._needless:
                    _LOG.warning("topic %s: %s; until then no gateway can start", self._kafka.topic, too_free)
                self._needless = too_free

    def _framing_changed(self, settings: Mapping[str, str]) -> list[str]:
        """The trouble if the setting no longer names the values' framing: a process that starts would misread them."""
        right = _NO_FRAMING if self._cluster.framing() is None else CONFLUENT
        if (settings.get(FRAMING) == CONFLUENT) == (right == CONFLUENT):
            return []
        mend = command(self._kafka, {FRAMING: right})
        return [f"{FRAMING}={settings.get(FRAMING)} says that its values have another framing: `{mend}` mends it"]

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        try:
            yield
        except (UnavailableError, ConfigurationError) as error:
            _LOG.debug("the topic's %s could not be checked: %s", what, error.detail)
        except Exception:  # noqa: BLE001 - the process goes on writing, and the cause is logged whole
            _LOG.exception("the topic's %s could not be checked", what)

    def _trouble_is(self, troubles: Sequence[str]) -> None:
        self._trouble = unfit(self._kafka, troubles) if troubles else None

    def require(self, partition: int, last_created_at: int) -> None:
        """Return if events may be appended now, after an event of this time (µs). Does not block. Raises HeldError."""
        if (trouble := self.trouble) is not None:
            raise HeldError(trouble, own_clock=self._trouble is None)
        ahead = last_created_at / _MICROS - self._clock() / _MICROS
        if ahead > self._ahead_seconds:
            raise HeldError(self._future(partition, last_created_at // _MICROS, ahead))

    def _future(self, partition: int, second: int, ahead: float) -> str:
        # One hour more than needed: brokers' clocks differ, and the operator takes a while.
        needed = {TIMES_AHEAD: (int(ahead // 3600) + 2) * 3_600_000}
        usual = {TIMES_AHEAD: TIMES_AHEAD_MS}
        until = datetime.fromtimestamp(second, UTC).isoformat()
        return (
            f"the last event of partition {partition} has the time {until}, {span(ahead)} ahead of this machine's "
            "clock, and times never go back within a partition. If this clock is wrong, set it. If the event's time "
            f"is wrong, `{command(self._kafka, needed)}` allows writes to it, with that time on all "
            f"events until it is reached; then `{command(self._kafka, usual)}` ends the exception"
        )
