"""What a record of the log is: an event of a package, an administrative record, or not an event of ours.

Writers, readers, projections and verification all use this module, so that they agree about every record. A record that
is not an event stops them until an operator confirms it by `artifact-store log skip`. The confirmation is recorded as
`v1.log.skipped`, later in the same partition: a reader that meets such a record looks ahead for its digest. Offsets do
not identify the record, because they change when a log is copied; the order does not change. So a skip covers records
with its digest before it, but none after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

from artifact_store.errors import BadRecordError
from artifact_store.events import (
    LOG_SKIPPED,
    LOSS_ACCEPTED,
    NO_DIGEST,
    AdministrativePayload,
    Event,
    LogSkipped,
    LossAccepted,
)
from schemas.codec import UndecodableEventError, decode, framing
from schemas.digests import event_digest, payload_digest, record_digest
from schemas.identifiers import event_id, partition_id
from services.log.port import Log, Record

PartitionOf = Callable[[UUID], int]
"""Finds the partition of a package's events."""

_SKIPPED_FRAMING = framing(LOG_SKIPPED)


_FEWEST_RECORDS = 10


class BatchSize:
    """Estimates how many records to ask for, so that a batch has about a given size. Goes by the last records."""

    def __init__(self, max_bytes: int, max_records: int) -> None:
        self._bytes = max_bytes
        self._records = max_records
        self._usual = max_bytes  # until records were read, because a small first batch costs nothing

    def most(self, bytes_at_hand: int = 0) -> int:
        """How many records to ask for, at least 10 if that is allowed; the batch has `bytes_at_hand` already."""
        fitting = (self._bytes - bytes_at_hand) // max(1, self._usual)
        return min(self._records, max(_FEWEST_RECORDS, fitting))

    def took(self, records: Sequence[Record]) -> int:
        """Note the records that were read. Returns their size in bytes."""
        size = sum(len(record.value) for record in records)
        if records:
            self._usual = size // len(records)
        return size


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that is not an event of ours, and why. `digest` is `schemas.digests.record_digest` (32 bytes)."""

    partition: int
    offset: int
    digest: bytes
    size_bytes: int
    cause: str
    foreign: bool = True
    """Whether somebody else may have written it; in a log to which nobody else writes, it is damaged."""

    @classmethod
    def of(cls, record: Record, cause: str) -> BadRecord:
        """The description of this record."""
        key, value = record.key, record.value
        digest, size = record_digest(key, value), len(key) + len(value)
        return cls(record.partition, record.offset, digest, size, cause, foreign=record.sequence is None)

    @property
    def error(self) -> BadRecordError:
        """The error that stops everything that meets this record."""
        found = (
            f"the record at offset {self.offset} of partition {self.partition} is no event: {self.cause} "
            f"({self.size_bytes} bytes, digest {self.digest.hex()})"
        )
        if not self.foreign:
            return BadRecordError(f"{found}. The log's file is damaged: restore it from a copy")
        return BadRecordError(
            f"{found}. Find out who wrote it; then "
            f"`artifact-store log skip {self.partition} {self.offset} --digest {self.digest.hex()}` passes over it"
        )


def read_record(record: Record, partition_of: PartitionOf) -> Event | BadRecord:
    """The event in the record (which may be administrative), or why there is none. Raises as `partition_of`."""
    try:
        event = decode(record.value)
    except UndecodableEventError as error:
        return BadRecord.of(record, f"it cannot be read: {error}")
    cause = misplacement(record, event.package_id, event.payload, partition_of)
    return event if cause is None else BadRecord.of(record, cause)


def misplacement(record: Record, aggregate_id: UUID, payload: object, partition_of: PartitionOf) -> str | None:
    """Why a decodable record does not belong in its partition or under its key; None if it does.

    `payload` is only needed for an administrative record, which belongs in the partition that it names.
    """
    if record.key != str(aggregate_id).encode():
        return "its key is not its package's id"
    if isinstance(payload, AdministrativePayload):
        right = payload.partition
        if aggregate_id != partition_id(payload.log, right):
            return "its id is not that of the partition that it names"
    else:
        right = partition_of(aggregate_id)
    return None if record.partition == right else f"it belongs in partition {right}"


@dataclass(frozen=True, slots=True)
class Confirmation:
    """An operator's confirmation about one record of a partition, which the partition's writer records."""

    partition: int
    offset: int
    digest: bytes
    actor: str
    reason: str
    command_id: UUID
    """The same in every retry."""


@dataclass(frozen=True, slots=True)
class SkipRecord(Confirmation):
    """The record with this digest (`record_digest`), now at this offset, is not an event."""


@dataclass(frozen=True, slots=True)
class AcceptLoss(Confirmation):
    """The log lost the record with this digest (BLAKE3 over its value) at this offset; continue without it."""


class AdministrativeHead(NamedTuple):
    """The last administrative record of a partition in one log: its sequence, and its digest for the next one."""

    sequence: int
    digest: bytes

    @classmethod
    def of(cls, event: Event) -> AdministrativeHead:
        """The head after this record."""
        return cls(event.sequence, event_digest(event))


class AcceptedLoss(NamedTuple):
    """A loss that an operator accepted: the missing record, its log, and how the acceptance was recorded."""

    log: UUID
    offset: int
    digest: bytes
    created_at: int
    head: AdministrativeHead

    @classmethod
    def of(cls, event: Event, payload: LossAccepted) -> AcceptedLoss:
        """The loss in this record."""
        log = payload.previous_log or payload.log
        head = AdministrativeHead.of(event)
        return cls(log, payload.expected_offset, payload.expected_digest, event.created_at, head)


def administrative_event(
    payload: AdministrativePayload,
    after: AdministrativeHead | None,
    *,
    created_at: int,
    actor: str,
    command_id: UUID,
) -> Event:
    """The event that records this payload, after `after` in its partition and log. `created_at` is in µs since 1970."""
    aggregate = partition_id(payload.log, payload.partition)
    sequence = 1 if after is None else after.sequence + 1
    return Event(
        event_id=event_id(aggregate, sequence),
        event_type=LOG_SKIPPED if isinstance(payload, LogSkipped) else LOSS_ACCEPTED,
        package_id=aggregate,
        sequence=sequence,
        created_at=created_at,
        actor=actor,
        command_id=command_id,
        command_index=0,
        command_count=1,
        payload_digest=payload_digest(payload),
        previous_digest=NO_DIGEST if after is None else after.digest,
        payload=payload,
    )


def is_administrative(event: Event) -> bool:
    """Whether the event belongs to a partition and not to a package."""
    return isinstance(event.payload, AdministrativePayload)


def skipped_by(record: Record, partition_of: PartitionOf) -> bytes | None:
    """The digest in the record of an operator's confirmation; None for every other record."""
    if not record.value.startswith(_SKIPPED_FRAMING):
        return None
    found = read_record(record, partition_of)
    return found.payload.digest if isinstance(found, Event) and isinstance(found.payload, LogSkipped) else None


class Skips:
    """Finds out which records of a log an operator has confirmed not to be events, by looking ahead in the log."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._found: dict[tuple[int, bytes], int] = {}
        """The offset of the last skip, by partition and digest."""
        self._looked: dict[int, tuple[int, int]] = {}
        """The range of offsets in which all skips are known, by partition."""

    async def covers(self, bad: BadRecord) -> bool:
        """Whether the record is passed over, because its skip follows it in the same partition.

        Reads the partition to its end, as far as it was not read before. Raises as `Log.scan` and `Log.end`.
        """
        partition = bad.partition
        if self._found.get((partition, bad.digest), -1) > bad.offset:
            return True
        first, behind = self._looked.get(partition, (bad.offset, bad.offset))
        if bad.offset < first:
            first = behind = bad.offset
        end = (await self._log.end()).offsets.get(partition, 0)
        async with aclosing(self._log.scan({partition: behind}, {partition: end})) as batches:
            async for batch in batches:
                for record in batch.records:
                    if (digest := skipped_by(record, self._log.partition_of)) is not None:
                        self._found[partition, digest] = record.offset
        self._looked[partition] = first, max(behind, end)
        return self._found.get((partition, bad.digest), -1) > bad.offset
