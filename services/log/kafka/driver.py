"""The sequencer's driver for Kafka: leases of a topic's partitions, as far as consumer group and guard allow.

A `PartitionLease` is the right to append to a partition, until another process takes the partition over. It consists of
a fenced producer, a reader of committed records (the tail), and the state folded from them.

A take-over has four steps: `init_transactions` fences off every predecessor, a barrier record is appended, the
partition is read up to the barrier, and commands are served. Reading first would be wrong: a predecessor could still
append after that. Asking the cluster for the end would be wrong too: a deposed leader that does not know it yet may
answer. Such a leader cannot get a record acknowledged by all in-sync replicas, so the barrier's offset is the true end.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from threading import Event as Flag
from typing import Self, TypeVar
from uuid import UUID

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from artifact_store.errors import (
    ArtifactStoreError,
    CorruptError,
    InvalidRequestError,
    LogIdentityError,
    PushBackError,
    UnavailableError,
)
from artifact_store.events import Event, LogSkipped, LossAccepted
from schemas.codec import encode
from schemas.headers import Headers, headers_all
from schemas.headers import headers as headers_of
from schemas.identifiers import partition_id
from schemas.runs import first_of
from services.log.kafka.cluster import Cluster
from services.log.kafka.connection import (
    READS_ADMINISTRATIVE,
    KafkaSettings,
    cause_of,
    explaining,
    kafka_error,
    make_producer,
    partition_of,
    refusal,
    spoiled_by_record,
)
from services.log.kafka.ownership import WriterGroup
from services.log.kafka.schema_registry import ConfluentFraming
from services.log.kafka.tail import Reader
from services.log.kafka.topic import Guard
from services.log.port import PartitionNotOwnedError, Record
from services.log.records import (
    AcceptedLoss,
    AcceptLoss,
    AdministrativeHead,
    BadRecord,
    Confirmation,
    administrative_event,
    is_administrative,
    read_record,
)
from services.log.sequencer.driver import Driver, Lease, Staged
from services.log.state.loss import FILE, MEMORY, SNAPSHOT, Loss, Witness
from services.log.state.partition_state import TIDY_SECONDS, PartitionState, value_digest
from services.log.state.restore import (
    FROM_LOG,
    FROM_SNAPSHOT,
    Slot,
    States,
    candidates,
    claim,
    discard,
    stored,
    witnesses,
)
from services.log.state.state_file import READABLE_FORMATS, Anchor, LogPartition
from services.runtime import tracing
from services.runtime.clock import system_clock
from services.runtime.metrics import OPERATION_FAILURES, OPERATION_SECONDS

INIT_SECONDS = 30.0
COMMIT_SECONDS = 12.0
"""Longer than the transaction time-out: the coordinator decides before we give up."""

PATIENCE_SECONDS = 15.0
"""Give up reading after this long without progress. Another producer's open transaction can stop it."""

_HIDDEN_RETRY_SECONDS = 5.0

_LEADERS_SECONDS = 1.0
"""Look up the leaders again whenever reading makes no progress for this long."""

PROOF_SECONDS = 0.02
"""The minimum time between two proofs. Each takes about 3 ms, during which nothing can be appended."""

_BARRIER_EARLIER_MS = 24 * 3600 * 1000
"""How far a barrier is dated back: a clock that is a day ahead neither makes Kafka refuse it nor sets the time of the
partition.

Not much longer: Kafka begins a new segment after a record that is much older than those that follow, and deletes the
segment by the record's time once somebody sets a retention.
"""

_CONNECT_SECONDS = 0.05
"""Wait this long before `init_transactions`: a client that is not connected yet waits 0.5 s for its coordinator."""

_READ = 500
_NOWHERE = -1
_LOOK_SECONDS = 0.02

_COMMIT_TIME = OPERATION_SECONDS.labels("log", "commit")
_COMMIT_FAILURES = OPERATION_FAILURES.labels("log", "commit")
_READ_BACK_TIME = OPERATION_SECONDS.labels("log", "read_back")
_READ_BACK_FAILURES = OPERATION_FAILURES.labels("log", "read_back")

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(slots=True)
class _Ahead:
    """The records in the partition between the end of the state and `end`."""

    end: int
    skips: dict[bytes, tuple[int, Event]] = field(default_factory=dict)
    """The last skip of each digest, with the offset of the skip."""
    administrative: AdministrativeHead | None = None
    accepted: list[AcceptedLoss] = field(default_factory=list)
    """Losses that operators have accepted in this log."""
    last_created_at: int = 0


