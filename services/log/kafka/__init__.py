"""The log of record on Kafka: one topic, read by committed readers, written by one fenced producer per partition.

Begin with `log` for reading and with `writer` for appending. `writer` joins the group of writers (`ownership`), runs a
sequencer's `PartitionWriter` for each partition that is assigned to it, and sends requests for other partitions to the
processes that own them. `driver` gives each writer a lease to append under. `topic` and `cluster` say what the topic is
and must be, `connection` makes clients, `tail` reads. `filler` takes records that were made elsewhere. Only this folder
imports the Kafka client; it may import everything in `services.log` except `sqlite`.
"""

from services.log.kafka.filler import KafkaFiller
from services.log.kafka.log import KafkaLog
from services.log.kafka.writer import KafkaWriter

__all__ = ["KafkaFiller", "KafkaLog", "KafkaWriter"]
