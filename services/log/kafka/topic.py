"""The topic: how `migrate` makes it, and the guard that refuses to run on one that could lose events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def migrate(kafka: KafkaSettings, cluster: Cluster) -> Topic:
    """Create the topic or check the one that is there; blocks. Raises as `check`."""
    _check_replication(kafka)
    cluster.create_topic(
        {
            **_FIXED,
            "min.insync.replicas": str(kafka.min_insync_replicas),
            "max.message.bytes": str(TOPIC_MAX_MESSAGE_BYTES),
            # Times never step back within a partition, so one clock that was ahead must not stop it for good.
            "message.timestamp.after.max.ms": str(2**63 - 1),
        }
    )
    return check(kafka, cluster)


def check(kafka: KafkaSettings, cluster: Cluster) -> Topic:
    """The start-up guard; blocks.

    Raises:
        ConfigurationError: the topic is missing, or could lose or has lost events; all causes, each with what mends it.
        UnavailableError: the cluster cannot be reached.
    """
    _check_replication(kafka)
    topic = cluster.topic()
    if troubles := [*_shape_troubles(kafka, topic), *hazards(kafka, cluster)]:
        raise ConfigurationError(unfit(kafka, troubles))
    return topic


def hazards(kafka: KafkaSettings, cluster: Cluster) -> list[str]:
    """What about the topic could lose events or has lost some, each with what mends it; blocks.

    Three questions to the cluster, however many partitions there are. Raises UnavailableError, and ConfigurationError
    when the topic or the right to see it is missing.
    """
    topic = cluster.topic()
    troubles = [*_replica_troubles(kafka, topic), *_setting_troubles(kafka, cluster.topic_settings())]
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
    change = ",".join(f"{name}={value}" for name, value in wanted.items())
    command = (
        f"kafka-configs.sh --bootstrap-server {kafka.bootstrap} --alter --entity-type topics "
        f"--entity-name {kafka.topic} --add-config {change}"
    )
    return [f"{is_now}: `{command}` mends it"]


def _number(settings: Mapping[str, str], name: str) -> int:
    return int(settings.get(name, "0"))
