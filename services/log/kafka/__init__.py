"""The log of record on Kafka: one topic, read by committed readers, written by one fenced producer per partition."""

from services.log.kafka.log import KafkaLog
from services.log.kafka.writers import KafkaWriter

__all__ = ["KafkaLog", "KafkaWriter"]
