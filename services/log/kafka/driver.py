"""The sequencer's driver for Kafka: leases of one topic's partitions, as its group and its guard allow."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event as Flag
from uuid import UUID

from artifact_store.errors import ArtifactStoreError
from services.log.kafka.cluster import Cluster
from services.log.kafka.connection import (
    READS_ADMINISTRATIVE,
    KafkaSettings,
    cause_of,
    kafka_error,
    refusal,
    spoiled_by_record,
)
from services.log.kafka.lease import PartitionLease
from services.log.kafka.ownership import WriterGroup
from services.log.kafka.topic import Guard
from services.log.sequencer.driver import Driver
from services.log.state.restore import States


class KafkaDriver(Driver):
    """See `Driver`."""

    def __init__(
        self, kafka: KafkaSettings, cluster: Cluster, identity: UUID, states: States, group: WriterGroup, guard: Guard
    ) -> None:
        self._identity = identity
        self.topic = kafka.topic
        self.doubt = Flag()
        """Set while it is not known that the topic is still the log's: nothing is committed."""
        self._kafka = kafka
        self._cluster = cluster
        self._states = states
        self._guard = guard
        self._group = group

    @property
    def identity(self) -> UUID:
        """See `Driver`; the topic's id."""
        return self._identity

    def take_over(
        self,
        partition: int,
        *,
        is_ours: Callable[[], bool],
        stopping: Callable[[], bool],
        progressed: Callable[[], None],
    ) -> PartitionLease:
        """See `Driver`. Raises as `PartitionLease.take_over`."""
        return PartitionLease.take_over(
            self._kafka,
            self._cluster,
            partition,
            self.identity,
            self._states,
            is_ours=is_ours,
            stopping=stopping,
            in_doubt=self.doubt.is_set,
            progressed=progressed,
        )

    def holds(self, partition: int) -> bool | None:
        """See `Driver`."""
        return self._group.holds(partition)

    def require_readers(self) -> None:
        """See `Driver`. Raises ConflictError, PushBackError."""
        self._group.require_readers(READS_ADMINISTRATIVE)

    def require(self, partition: int, last_created_at: int) -> None:
        """See `Driver`."""
        self._guard.require(partition, last_created_at)

    def refusal(self, error: BaseException) -> ArtifactStoreError | None:
        """See `Driver`."""
        return refusal(error, "writing")

    def cause(self, error: BaseException) -> str:
        """See `Driver`."""
        found = kafka_error(error)
        if found is None and isinstance(error, SystemError):  # an error was raised in a callback of the client
            found = kafka_error(error.__cause__ or error.__context__ or error)
        return super().cause(error) if found is None else cause_of(found)

    def spoiled_by_record(self, error: BaseException) -> bool:
        """See `Driver`."""
        return spoiled_by_record(error)
