"""The topic: how `migrate` makes it, and the guard that refuses to run on one that could lose events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from services.clock import system_clock
from services.errors import ConfigurationError
from services.log.kafka.cluster import Cluster, Topic
from services.log.kafka.settings import MAX_RECORD_BYTES, TOPIC_MAX_MESSAGE_BYTES, KafkaSettings

_FIXED = {
    "cleanup.policy": "delete",
    "retention.ms": "-1",
    "retention.bytes": "-1",
    "unclean.leader.election.enable": "false",
    "message.timestamp.type": "CreateTime",
}
"""What must be so, word for word: nothing is compacted or deleted, no acknowledged record lost to a stale replica."""


TIMES_AHEAD = "message.timestamp.after.max.ms"

TIMES_AHEAD_MS = 3_600_000
"""How far the time of an event may be ahead of a broker's clock: Kafka's own default, far below the 24 hours for which
retries are answered. A gateway whose clock is further ahead cannot write."""


def migrate(kafka: KafkaSettings, cluster: Cluster) -> Topic:
    """Create the topic or check the one that is there; blocks. Raises as `check`.

    Earlier releases let events have any time: that is mended, unless a partition holds a future time already.
    """
    _check_replication(kafka)
    created = cluster.create_topic(
        {
            **_FIXED,
            "min.insync.replicas": str(kafka.min_insync_replicas),
            "max.message.bytes": str(TOPIC_MAX_MESSAGE_BYTES),
            TIMES_AHEAD: str(TIMES_AHEAD_MS),
        }
    )
    if not created and needless(kafka, cluster, cluster.topic_settings()) is not None:
        with suppress(ConfigurationError):  # without the right to change it, the guard says what an operator has to do
            cluster.set_on_topic({TIMES_AHEAD: str(TIMES_AHEAD_MS)})
    return check(kafka, cluster)


def check(kafka: KafkaSettings, cluster: Cluster, *, starting: bool = True) -> Topic:
    """The start-up guard; blocks. A process that is not `starting` any more goes on where only times are too free.

    Raises:
        ConfigurationError: the topic is missing, or could lose or has lost events; all causes, each with what mends it.
        UnavailableError: the cluster cannot be reached.
    """
    _check_replication(kafka)
    topic = cluster.topic()
    settings = cluster.topic_settings()
    troubles = [*_shape_troubles(kafka, topic), *hazards(kafka, cluster, settings)]
    if starting and (too_free := needless(kafka, cluster, settings)) is not None:
        troubles.append(too_free)
    if troubles:
        raise ConfigurationError(unfit(kafka, troubles))
    return topic


def hazards(kafka: KafkaSettings, cluster: Cluster, settings: Mapping[str, str]) -> list[str]:
    """What about the topic and its `settings` could lose events or has lost some, each with what mends it; blocks.

    Two questions to the cluster, however many partitions there are. Raises UnavailableError, and ConfigurationError
    when the topic or the right to see it is missing.
    """
    topic = cluster.topic()
    troubles = [*_replica_troubles(kafka, topic), *_setting_troubles(kafka, settings)]
    lost = {p: offset for p, offset in cluster.earliest(range(topic.partitions)).items() if offset > 0}
    if lost:
        troubles.append(
            f"partitions {', '.join(map(str, sorted(lost)))} do not begin at offset 0: events are gone. Restore the "
            "topic from a mirror or backup, or begin a new log: another prefix in ARTIFACT_STORE_LOG_URL, then "
            "`artifact-store migrate`"
        )
    return troubles


def unfit(kafka: KafkaSettings, troubles: Sequence[str]) -> str:
    """One sentence of them all."""
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
    """The command line of Kafka's own tool that gives the topic these settings."""
    change = ",".join(f"{name}={value}" for name, value in wanted.items())
    return (
        f"kafka-configs.sh --bootstrap-server {kafka.bootstrap} --alter --entity-type topics "
        f"--entity-name {kafka.topic} --add-config {change}"
    )


def times_ahead_ms(settings: Mapping[str, str]) -> int:
    """How far ahead of its clock a broker lets the time of an event be."""
    return int(settings.get(TIMES_AHEAD, TIMES_AHEAD_MS))


def needless(kafka: KafkaSettings, cluster: Cluster, settings: Mapping[str, str]) -> str | None:
    """What is wrong if events may have times further ahead than is needed to write to every partition; blocks.

    Asks nothing of the cluster while the bound is the usual one. Raises as `hazards`.
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