class PartitionLease(Lease):
    """See `Lease`. Every method blocks.

    The state ends before a record that is not an event, unless an operator has confirmed it. While a lease is `stopped`
    in this way, it accepts only the confirmation (`record`).
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        cluster: Cluster,
        partition: int,
        identity: UUID,
        states: States,
        *,
        stopping: Callable[[], bool],
        in_doubt: Callable[[], bool],
        progressed: Callable[[], None],
    ) -> None:
        """Use `take_over`."""
        self.restored_from = FROM_LOG
        self._stopped: BadRecord | None = None
        """The bad record before which the state ends."""
        self._skips: dict[bytes, tuple[int, Event]] = {}
        """As `_Ahead.skips`, of all records that were looked at so far."""
        self.losses: Sequence[Loss] = ()
        """Acknowledged records that the log lost: nothing may be appended."""
        self._states = states
        self._origin = LogPartition(identity, kafka.topic, partition)
        self._slot: Slot | None = None
        self._state: PartitionState | None = None
        self._kafka = kafka
        self._cluster = cluster
        self._framing: ConfluentFraming | None = None
        self._partition = partition
        self._stopping = stopping
        self._in_doubt = in_doubt
        self._progressed = progressed
        self._first_committed = False
        """Whether this lease has committed a transaction."""
        self._proven = 0.0
        """When the last proof began, on the monotonic clock (s)."""
        self._delivered = _Delivered(0)
        """What Kafka has reported about the transaction's records."""
        self._tail: Reader | None = None
        self._tail_at = 0
        """The offset of the tail's next record; _NOWHERE once it is no longer tracked."""
        self._producer: Producer | None = None

    @classmethod
    def take_over(
        cls,
        kafka: KafkaSettings,
        cluster: Cluster,
        partition: int,
        identity: UUID,
        states: States,
        *,
        is_ours: Callable[[], bool],
        stopping: Callable[[], bool],
        in_doubt: Callable[[], bool],
        progressed: Callable[[], None] = lambda: None,
    ) -> Self:
        """Take the partition over. Blocks until all of it is read, which takes seconds to minutes.

        `is_ours` is called right before the fence, and must return whether the group has assigned the partition to this
        process. The lease commits nothing while `in_doubt` returns True: the topic may have been deleted. It calls
        `progressed` after each step that need not be repeated if the take-over fails.

        Raises:
            UnavailableError: the cluster cannot be reached, another producer's open transaction hides the log's end,
                or the state file cannot be used.
            PartitionNotOwnedError: the partition is assigned to another process, or `stopping` returned True.
            CorruptError: the partition breaks an invariant.
            LogIdentityError: the topic was deleted and created again.
            ConfigurationError: the topic does not exist, or there is no right to write to it.
        """
        lease = cls(
            kafka, cluster, partition, identity, states, stopping=stopping, in_doubt=in_doubt, progressed=progressed
        )
        try:
            lease._fence(is_ours)
            lease._restore(lease._barrier())
        except BaseException:
            lease.close()
            raise
        return lease

    def _fence(self, is_ours: Callable[[], bool]) -> None:
        """Fence off every predecessor."""
        # All partitions share this client: while the cluster is unavailable, no further clients are created.
        topic, identity = self._cluster.topic(), self._origin.identity
        if topic.identity != identity:
            raise LogIdentityError(
                f"the topic was deleted and created again: it was log {identity}, it is log {topic.identity}. "
                "Restart the gateways: they will then say what is lost"
            )
        self._partitions = topic.partitions
        self._framing = self._cluster.framing()
        self._producer = make_producer(self._kafka.producer(self._partition))
        time.sleep(_CONNECT_SECONDS)
        # A process that wakes up late must not fence off the rightful owner.
        if not is_ours():
            raise PartitionNotOwnedError("the group has given the partition to another process")
        with explaining("taking over a partition"):
            self._producer.init_transactions(INIT_SECONDS)

    @property
    def state(self) -> PartitionState:
        """See `Lease`."""
        return _open(self._state)

    def hand_over(self, staged: Sequence[Staged]) -> list[bytes]:
        """See `Lease`. Waits for brokers only if the events are more than the client's queue holds.

        Raises whatever the client raises.
        """
        producer = _open(self._producer)
        producer.poll(0)  # lets the client write its log messages
        producer.begin_transaction()
        count = sum(len(each.values) for each in staged)
        self._delivered = _Delivered(count)
        values: list[bytes] = []
        for each in staged:
            self._produce(producer, each, len(values))
            values += each.values
        return values

    def commit(self, values: Sequence[bytes]) -> None:
        """See `Lease`. Returns once the tail has shown exactly these records.

        Raises whatever the client raises. Raises UnavailableError if the tail shows other records or none in time, if
        the topic may have been deleted, and if the transaction does not begin where reading has ended.
        """
        with _COMMIT_TIME.time(), _COMMIT_FAILURES.count_exceptions():
            _open(self._producer).flush(COMMIT_SECONDS)  # so that the records were sent before the topic is checked
            self._require_all_read()
            self._commit_sent()
        self.committed_at = None if tracing.tracer is None else time.time_ns()
        self._first_committed = True
        with _READ_BACK_TIME.time(), _READ_BACK_FAILURES.count_exceptions():
            last = self._read_back(values)
        self.state.confirm(last, values[-1])
        self._remember()

    @property
    def proof_due(self) -> float:
        """See `Lease`."""
        return self._proven + PROOF_SECONDS

    def prove(self) -> None:
        """See `Lease`. Raises whatever the client raises, and UnavailableError.

        The proof is a transaction that sends an offset and is aborted. Its coordinator refuses a fenced producer, and
        nothing is added to the topic.
        """
        producer, tail = _open(self._producer), _open(self._tail)
        self._proven = time.monotonic()
        producer.begin_transaction()
        producer.send_offsets_to_transaction(*tail.offsets_for_transaction(), COMMIT_SECONDS)
        producer.abort_transaction(COMMIT_SECONDS)
        self.idle()

    def idle(self) -> None:
        """See `Lease`."""
        _open(self._producer).poll(0)
        if self._stopped is None and _open(self._tail).take(1, 0):
            raise UnavailableError("another process has written to the partition")

    @property
    def stopped(self) -> BadRecord | None:
        """See `Lease`."""
        return self._stopped

    def record(self, confirmation: Confirmation, now: int, require_readers: Callable[[], None]) -> AdministrativeHead:
        """See `Lease`. Also works while the lease is `stopped`, and reads on up to the new record.

        `require_readers` is called before the record is appended: every process of the installation must be able to
        read it. A confirmation that is already recorded gets the same answer again.

        Raises InvalidRequestError if the log contradicts what is confirmed, PushBackError if an open transaction hides
        the record, and whatever `require_readers` raises. Also raises whatever the client raises; the outcome is then
        unknown: close the lease.
        """
        state = self.state
        ahead = self._look_ahead(state.next_offset)
        accepts = isinstance(confirmation, AcceptLoss)
        found = self._acceptance(confirmation, ahead) if accepts else self._skip(confirmation)
        if isinstance(found, AdministrativeHead):
            return found
        require_readers()
        # An acceptance covers the losses of states that are older than it, so its time must be later than theirs.
        lost_until = max([loss.witness.anchor.last_created_at + 1 for loss in self.losses], default=0)
        event = administrative_event(
            found,
            ahead.administrative or state.irregular.administrative,
            created_at=max(now, state.last_created_at, ahead.last_created_at, lost_until),
            actor=confirmation.actor,
            command_id=confirmation.command_id,
        )
        value = encode(event)
        with explaining("recording what an operator confirmed"):
            timestamp = event.created_at // 1000
            self._append_alone(
                value, str(event.package_id), timestamp, headers_of(event, self._origin.identity, None), commit=True
            )
        self._read_on(self._offset_of(value, ahead.end) + 1)
        self._settle(self.losses)
        self._remember()
        return AdministrativeHead.of(event)

    def _skip(self, request: Confirmation) -> AdministrativeHead | LogSkipped:
        """The payload that records a skip; the head of the existing record if the skip is recorded already."""
        bad = self._record_at(request.offset)
        if not isinstance(bad, BadRecord):
            raise InvalidRequestError(
                f"the record at offset {request.offset} of partition {self._partition} is an event: nothing to skip"
                if bad is not None
                else f"partition {self._partition} holds no record at offset {request.offset}"
            )
        if bad.digest != request.digest:
            raise InvalidRequestError(
                f"the record at offset {bad.offset} of partition {bad.partition} has the digest {bad.digest.hex()}, "
                f"not {request.digest.hex()}"
            )
        if (recorded := _skip_of(bad, self._look_ahead(bad.offset).skips)) is not None:
            return AdministrativeHead.of(recorded)
        return LogSkipped(
            self._origin.identity, bad.partition, bad.offset, bad.digest, bad.size_bytes, bad.cause, request.reason
        )

    def _acceptance(self, request: Confirmation, ahead: _Ahead) -> AdministrativeHead | LossAccepted:
        """As `_skip`, for the acceptance of a loss. `ahead` are the records after the state of a stopped partition."""
        wanted = request.offset, request.digest
        for accepted in (*self.state.irregular.accepted, *ahead.accepted):
            if (accepted.offset, accepted.digest) == wanted:
                return accepted.head
        loss = next((loss for loss in self.losses if (loss.offset, loss.digest) == wanted), None)
        if loss is None:
            raise InvalidRequestError(
                f"partition {self._partition} is not known to have lost a record of that digest at offset "
                f"{request.offset}; `artifact-store status` says what it has lost"
            )
        witness, identity = loss.witness, self._origin.identity
        return LossAccepted(
            identity,
            self._partition,
            witness.evidence,
            None if witness.log == identity else witness.log,
            loss.offset,
            loss.digest,
            loss.found_digest,
            self._end,
            request.reason,
        )

    def _append_alone(
        self, value: bytes | None, key: str | None, timestamp: int, headers: Headers | None, *, commit: bool
    ) -> int:
        """Append one record in a separate transaction, which is committed or aborted. Returns the record's offset.

        Raises whatever the client raises, and UnavailableError if not all in-sync replicas have acknowledged it.
        """
        producer, delivered = _open(self._producer), _Delivered(1)
        producer.begin_transaction()
        sent = value if value is None or self._framing is None else self._framing.sent(value)
        producer.produce(self._kafka.topic, sent, key, self._partition, delivered, timestamp=timestamp, headers=headers)
        producer.flush(COMMIT_SECONDS)
        if commit:
            self._commit_sent()
        else:
            producer.abort_transaction(COMMIT_SECONDS)
        return delivered.first(f"the replicas of partition {self._partition} did not acknowledge a record")

    def _commit_sent(self) -> None:
        """Commit what was sent and flushed. Raises whatever the client raises, and UnavailableError."""
        if self._in_doubt():
            raise UnavailableError("the topic may no longer be the one of this log")
        _open(self._producer).commit_transaction(COMMIT_SECONDS)

    def save_if_due(self) -> None:
        """See `Lease`. Also offers the state as a snapshot, and compacts a part of its file. Raises StateFileError."""
        if self.state.save_due:
            self.state.save()
            self._progressed()
            self._offer(self.state)
        if self.state.tidy_due:
            self.state.tidy()

    def tidy(self) -> float:
        """See `Lease`. Raises StateFileError."""
        self.save_if_due()
        self.state.put_away()
        return TIDY_SECONDS if self.state.untidy else math.inf

    def close(self) -> None:
        """See `Lease`. Also lets other processes use the state file.

        An open transaction is left to the next `init_transactions`, which aborts it.
        """
        producer, self._producer = self._producer, None
        if producer is not None:
            # A fenced producer refuses even this.
            with suppress(KafkaException, SystemError):
                producer.purge()
            del producer
        tail, self._tail = self._tail, None
        try:
            if tail is not None:
                tail.close()
        finally:
            state, self._state = self._state, None
            if state is not None and state.close():
                self._offer(state, closing=True)
            slot, self._slot = self._slot, None
            if slot is not None:
                slot.release()

    def _remember(self) -> None:
        """Keep in memory which record was read last: a state that is in doubt is not saved up to there.

        This is done at each commit and not when the lease closes: while a call to Kafka delays the closing, the group
        may assign the partition to this process again. The earlier memory stays while the log has not been read, and
        while the log has losses.
        """
        anchor = self.state.anchor
        if self._stopped is None and not self.losses and anchor.next_offset:
            self._states.remembered[self._partition] = self._origin.identity, anchor

    def _barrier(self) -> int:
        """Append a record that all in-sync replicas acknowledge, in a transaction that is aborted. Returns its offset.

        Every committed transaction is below this offset, and no reader of committed events sees the record.

        The abort also ends a transaction of this transactional id that only the partition still considers open. A
        broker that was killed can come back without the marker of a transaction that the coordinator considers
        complete. The partition would wait for that marker for ever. Nobody has read such a transaction, so nothing in
        it was acknowledged. Transactions of other producers are not affected.
        """
        with explaining("establishing the end of a partition"):
            earlier = max(1, system_clock() // 1000 - _BARRIER_EARLIER_MS)
            return self._append_alone(None, None, earlier, None, commit=False)

    def _restore(self, barrier: int) -> None:
        """Start from the best state that agrees with the log, and read from there up to the barrier.

        A state that names a record that the log does not hold proves a loss, which is added to `losses`. The store is
        asked only after the barrier: otherwise it could get a state, and the log lose its record, in between.
        """
        self._end = barrier + 1
        found = stored(self._states, self._origin, self._stopping)
        remembered = witnesses(self._states, found, self._origin, barrier, self._stopping)
        losses = [loss for witness in remembered if (loss := self._lost(witness, barrier)) is not None]
        claimed = claim(self._states.folder, self._origin, lambda witness: self._lost(witness, barrier))
        self._slot = claimed.slot
        own = list(claimed.losses)
        if (read := self._states.remembered.get(self._partition)) is not None:
            loss = self._lost(Witness(MEMORY, *read, "of this process"), barrier)
            own += [loss] if loss is not None and loss.key not in {found.key for found in own} else []
        known = {loss.key for loss in losses}
        if self._states.snapshots is not None:
            self._states.snapshots.testify(self._origin, [loss.witness for loss in own if loss.key not in known])
        lost = {loss.witness.anchor.next_offset for loss in losses if loss.witness.log == self._origin.identity}
        known = {loss.key for loss in own}
        losses = [*own, *(loss for loss in losses if loss.key not in known)]
        usable = [
            s
            for s in found.snapshots
            if s.format in READABLE_FORMATS and s.next_offset <= barrier and s.next_offset not in lost
        ]
        for source, state in candidates(self._slot, claimed.file, usable, self._origin, self._states, self._stopping):
            self._state, self.restored_from, self._stopped = state, source, None
            if source == FROM_SNAPSHOT:
                self._progressed()
            loss = self._lost_by(state, barrier) if source == FROM_SNAPSHOT else None
            if loss is not None:
                losses.append(loss)
            else:
                self._begin_at(state.next_offset)
                try:
                    self._read_to(barrier + 1)  # including its marker, after which the first transaction begins
                except CorruptError as error:
                    if source == FROM_LOG:
                        raise CorruptError(f"{error.detail}. Restore the topic from a mirror or a backup") from error
                    # The state itself may be wrong, so read the log from its start.
                    _LOG.warning("the %s of partition %d is discarded: %s", source, self._partition, error.detail)
                else:
                    self._settle(losses)
                    self._settle_copied(barrier)
                    self._remember()
                    return
            state.discard()
            self._state = None

    def _settle(self, losses: Sequence[Loss]) -> None:
        """Set `losses` to the losses that no operator has accepted, and remove the evidence of the others."""
        accepted = self.state.irregular.accepted
        settled = [loss for loss in losses if any(loss.accepted_by(a, self._origin.identity) for a in accepted)]
        self._forget(settled, "an operator has accepted that")
        self.losses = [loss for loss in losses if loss not in settled]

    def _settle_copied(self, end: int) -> None:
        """Drop losses of another log if this log holds their records at any offset: it is then a copy of the other."""
        wanted = {loss.digest for loss in self.losses if loss.witness.log != self._origin.identity}
        if not wanted:
            return
        found: set[bytes] = set()
        with closing(self._apart(0, end)) as records:
            for record in records:
                found |= wanted & {value_digest(record.value)}
        copied = [loss for loss in self.losses if loss.witness.log != self._origin.identity and loss.digest in found]
        self._forget(copied, "this log is a copy that holds the record at another offset")
        self.losses = [loss for loss in self.losses if loss not in copied]

    def _forget(self, losses: Sequence[Loss], why: str) -> None:
        """Remove the files and snapshots that prove these losses."""
        for loss in losses:
            _LOG.warning("%s: the %s %s is removed; %s", why, loss.witness.kind, loss.witness.where, loss.detail)
            if loss.witness.kind == FILE:
                discard(Path(loss.witness.where))
            elif loss.witness.kind == MEMORY:
                self._states.remembered.pop(self._partition, None)
        if self._states.snapshots is not None:
            self._states.snapshots.forget(self._origin, [loss.witness for loss in losses])

    def _lost_by(self, state: PartitionState, end: int) -> Loss | None:
        """As `_lost`, for a downloaded snapshot."""
        anchor = Anchor(state.next_offset, state.digest, state.last_created_at)
        return self._lost(Witness(SNAPSHOT, self._origin.identity, anchor, state.path.name), end)

    def _lost(self, witness: Witness, end: int) -> Loss | None:
        """The loss that the witness proves about the log, which ends at `end`; None if the log holds its record."""
        next_offset = witness.anchor.next_offset
        if not next_offset:
            return None
        identity = self._origin.identity
        if witness.log != identity:
            return Loss(self._partition, witness, f"is {identity}: the topic was deleted and made again")
        if next_offset > end:
            return Loss(self._partition, witness, f"ends at offset {end}")
        try:
            record = self._remembered(next_offset - 1)
        except CorruptError:
            first = self._cluster.earliest([self._partition])[self._partition]
            return Loss(self._partition, witness, f"begins at offset {first}")
        if record is None:
            return Loss(self._partition, witness, "holds no record there")
        if (digest := value_digest(record.value)) != witness.anchor.digest:
            return Loss(self._partition, witness, f"holds a record with digest {digest.hex()} there", digest)
        return None

    def _remembered(self, offset: int) -> Record | None:
        """The committed record at this offset; None if there is none. Leaves the tail at the next offset.

        Raises CorruptError if the log begins after this offset.
        """
        self._begin_at(offset)
        self._tail_at = _NOWHERE
        for record in chain.from_iterable(self._records_to(_open(self._tail), offset + 1, 1)):
            if record.offset == offset:
                self._tail_at = offset + 1
            return record if record.offset == offset else None
        return None

    def _begin_at(self, offset: int) -> None:
        """Make the tail read from `offset`, unless it is there already."""
        if self._tail is not None:
            if self._tail_at == offset:
                return
            self._tail.close()
        self._tail, self._tail_at = Reader(self._kafka, {self._partition: offset}, self._cluster), offset

    def _offer(self, state: PartitionState, *, closing: bool = False) -> None:
        if self._states.snapshots is not None and state.shared:
            self._states.snapshots.offer(self._origin, state.path, state.next_offset, closing=closing)

    def _produce(self, producer: Producer, staged: Staged, number: int) -> None:
        """Send the records of some events; the first is record `number` of the transaction, counted from 0."""
        topic, partition = self._kafka.topic, self._partition
        first = first_of(staged.events)
        key, timestamp = str(first.package_id).encode(), first.created_at // 1000
        of_each = headers_all(staged.events, self._origin.identity, staged.created, staged.traceparents)
        values = staged.values if self._framing is None else map(self._framing.sent, staged.values)
        for at, (value, headers) in enumerate(zip(values, of_each, strict=True), number):
            delivered = self._delivered.of(at)
            give_up = math.inf
            while True:
                try:
                    producer.produce(topic, value, key, partition, delivered, timestamp=timestamp, headers=headers)
                    break
                except BufferError:  # the client's queue is full: wait for it to drain
                    if time.monotonic() > give_up:
                        raise
                    give_up = min(give_up, time.monotonic() + COMMIT_SECONDS)
                    producer.poll(_LOOK_SECONDS)

    def _read_back(self, values: Sequence[bytes]) -> int:
        """Wait until the tail shows exactly these records in this order. Returns the offset of the last one.

        Values identify records, because each contains its event's id.
        """
        tail = _open(self._tail)
        wait = _Wait(tail)
        seen = last = 0
        while seen < len(values):
            found, last = tail.take_values(len(values) - seen, _LEADERS_SECONDS)
            if not found and wait.is_over():
                raise UnavailableError(self._cause("events that were appended are not readable"))
            if found != values[seen : seen + len(found)]:
                raise UnavailableError(f"partition {self._partition} holds another event before offset {last + 1}")
            seen += len(found)
        return last

    def _require_all_read(self) -> None:
        """Raise UnavailableError unless the transaction begins where reading has ended.

        Its events were decided from the records that were read. A log that has lost some of these still accepts events
        from a producer if it has none of the producer's records left. Whether others have appended anything is only
        checked for the first transaction of a lease: later ones follow a commit of this producer.
        """
        late = f"Kafka did not take the records of a transaction within {COMMIT_SECONDS:g} s"
        first, tail = self._delivered.first(late), _open(self._tail)
        if first < self.state.next_offset:
            raise UnavailableError(
                f"partition {self._partition} ends at {first}, although it was read up to {self.state.next_offset}"
            )
        if self._first_committed:
            return
        wait = _Wait(tail)
        while tail.reached()[self._partition] < first:
            if tail.take(1, _LOOK_SECONDS):
                raise UnavailableError("another process has written to the partition")
            if wait.is_over():
                raise UnavailableError(self._cause("what lies before the transaction cannot be read"))

    def _read_to(self, target: int) -> int:
        """Fold the records before `target` into the state. Returns their number. Stops before a bad record."""
        count, self._tail_at = 0, _NOWHERE
        for found in self._records_to(_open(self._tail), target):
            for record in found:
                self._fold(record)
                if self._stopped is not None:
                    return count
                count += 1
            self.save_if_due()
        return count

    def _records_to(self, reader: Reader, target: int, limit: int = _READ) -> Iterator[Sequence[Record]]:
        """Read up to `target`, at most `limit` records at a time."""
        wait = _Wait(reader)
        while reader.reached()[self._partition] < target:
            try:
                found = reader.take(limit, _LOOK_SECONDS)
            except CorruptError as error:
                if self._cluster.earliest([self._partition])[self._partition] > reader.reached()[self._partition]:
                    raise
                # These offsets lie below the barrier, so only a deposed leader can lack them.
                raise UnavailableError(
                    f"partition {self._partition} was read from a broker that no longer leads it"
                ) from error
            yield found
            if found:
                wait = _Wait(reader)
            elif wait.is_over():
                raise UnavailableError(self._cause("the end of the log cannot be read"))
            if self._stopping():
                raise PartitionNotOwnedError("the partition was handed over while it was being taken over")

    def _apart(self, start: int, end: int) -> Generator[Record]:
        """The records from `start` to before `end`, from a separate reader. Closing the generator closes it."""
        reader = Reader(self._kafka, {self._partition: start}, self._cluster)
        try:
            yield from chain.from_iterable(self._records_to(reader, end))
        finally:
            reader.close()

    def _fold(self, record: Record) -> None:
        """Fold the record into the state, or stop before it if it is not an event."""
        found = self._read(record)
        if isinstance(found, BadRecord):
            if not self._is_skipped(found):
                self._stopped = found
                return
            self.state.note_skipped()
        elif is_administrative(found):
            self.state.note_administrative(found)
        else:
            try:
                self.state.apply(found)
            except CorruptError as error:
                if self.restored_from != FROM_LOG:
                    raise  # the state itself may be wrong: the caller reads the log from its start
                place = f"offset {record.offset} of partition {record.partition}"
                _LOG.error("package %s takes no more events: %s, at %s", found.package_id, error.detail, place)
                self.state.quarantine(found, f"{error.detail}, at {place}")
        self.state.confirm(record.offset, record.value)

    def _read(self, record: Record) -> Event | BadRecord:
        return read_record(record, self._partition_of)

    def _partition_of(self, package_id: UUID) -> int:
        return partition_of(package_id, self._partitions)

    def _is_skipped(self, bad: BadRecord) -> bool:
        if _skip_of(bad, self._skips) is None:
            self._skips |= self._look_ahead(bad.offset).skips
        return _skip_of(bad, self._skips) is not None

    def _look_ahead(self, offset: int) -> _Ahead:
        """Look at the records from `offset`, or from the end of the state if that is lower, to the end of the log."""
        start = min(offset, self.state.next_offset)
        ahead = _Ahead(max(start, self._end, self._cluster.last_stable([self._partition])[self._partition]))
        aggregate = partition_id(self._origin.identity, self._partition)
        with closing(self._apart(start, ahead.end)) as records:
            for record in records:
                if not isinstance(found := self._read(record), Event):
                    continue
                if isinstance(found.payload, LogSkipped):
                    ahead.skips[found.payload.digest] = record.offset, found
                if found.package_id == aggregate:
                    ahead.administrative = AdministrativeHead.of(found)
                    if isinstance(found.payload, LossAccepted):
                        ahead.accepted.append(AcceptedLoss.of(found, found.payload))
                ahead.last_created_at = max(ahead.last_created_at, found.created_at)
        return ahead

    def _record_at(self, offset: int) -> Event | BadRecord | None:
        """The committed record at this offset; None if there is none.

        Raises PushBackError if an open transaction hides the record, which may itself be uncommitted.
        """
        only = [self._partition]
        end = max(self._end, self._cluster.last_stable(only)[self._partition])
        if end <= offset < self._cluster.high_watermark(only)[self._partition]:
            raise PushBackError(
                f"the record at offset {offset} of partition {self._partition} is hidden by an open transaction: try "
                "again when that has ended",
                _HIDDEN_RETRY_SECONDS,
            )
        if not 0 <= offset < end:
            return None
        with closing(self._apart(offset, offset + 1)) as records:
            found = next(records, None)
        return self._read(found) if found is not None and found.offset == offset else None

    def _offset_of(self, value: bytes, start: int) -> int:
        """Wait until a record with this value can be read at `start` or later. Returns its offset."""
        reader = Reader(self._kafka, {self._partition: start}, self._cluster)
        wait = _Wait(reader)
        try:
            while not wait.is_over():
                for record in reader.take(_READ, _LOOK_SECONDS):
                    if record.value == value:
                        return record.offset
        finally:
            reader.close()
        raise UnavailableError(self._cause("a record that was appended is not readable"))

    def _read_on(self, target: int) -> None:
        """Read on from the end of the state up to `target`, with a new tail."""
        self._stopped = None
        self._end = max(self._end, target)
        _open(self._tail).close()
        self._tail = Reader(self._kafka, {self._partition: self.state.next_offset}, self._cluster)
        try:
            self._read_to(target)
        except CorruptError as error:
            # The state itself may be wrong; the next take-over finds that out.
            raise UnavailableError(f"partition {self._partition} must be read again: {error.detail}") from error

    def _cause(self, what: str) -> str:
        partition, kafka = self._partition, self._kafka
        stable = self._cluster.last_stable([partition])[partition]
        high = self._cluster.high_watermark([partition])[partition]
        if stable >= high:
            return f"partition {partition}: {what}, although no transaction is open"
        return (
            f"partition {partition}: {what}: a transaction that is open since offset {stable} hides all up to {high}. "
            f"It ends by its own time-out; `kafka-transactions.sh --bootstrap-server {kafka.bootstrap} find-hanging "
            f"--topic {kafka.topic} --partition {partition}` shows one that does not, and its `abort` ends it"
        )


def _skip_of(bad: BadRecord, skips: Mapping[bytes, tuple[int, Event]]) -> Event | None:
    """The skip that covers the record: the last skip of its digest, if it comes after the record."""
    offset, event = skips.get(bad.digest, (bad.offset, None))
    return event if offset > bad.offset else None


class _Delivered:
    """Collects, from delivery callbacks, where Kafka has put a transaction's records, or the last error.

    Only the first and the last record have a callback: one for each would cost time. If another record is refused, the
    commit fails.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._offsets: list[int] = []
        self._error: KafkaError | None = None

    def of(self, number: int) -> Self | None:
        """The callback of this record, counted from 0; None if it needs none."""
        return self if number in {0, self._count - 1} else None

    def __call__(self, error: KafkaError | None, message: Message) -> None:
        offset = message.offset()
        if error is not None:
            self._error = error
        elif offset is not None and offset >= 0:
            self._offsets.append(offset)

    def first(self, otherwise: str) -> int:
        """The offset of the first record.

        Raises KafkaException if a record was refused, and UnavailableError if not all were delivered, or if the log has
        since lost some of them: it may still accept the others.
        """
        if self._error is not None:
            raise KafkaException(self._error)
        if len(self._offsets) < min(2, self._count):
            raise UnavailableError(otherwise)
        first, last = self._offsets[0], self._offsets[-1]
        if last < first + self._count - 1:
            raise UnavailableError(f"the log lost records after offset {first} while a transaction was being sent")
        return first


class _Wait:
    """A wait for records that the log is known to hold.

    A reader of a deposed leader gets neither errors nor records from it, so the wait makes the reader look up the
    leaders repeatedly.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        began = time.monotonic()
        self._until = began + PATIENCE_SECONDS
        self._looked = began

    def is_over(self) -> bool:
        """Whether PATIENCE_SECONDS have passed. May block for a second while it looks for the leaders."""
        now = time.monotonic()
        if now > self._looked + _LEADERS_SECONDS:
            self._reader.look_for_leaders(_LEADERS_SECONDS)
            self._looked = time.monotonic()
        return now > self._until


def _open(part: _T | None) -> _T:
    if part is None:
        raise UnavailableError("the lease of the partition has ended")
    return part


class KafkaDriver(Driver):
    """See `Driver`."""

    def __init__(
        self, kafka: KafkaSettings, cluster: Cluster, identity: UUID, states: States, group: WriterGroup, guard: Guard
    ) -> None:
        self._identity = identity
        self.topic = kafka.topic
        self.doubt = Flag()
        """Set while it is unknown whether the topic is still the log's: nothing is committed then."""
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
