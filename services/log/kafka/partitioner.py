"""Which partition a package lies in: Kafka's own default, so that foreign tools agree."""

from __future__ import annotations

from uuid import UUID

from confluent_kafka import murmur2


def record_key(package_id: UUID) -> bytes:
    """The key of every record of the package: its id as text."""
    return str(package_id).encode()


def partition_of(package_id: UUID, partitions: int) -> int:
    """murmur2 of the key, made positive, modulo the count: Java's `BuiltInPartitioner.partitionForKey`."""
    return int(murmur2(record_key(package_id), partitions))
