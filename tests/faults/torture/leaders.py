"""Reads who leads which partition, and moves leaders to another living broker, as an operator's balancing tool does.

The client library cannot reassign partitions, so the request is encoded here (KIP-455, Kafka protocol guide:
AlterPartitionReassignments, key 45, version 0). It may be sent to any broker, which passes it to the controller.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import confluent_kafka.admin
from confluent_kafka import ElectionType, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from tests.services.kafka import KafkaCluster

_KEY, _VERSION = 45, 0
_SECONDS = 10.0
_NO_TAGS = b"\0"

_T = TypeVar("_T")

# The package's types do not mark what its documentation names as exported.
_admin: Any = confluent_kafka.admin


def prefer(cluster: KafkaCluster, topic: str, partitions: Sequence[int], order: Sequence[int]) -> None:
    """Let the first broker in `order`, all replicas in a new order, lead these partitions. Blocks.

    A cluster that cannot do it now leaves them where they are. Raises OSError when no broker answers.
    """
    _reassign(cluster, topic, partitions, order)
    admin = AdminClient({"bootstrap.servers": cluster.endpoint, "log_level": 0})
    moved = admin.elect_leaders(ElectionType.PREFERRED, [TopicPartition(topic, p) for p in partitions])
    moved.result(_SECONDS)


def set_on_topic(cluster: KafkaCluster, topic: str, name: str, value: str) -> None:
    """Change one setting of the topic, as an operator does. Blocks. Raises KafkaException when it is not done."""
    change = _admin.AlterConfigOpType.SET
    entries = [_admin.ConfigEntry(name, value, incremental_operation=change)]
    resource = _admin.ConfigResource(_admin.ResourceType.TOPIC, topic, incremental_configs=entries)
    admin = AdminClient({"bootstrap.servers": cluster.endpoint, "log_level": 0})
    admin.incremental_alter_configs([resource])[resource].result(_SECONDS)


def in_sync(cluster: KafkaCluster) -> bool:
    """Whether all brokers know each other and every partition of every topic has all its replicas in sync. Blocks."""
    if any(broker.brokers_seen() < len(cluster.brokers) for broker in cluster.brokers):
        return False
    admin = AdminClient({"bootstrap.servers": cluster.endpoint, "log_level": 0})
    try:
        topics = admin.list_topics(timeout=_SECONDS).topics.values()
    except KafkaException:
        return False
    return all(len(p.isrs) == len(p.replicas) and p.leader >= 0 for topic in topics for p in topic.partitions.values())


def leaders(servers: str, topic: str) -> dict[int, int]:
    """The broker that leads each partition; -1 for none."""
    admin = AdminClient({"bootstrap.servers": servers, "log_level": 3})
    found = admin.list_topics(topic, timeout=30).topics[topic].partitions
    return {number: int(partition.leader) for number, partition in found.items()}


def coordinated_by(text: str, partitions: int) -> int:
    """The partition of `__transaction_state` for a transactional id, or of `__consumer_offsets` for a group.

    Java's hash of it, made positive, modulo.
    """
    hashed = 0
    for character in text:
        hashed = (31 * hashed + ord(character)) & 0xFFFFFFFF
    return (hashed & 0x7FFFFFFF) % partitions


def _reassign(cluster: KafkaCluster, topic: str, partitions: Sequence[int], order: Sequence[int]) -> None:
    replicas = _compact(order, lambda broker: struct.pack(">i", broker))
    listed = _compact(partitions, lambda p: struct.pack(">i", p) + replicas + _NO_TAGS)
    name = topic.encode()
    body = struct.pack(">i", int(_SECONDS * 1000))
    body += _compact([name], lambda text: _length(text) + text + listed + _NO_TAGS) + _NO_TAGS
    client = b"torture"
    header = struct.pack(">hhih", _KEY, _VERSION, 1, len(client)) + client + _NO_TAGS
    request = header + body
    with socket.create_connection(("127.0.0.1", cluster.brokers[0].port), timeout=_SECONDS) as connection:
        connection.sendall(struct.pack(">i", len(request)) + request)
        answer = connection.recv(4096)
    # Length, correlation id, tags, throttle time, then the error of the whole.
    (error,) = struct.unpack(">h", answer[13:15])
    if error:
        raise OSError(f"the partitions could not be reassigned: error {error}")


def _length(text: bytes) -> bytes:
    """The length of a compact string; names and lists here are short."""
    return bytes([len(text) + 1])


def _compact(items: Sequence[_T], encode: Callable[[_T], bytes]) -> bytes:
    """A compact array of fewer than 127 items."""
    return bytes([len(items) + 1]) + b"".join(encode(item) for item in items)
