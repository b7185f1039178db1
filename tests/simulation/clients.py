"""The clients of `confluent_kafka` that the product uses, on the model of a cluster.

They have the private state of real clients: the leaders that they know, which may be deposed; a producer's sequences; a
consumer's position. A call blocks its simulated thread as the real one blocks. An answer may get lost although the
request was carried out, and a request that was sent twice may be carried out late.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

import confluent_kafka
import confluent_kafka.admin
from confluent_kafka import ConsumerGroupState, IsolationLevel, KafkaError, KafkaException, TopicPartition

from tests.simulation.kafka import Broker, Cluster, Entry, Member, RefusedError, Replica
from tests.simulation.scheduler import Killed, Process, Scheduler

_T = TypeVar("_T")
_admin: Any = confluent_kafka.admin

_LATENCY_SECONDS = 0.002
_REFRESH_SECONDS = 0.05
_REQUEST_SECONDS = 3.0
"""How long a client waits for a broker that is out of reach before it gives a connection up."""

_RETRIED = frozenset(
    {
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.NOT_ENOUGH_REPLICAS,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError._TRANSPORT,
    }
)
_FENCING = frozenset({KafkaError.INVALID_PRODUCER_EPOCH, KafkaError.INVALID_PRODUCER_ID_MAPPING})


class Network:
    """What connections do today; faults change it."""

    def __init__(self) -> None:
        self.lost_answers = 0.0
        """The part of answers that are lost although the request was carried out."""
        self.late_requests = 0.0
        """The part of requests to end a transaction that are carried out once more, later."""
        self.late_seconds = 8.0


class World:
    """What every client is made for; set by the simulation while it runs."""

    cluster: Cluster
    network: Network
    scheduler: Scheduler


class Message:
    """As `confluent_kafka.Message`."""

    __slots__ = ("_entry", "_error", "_offset", "_partition")

    def __init__(
        self, partition: int | None, offset: int | None, entry: Entry | None, error: KafkaError | None
    ) -> None:
        self._partition = partition
        self._offset = offset
        self._entry = entry
        self._error = error

    def error(self) -> KafkaError | None:
        return self._error

    def value(self) -> bytes | None:
        return self._entry.value if self._entry is not None else None

    def key(self) -> bytes | None:
        return self._entry.key if self._entry is not None else None

    def headers(self) -> Any:
        return self._entry.headers if self._entry is not None else None

    def timestamp(self) -> tuple[int, int]:
        return 1, self._entry.timestamp if self._entry is not None else -1

    def topic(self) -> str:
        return World.cluster.topic

    def partition(self) -> int | None:
        return self._partition

    def offset(self) -> int | None:
        return self._offset

    def leader_epoch(self) -> int | None:
        return self._entry.leader_epoch if self._entry is not None else None


def _failed(code: int, **about: bool) -> KafkaException:
    return KafkaException(KafkaError(code, KafkaError(code).name(), **about))


class _Client:
    """What all kinds share: a process, the leaders that it knows, requests."""

    def __init__(self, config: Mapping[str, Any], logger: object = None) -> None:
        self.config = dict(config)
        self._cluster = World.cluster
        self._scheduler = World.scheduler
        self._process: Process = World.scheduler.current.process
        self._leaders: dict[int, tuple[int, int]] = {}
        self._refreshed = -1.0
        servers = str(config.get("bootstrap.servers", "")).split(",")
        self._doors = [int(server[1:].partition(":")[0]) for server in servers if server.startswith("b")]

    def poll(self, timeout: float = -1) -> Any:
        self._living()
        return 0

    def _living(self) -> None:
        if not self._process.alive:
            raise Killed

    def _request(self, broker: int, act: Callable[[], _T], deadline: float) -> _T:
        """Send a request to a broker and wait for its answer. Raises RefusedError, also when there is no answer."""
        self._living()
        scheduler, rng = self._scheduler, self._scheduler.rng
        scheduler.sleep(rng.random() * _LATENCY_SECONDS)
        if not self._cluster.reachable(self._process, broker):
            self._give_up(deadline)
        answer = act()
        scheduler.sleep(rng.random() * _LATENCY_SECONDS)
        if not self._cluster.reachable(self._process, broker) or rng.random() < World.network.lost_answers:
            self._give_up(deadline)
        return answer

    def _give_up(self, deadline: float) -> None:
        left = max(0.0, deadline - self._scheduler.now)
        refused_at_once = self._scheduler.rng.random() < 0.5
        self._scheduler.sleep(min(left, 0.02 if refused_at_once else _REQUEST_SECONDS))
        raise RefusedError(KafkaError._TRANSPORT)

    def _leader(self, number: int, deadline: float) -> tuple[int, int]:
        """The leader as this client knows it, and its epoch. Raises RefusedError."""
        if number not in self._leaders:
            self._refresh(deadline)
        if number not in self._leaders:
            raise RefusedError(KafkaError.LEADER_NOT_AVAILABLE)
        return self._leaders[number]

    def _refresh(self, deadline: float) -> None:
        """Ask any broker who leads. An answer of an older epoch than what is known is not believed."""
        now = self._scheduler.now
        if now < self._refreshed + _REFRESH_SECONDS:
            self._scheduler.sleep(_REFRESH_SECONDS)
        self._refreshed = self._scheduler.now
        broker = self._nearest()
        if not self._cluster.exists:
            raise RefusedError(KafkaError.UNKNOWN_TOPIC_OR_PART)
        try:
            leaders = self._request(broker, lambda: self._cluster.metadata(broker), deadline)
        except RefusedError:
            self._process.nearest = self._scheduler.rng.randrange(len(self._cluster.brokers))
            raise
        for number, (leader, epoch) in leaders.items():
            if epoch >= self._leaders.get(number, (0, -1))[1]:
                self._leaders[number] = leader, epoch

    def _nearest(self) -> int:
        """The broker that is asked for what all of them know: mostly one that answered the process before."""
        rng = self._scheduler.rng
        brokers = self._doors if self._doors and not self._leaders else range(len(self._cluster.brokers))
        return brokers[self._process.nearest % len(brokers)] if rng.random() < 0.9 else rng.choice(brokers)

    def _at_leader(self, number: int, act: Callable[[Replica], _T], deadline: float) -> _T:
        """Ask a partition's leader, looking for another one as long as there is time. Raises RefusedError."""
        while True:
            try:
                return self._once_at_leader(number, act, deadline)
            except RefusedError as error:
                if error.code not in _RETRIED or self._scheduler.now >= deadline:
                    raise
            try:
                self._scheduler.sleep(0.01)
                self._refresh(deadline)
            except RefusedError as error:
                if self._scheduler.now >= deadline:
                    raise
                if error.code != KafkaError._TRANSPORT:
                    raise

    def _once_at_leader(self, number: int, act: Callable[[Replica], _T], deadline: float) -> _T:
        broker, epoch = self._leader(number, deadline)
        return self._request(broker, lambda: act(self._cluster.leader_of(number, broker, epoch=epoch)), deadline)

    def _at_coordinator(self, kind: str, act: Callable[[], _T], deadline: float) -> _T:
        """Ask a coordinator, once. Raises RefusedError."""
        broker = self._cluster.coordinator[kind]

        def checked() -> _T:
            if self._scheduler.now < self._cluster.away_until[kind] or self._cluster.brokers[broker].fenced:
                raise RefusedError(KafkaError.COORDINATOR_NOT_AVAILABLE)
            if self._cluster.coordinator[kind] != broker:
                raise RefusedError(KafkaError.NOT_COORDINATOR)
            if not self._cluster.connected(self._cluster.brokers[broker].name, "controller"):
                raise RefusedError(KafkaError.REQUEST_TIMED_OUT)  # nothing that it writes is replicated
            return act()

        return self._request(broker, checked, deadline)


class Producer(_Client):
    """As `confluent_kafka.Producer`, with a transactional id or without."""

    def __init__(self, config: Mapping[str, Any], logger: object = None) -> None:
        super().__init__(config, logger)
        self._name: str | None = config.get("transactional.id")
        self._timeout = float(config.get("transaction.timeout.ms", 60_000)) / 1000
        self._id = self._epoch = -1
        self._open = False
        self._registered: set[int] = set()
        self._waiting: list[tuple[int, Entry, Any]] = []
        self._sequences: dict[int, int] = {}
        self._fatal: KafkaException | None = None
        self._spoiled: KafkaException | None = None
        self._delivered: list[tuple[Any, KafkaError | None, Message]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def init_transactions(self, timeout: float = -1) -> None:
        deadline = self._deadline(timeout)
        name = self._name
        assert name is not None
        self._id, self._epoch = self._coordinated(lambda: self._cluster.init_producer(name, self._timeout), deadline)
        self._sequences.clear()

    def begin_transaction(self) -> None:
        self._usable()
        if self._open:
            raise _failed(KafkaError._STATE)
        if self._id < 0:
            raise _failed(KafkaError._STATE)
        self._open, self._spoiled = True, None
        self._registered = set()

    def produce(
        self,
        topic: str,
        value: bytes | None = None,
        key: bytes | str | None = None,
        partition: int = -1,
        on_delivery: Any = None,
        timestamp: int = 0,
        headers: Any = None,
        callback: Any = None,
    ) -> None:
        self._usable()
        if self._name is not None and not self._open:
            raise _failed(KafkaError._STATE)
        stamp = timestamp or self._process.wall_clock() // 1000
        coded = key.encode() if isinstance(key, str) else key
        entry = Entry(coded, value, dict(headers or {}), stamp, self._id, self._epoch, sender=self._process)
        self._waiting.append((partition, entry, on_delivery or callback))

    def poll(self, timeout: float = 0) -> int:
        self._living()
        if self._waiting and timeout:
            self._send(self._scheduler.now + timeout)
        return self._call_back()

    def flush(self, timeout: float = -1) -> int:
        self._living()
        deadline = self._deadline(timeout)
        self._send(deadline)
        self._call_back()
        return len(self._waiting)

    def purge(self, *_: object, **__: object) -> None:
        self._living()
        self._waiting.clear()

    def send_offsets_to_transaction(
        self, positions: Sequence[TopicPartition], group_metadata: Any, timeout: float = -1
    ) -> None:
        self._usable()
        deadline = self._deadline(timeout)
        group = getattr(group_metadata, "group", "offsets")
        offsets = {p.partition: (p.offset, p.metadata or "") for p in positions}
        self._register(-1, deadline)
        name, producer, epoch = str(self._name), self._id, self._epoch
        self._coordinated(lambda: self._cluster.add_offsets(name, producer, epoch, group, offsets), deadline)

    def commit_transaction(self, timeout: float = -1) -> None:
        self._usable()
        if not self._open:
            raise _failed(KafkaError._STATE)
        deadline = self._deadline(timeout)
        self._send(deadline)
        self._call_back()
        self._usable()
        if self._spoiled is not None:
            raise self._spoiled
        if self._waiting:
            raise _failed(KafkaError._TIMED_OUT, retriable=True)
        self._end("commit", deadline)

    def abort_transaction(self, timeout: float = -1) -> None:
        self._usable()
        self._waiting.clear()
        self._end("abort", self._deadline(timeout))

    def _end(self, outcome: str, deadline: float) -> None:
        if self._registered:
            name, producer, epoch = str(self._name), self._id, self._epoch
            scheduler, network = self._scheduler, World.network

            def end() -> None:
                if scheduler.rng.random() < network.late_requests:
                    coordinator = self._cluster.brokers[self._cluster.coordinator["transaction"]]
                    late = partial(again, coordinator, coordinator.starts)
                    scheduler.after(scheduler.rng.random() * network.late_seconds, late)
                self._cluster.end_transaction(name, producer, epoch, outcome)

            def again(at: Broker, starts: int) -> None:
                if at.number != self._cluster.coordinator["transaction"] or at.starts != starts:
                    return
                with suppress(RefusedError):
                    self._cluster.end_transaction(name, producer, epoch, outcome)

            self._coordinated(end, deadline)
        self._open = False

    def _usable(self) -> None:
        self._living()
        if self._fatal is not None:
            raise self._fatal

    def _deadline(self, timeout: float) -> float:
        return self._scheduler.now + (60.0 if timeout < 0 else timeout)

    def _coordinated(self, act: Callable[[], _T], deadline: float) -> _T:
        """Ask the coordinator until it has done it. Raises KafkaException."""
        pause = 0.002
        while True:
            try:
                return self._at_coordinator("transaction", act, deadline)
            except RefusedError as error:
                if error.code in _FENCING:
                    self._fatal = _failed(KafkaError._FENCED, fatal=True)
                    raise self._fatal from None
                if error.code == KafkaError.INVALID_TXN_STATE:
                    self._fatal = _failed(KafkaError.INVALID_TXN_STATE, fatal=True)
                    raise self._fatal from None
                if self._scheduler.now >= deadline:
                    raise _failed(KafkaError._TIMED_OUT, retriable=True) from None
            self._scheduler.sleep(min(pause, max(0.0, deadline - self._scheduler.now)))
            pause = min(0.1, 2 * pause)

    def _register(self, number: int, deadline: float) -> None:
        if number in self._registered:
            return
        name, producer, epoch = str(self._name), self._id, self._epoch
        # It counts as registered before the answer comes: the coordinator may have done it.
        self._coordinated(lambda: self._cluster.add_partition(name, producer, epoch, number), deadline)
        self._registered.add(number)

    def _send(self, deadline: float) -> None:
        """Bring what waits to its leaders; what is left when the time is over waits on."""
        rng = self._scheduler.rng
        while self._waiting and self._fatal is None and self._spoiled is None:
            number = self._waiting[0][0]
            batch = [found for found in self._waiting if found[0] == number]
            if len(batch) > 1 and rng.random() < 0.2:
                batch = batch[: rng.randrange(1, len(batch))]
            sequence = self._sequences.get(number, 0)
            for place, (_, entry, _) in enumerate(batch):
                if self._name is not None:
                    entry.sequence = sequence + place
            try:
                if self._name is not None:
                    self._register(number, deadline)
                end = self._append(number, [entry for _, entry, _ in batch], deadline)
            except KafkaException:
                return
            except RefusedError as error:
                if error.code in _RETRIED or error.code == KafkaError.LEADER_NOT_AVAILABLE:
                    if self._scheduler.now >= deadline:
                        return
                    continue
                if error.code in _FENCING:
                    self._fatal = _failed(KafkaError._FENCED, fatal=True)
                else:
                    self._spoiled = _failed(error.code, txn_requires_abort=True)
                for _, entry, callback in batch:
                    self._delivered.append((callback, KafkaError(error.code), Message(number, None, entry, None)))
                self._waiting = [found for found in self._waiting if found not in batch]
                return
            self._sequences[number] = sequence + len(batch)
            for place, (_, entry, callback) in enumerate(batch):
                message = Message(number, end - len(batch) + place, entry, None)
                self._delivered.append((callback, None, message))
            sent = {id(entry) for _, entry, _ in batch}
            self._waiting = [found for found in self._waiting if id(found[1]) not in sent]

    def _append(self, number: int, entries: list[Entry], deadline: float) -> int:
        """Append at the leader and wait until it is replicated; the offset behind it. Raises RefusedError."""
        cluster, scheduler = self._cluster, self._scheduler

        def append(replica: Replica) -> int:
            end = cluster.append(replica, number, entries, self._name)
            epoch = replica.leads
            while replica.leads != epoch or replica.high < end:
                if replica.leads != epoch:
                    raise RefusedError(KafkaError.NOT_LEADER_FOR_PARTITION)
                left = deadline - scheduler.now
                if left <= 0:
                    raise RefusedError(KafkaError.REQUEST_TIMED_OUT)
                cluster.changed[number].await_here()
                scheduler.wait(left)
            return end

        return self._at_leader(number, append, deadline)

    def _call_back(self) -> int:
        delivered, self._delivered = self._delivered, []
        for callback, error, message in delivered:
            if callback is not None:
                callback(error, message)
        return len(delivered)


class Consumer(_Client):
    """As `confluent_kafka.Consumer`, of partitions that it is given or of a group's."""

    def __init__(self, config: Mapping[str, Any], logger: object = None) -> None:
        super().__init__(config, logger)
        self._committed_only = config.get("isolation.level") == "read_committed"
        self._group_name = str(config.get("group.id", ""))
        self._positions: dict[int, int] = {}
        self._epochs: dict[int, int] = {}
        """The leader epoch of what lies before a position, where it is known."""
        self._validated: dict[int, int] = {}
        """The leader epoch for which it was looked whether a position is still in the log."""
        self._moved: set[int] = set()
        self._paused: set[int] = set()
        self._turn = 0
        self._subscribed = False
        self._callbacks: dict[str, Any] = {}
        self._member: Member | None = None
        self._generation = -1
        self._owned: set[int] = set()
        self._rejoining = self._waits_for_join = False
        self._heard = self._beat_at = 0.0
        self._closed = False
        self._given = False

    # --- partitions ---

    def assign(self, partitions: Iterable[TopicPartition]) -> None:
        self._living()
        self._given = True
        self._positions, self._epochs = {}, {}
        self._moved.clear()
        self.incremental_assign(partitions)

    def incremental_assign(self, partitions: Iterable[TopicPartition]) -> None:
        self._living()
        self._given = True
        for p in partitions:
            self._positions[p.partition] = p.offset
            self._validated.pop(p.partition, None)
            epoch: Any = p.leader_epoch
            if epoch is not None and epoch >= 0:
                self._epochs[p.partition] = epoch

    def incremental_unassign(self, partitions: Iterable[TopicPartition]) -> None:
        self._living()
        for p in partitions:
            self._drop(p.partition)

    def _drop(self, number: int) -> None:
        self._positions.pop(number, None)
        self._epochs.pop(number, None)
        self._validated.pop(number, None)
        self._moved.discard(number)
        self._paused.discard(number)

    def pause(self, partitions: Iterable[TopicPartition]) -> None:
        self._paused.update(p.partition for p in partitions)

    def resume(self, partitions: Iterable[TopicPartition]) -> None:
        self._paused.difference_update(p.partition for p in partitions)

    def seek(self, partition: TopicPartition) -> None:
        self._positions[partition.partition] = partition.offset
        self._validated.pop(partition.partition, None)

    def position(self, partitions: Iterable[TopicPartition]) -> list[TopicPartition]:
        """Only what was consumed moves it, markers that follow included."""
        self._living()
        topic = self._cluster.topic
        return [
            TopicPartition(topic, n, self._positions[n], leader_epoch=self._epochs.get(n, -1))
            if n in self._moved
            else TopicPartition(topic, n, -1001)
            for n in (p.partition for p in partitions)
        ]

    # --- reading ---

    def list_topics(self, topic: str, timeout: float = -1) -> None:
        """Only looks for the leaders."""
        try:
            self._refresh(self._scheduler.now + (10.0 if timeout < 0 else timeout))
        except RefusedError as error:
            raise _failed(error.code) from None

    def poll(self, timeout: float = -1) -> Message | None:
        found = self.consume(1, timeout)
        return found[0] if found else None

    def consume(self, num_messages: int = 1, timeout: float = -1) -> list[Message]:
        self._living()
        scheduler = self._scheduler
        deadline = scheduler.now + (3600.0 if timeout < 0 else timeout)
        found: list[Message] = []
        while True:
            if self._subscribed:
                self._serve_group(deadline)
            error = self._fetch(num_messages, found, deadline)
            if error is not None:
                found.append(error)
            if len(found) >= num_messages or error is not None:
                return found
            left = deadline - scheduler.now
            if left <= 0:
                return found
            wanted = self._reading()
            for number in wanted:
                self._cluster.changed[number].await_here()
            scheduler.wait(min(left, 0.5) if self._subscribed or wanted else left)

    def _reading(self) -> list[int]:
        return [number for number in sorted(self._positions) if number not in self._paused]

    def _fetch(self, most: int, found: list[Message], deadline: float) -> Message | None:
        wanted = self._reading()
        self._turn += 1
        for place in range(len(wanted)):
            number = wanted[(place + self._turn) % len(wanted)]
            if len(found) >= most:
                return None
            try:
                self._take(number, most, found)
            except RefusedError as error:
                if error.code == KafkaError.OFFSET_OUT_OF_RANGE:
                    return Message(number, None, None, KafkaError(KafkaError._AUTO_OFFSET_RESET))
                if error.code == KafkaError.UNKNOWN_TOPIC_OR_PART:
                    return Message(number, None, None, KafkaError(error.code))
                try:
                    if self._scheduler.now < deadline:
                        self._refresh(deadline)
                except RefusedError:
                    continue
        return None

    def _take(self, number: int, most: int, found: list[Message]) -> None:
        """What the leader that this client knows has, up to what is stable there."""
        cluster = self._cluster
        if number not in self._leaders:
            raise RefusedError(KafkaError.LEADER_NOT_AVAILABLE)
        broker, epoch = self._leaders[number]
        if not cluster.reachable(self._process, broker):
            raise RefusedError(KafkaError._TRANSPORT)
        replica = cluster.leader_of(number, broker, epoch=epoch)
        if epoch < self._epochs.get(number, -1):
            raise RefusedError(KafkaError.UNKNOWN_LEADER_EPOCH)
        position, read_in = self._positions[number], self._epochs.get(number, -1)
        if epoch > self._validated.get(number, -1):
            # As OffsetForLeaderEpoch tells: what was read under an older leader may have been cut off since.
            ends = (o for o in range(min(position, len(replica.log))) if replica.log[o].leader_epoch > read_in)
            if read_in >= 0 and next(ends, position) < position:
                raise RefusedError(KafkaError.OFFSET_OUT_OF_RANGE)
            self._validated[number] = epoch
        if position > len(replica.log) or position < 0:
            raise RefusedError(KafkaError.OFFSET_OUT_OF_RANGE)
        end = replica.stable if self._committed_only else replica.high
        log, aborted = replica.log, replica.aborted
        while position < end and len(found) < most:
            entry = log[position]
            if entry.control is None and not (self._committed_only and position in aborted):
                found.append(Message(number, position, entry, None))
            position += 1
        # Markers and what was aborted are passed over together with what comes before them.
        while position < end and (log[position].control is not None or (self._committed_only and position in aborted)):
            position += 1
        if position != self._positions[number]:
            self._positions[number] = position
            self._epochs[number] = log[position - 1].leader_epoch
            self._moved.add(number)

    def committed(self, partitions: Iterable[TopicPartition], timeout: float = -1) -> list[TopicPartition]:
        group = self._cluster.group(self._group_name)
        deadline = self._scheduler.now + (10.0 if timeout < 0 else timeout)
        found = self._grouped(lambda: dict(group.offsets), deadline)
        answer = []
        for p in partitions:
            offset, metadata = found.get(p.partition, (-1001, ""))
            answer.append(TopicPartition(self._cluster.topic, p.partition, offset, metadata))
        return answer

    def commit(self, message: Any = None, offsets: Any = None, asynchronous: bool = True) -> None:
        member, generation = self._member, self._generation
        group = self._cluster.group(self._group_name)

        def commit() -> None:
            if self._subscribed:
                if member is None or member.id not in group.members:
                    raise RefusedError(KafkaError.UNKNOWN_MEMBER_ID)
                if generation != group.generation:
                    raise RefusedError(KafkaError.ILLEGAL_GENERATION)
                if group.state == "Preparing":
                    raise RefusedError(KafkaError.REBALANCE_IN_PROGRESS)
            group.offsets.update({p.partition: (p.offset, p.metadata or "") for p in offsets})

        self._grouped(commit, self._scheduler.now + 10.0)

    def _grouped(self, act: Callable[[], _T], deadline: float) -> _T:
        while True:
            try:
                return self._at_coordinator("group", act, deadline)
            except RefusedError as error:
                again = (
                    KafkaError.COORDINATOR_NOT_AVAILABLE,
                    KafkaError.NOT_COORDINATOR,
                    KafkaError.REQUEST_TIMED_OUT,
                    KafkaError._TRANSPORT,
                )
                if error.code not in again:
                    raise _failed(error.code) from None
                if self._scheduler.now >= deadline:
                    raise _failed(KafkaError._TIMED_OUT) from None
            self._scheduler.sleep(0.1)

    # --- groups ---

    def subscribe(
        self, topics: Sequence[str], on_assign: Any = None, on_revoke: Any = None, on_lost: Any = None
    ) -> None:
        self._living()
        self._subscribed = True
        self._callbacks = {"assign": on_assign, "revoke": on_revoke, "lost": on_lost or on_revoke}

    def memberid(self) -> str:
        return self._member.id if self._member is not None else ""

    def consumer_group_metadata(self) -> Any:
        return SimpleNamespace(group=self._group_name)

    def close(self) -> None:
        self._living()
        if self._closed:
            return
        self._closed = True
        if self._subscribed and self._member is not None:
            if self._owned:
                self._call("revoke", self._owned)
            member = self._member
            with suppress(RefusedError):  # the session will time out
                self._at_coordinator(
                    "group", lambda: self._cluster.leave(self._group_name, member), self._scheduler.now + 1.0
                )
            self._owned, self._member = set(), None
        self._positions.clear()

    def _serve_group(self, deadline: float) -> None:
        """What the client's own thread and its callbacks do, as far as it has come by now."""
        cluster, scheduler, now = self._cluster, self._scheduler, self._scheduler.now
        group = cluster.group(self._group_name)
        coordinator = cluster.coordinator["group"]
        if (
            not cluster.reachable(self._process, coordinator)
            or now < cluster.away_until["group"]
            or not cluster.connected(cluster.brokers[coordinator].name, "controller")
        ):
            if self._member is not None and now - self._heard > self._member.session and self._owned:
                self._lose()
            return
        self._heard = now
        member = self._member
        if member is not None and member.joined and not self._beats(now, group.generation):
            return
        if member is not None and member.id not in group.members:
            self._lose()
            return  # joining again takes the client longer than a call that does not wait
        if member is None or self._rejoining or (group.state == "Preparing" and not member.joined):
            self._rejoining = False
            scheduler.sleep(scheduler.rng.random() * _LATENCY_SECONDS)
            self._member = member = cluster.join(self._group_name, member, self._as_member, self._owned)
            self._waits_for_join = True
        member.polled = scheduler.now
        if group.state == "Stable" and member.joined and self._generation != group.generation:
            self._generation, self._waits_for_join = group.generation, False
            given = set(member.given)
            if gone := self._owned - given:
                self._call("revoke", gone)
                self._owned -= gone
                for number in gone:
                    self._drop(number)
                self._rejoining = True
            if self._member is None or self._generation != self._cluster.group(self._group_name).generation:
                given &= self._owned  # another rebalance has begun meanwhile
            new = given - self._owned
            self._owned |= new
            if new or not gone:
                self._given = False
                self._call("assign", new)
                if not self._given:
                    self.incremental_assign(TopicPartition(cluster.topic, number, 0) for number in sorted(new))

    def _beats(self, now: float, generation: int) -> bool:
        """Whether a heartbeat was answered just now: a member learns by it that others want to rebalance."""
        if self._generation != generation and self._waits_for_join:
            return True
        if now < self._beat_at:
            return False
        late, interval = now - self._beat_at, float(self.config.get("heartbeat.interval.ms", 3_000)) / 1000
        if late > interval:  # the process was frozen: the answer is on its way
            self._beat_at = now + self._scheduler.rng.random() * interval
            return False
        self._beat_at = now + interval
        return True

    def _lose(self) -> None:
        owned, self._owned = self._owned, set()
        self._member, self._generation = None, -1
        if owned:
            self._call("lost", owned)
        for number in owned:
            self._drop(number)

    def _call(self, what: str, numbers: Iterable[int]) -> None:
        callback = self._callbacks.get(what)
        if callback is not None:
            callback(self, [TopicPartition(self._cluster.topic, number) for number in sorted(numbers)])

    def _as_member(self, name: str) -> Member:
        now = self._scheduler.now
        return Member(
            name,
            str(self.config.get("client.id", "")),
            self._process,
            float(self.config.get("session.timeout.ms", 45_000)) / 1000,
            now,
            now,
            float(self.config.get("max.poll.interval.ms", 300_000)) / 1000,
        )


class _Answer:
    """A future of the admin client: the question is asked when somebody waits for the answer."""

    def __init__(self, ask: Callable[[float], Any]) -> None:
        self._ask = ask
        self._result: Any = None
        self._done = False

    def result(self, timeout: float | None = None) -> Any:
        if not self._done:
            deadline = World.scheduler.now + (10.0 if timeout is None else timeout)
            while True:
                try:
                    self._result = self._ask(deadline)
                    break
                except RefusedError as error:
                    if World.scheduler.now >= deadline:
                        raise TimeoutError from None
                    if error.code != KafkaError._TRANSPORT:
                        raise _failed(error.code) from None
                World.scheduler.sleep(0.05)
            self._done = True
        return self._result


class AdminClient(_Client):
    """As `confluent_kafka.admin.AdminClient`."""

    def describe_topics(self, topics: Any, **_: object) -> dict[str, Any]:
        def ask(deadline: float) -> Any:
            self._refresh(deadline)
            cluster = self._cluster
            if not cluster.exists:
                raise RefusedError(KafkaError.UNKNOWN_TOPIC_OR_PART)
            identity = base64.urlsafe_b64encode(cluster.identity.bytes).decode().rstrip("=")
            return SimpleNamespace(
                topic_id=identity,
                partitions=[
                    SimpleNamespace(id=part.number, replicas=list(cluster.brokers), isr=sorted(part.isr))
                    for part in cluster.partitions
                ],
            )

        return {self._cluster.topic: _Answer(ask)}

    def describe_configs(self, resources: Any, **_: object) -> dict[Any, Any]:
        def ask(deadline: float) -> Any:
            broker = self._nearest()
            settings = self._request(broker, lambda: dict(self._cluster.settings), deadline)
            return {name: SimpleNamespace(value=value) for name, value in settings.items()}

        return {resource: _Answer(ask) for resource in resources}

    def list_offsets(
        self, request: Mapping[TopicPartition, Any], isolation_level: IsolationLevel | None = None, **_: object
    ) -> dict[TopicPartition, Any]:
        committed = isolation_level == IsolationLevel.READ_COMMITTED

        def question(number: int, spec: Any) -> _Answer:
            def at(replica: Replica) -> Any:
                if replica.high < replica.began:
                    raise RefusedError(KafkaError.OFFSET_NOT_AVAILABLE)
                offset, timestamp, asked = 0, -1, spec._value
                if asked == _LATEST:
                    offset = replica.stable if committed else replica.high
                elif asked != _EARLIEST:
                    times = [(entry.timestamp, -o) for o, entry in enumerate(replica.log[: replica.high])]
                    wanted = [found for found in times if asked == _NEWEST or found[0] >= asked]
                    chosen = max(wanted) if asked == _NEWEST and wanted else wanted[0] if wanted else (-1, 1)
                    timestamp, offset = chosen[0], -chosen[1]
                return _admin.ListOffsetsResultInfo(offset, timestamp, replica.leads)

            def ask(deadline: float) -> Any:
                return self._once_at_leader(number, at, deadline)

            return _Answer(ask)

        return {found: question(found.partition, spec) for found, spec in request.items()}

    def describe_consumer_groups(self, names: Sequence[str], **_: object) -> dict[str, Any]:
        def question(name: str) -> _Answer:
            def describe() -> Any:
                if self._scheduler.now < self._cluster.away_until["describe"]:
                    raise RefusedError(KafkaError.COORDINATOR_NOT_AVAILABLE)
                group = self._cluster.group(name)
                state = {
                    "Stable": ConsumerGroupState.STABLE,
                    "Empty": ConsumerGroupState.EMPTY,
                    "Preparing": ConsumerGroupState.PREPARING_REBALANCING,
                }[group.state]
                members = [
                    SimpleNamespace(
                        member_id=member.id,
                        client_id=member.client_id,
                        assignment=SimpleNamespace(
                            topic_partitions=[TopicPartition(self._cluster.topic, p) for p in sorted(member.given)]
                        ),
                    )
                    for member in group.members.values()
                ]
                return SimpleNamespace(state=state, members=members)

            return _Answer(lambda deadline: self._at_coordinator("group", describe, deadline))

        return {name: question(name) for name in names}

    def list_consumer_groups(self, **_: object) -> Any:
        def groups() -> Any:
            return SimpleNamespace(valid=[SimpleNamespace(group_id=name) for name in self._cluster.groups])

        return _Answer(lambda deadline: self._at_coordinator("group", groups, deadline))

    def alter_consumer_group_offsets(self, requests: Sequence[Any], **_: object) -> dict[str, Any]:
        def question(request: Any) -> _Answer:
            def alter() -> Any:
                group = self._cluster.group(request.group_id)
                if group.members:
                    raise RefusedError(KafkaError.UNKNOWN_MEMBER_ID)
                group.offsets.update({p.partition: (p.offset, p.metadata or "") for p in request.topic_partitions})
                return SimpleNamespace(topic_partitions=[SimpleNamespace(error=None)])

            return _Answer(lambda deadline: self._at_coordinator("group", alter, deadline))

        return {request.group_id: question(request) for request in requests}

    def create_topics(self, topics: Sequence[Any], **_: object) -> dict[str, Any]:
        def ask(deadline: float) -> None:
            def create() -> None:
                if self._cluster.exists:
                    raise RefusedError(KafkaError.TOPIC_ALREADY_EXISTS)
                self._cluster.exists = True
                self._cluster.settings.update(topics[0].config)

            self._request(self._nearest(), create, deadline)

        return {self._cluster.topic: _Answer(ask)}

    def incremental_alter_configs(self, resources: Sequence[Any], **_: object) -> dict[Any, Any]:
        def question(resource: Any) -> _Answer:
            changed = {entry.name: entry.value for entry in resource.incremental_configs}
            return _Answer(
                lambda deadline: self._request(
                    self._nearest(), lambda: self._cluster.settings.update(changed), deadline
                )
            )

        return {resource: question(resource) for resource in resources}

    def list_consumer_group_offsets(self, requests: Sequence[Any], **_: object) -> dict[str, Any]:
        def question(name: str) -> _Answer:
            def offsets() -> Any:
                found = self._cluster.group(name).offsets
                return SimpleNamespace(
                    topic_partitions=[
                        TopicPartition(self._cluster.topic, p, offset, metadata)
                        for p, (offset, metadata) in found.items()
                    ]
                )

            return _Answer(lambda deadline: self._at_coordinator("group", offsets, deadline))

        return {request.group_id: question(request.group_id) for request in requests}


_EARLIEST, _LATEST, _NEWEST = (
    spec._value
    for spec in (_admin.OffsetSpec.earliest(), _admin.OffsetSpec.latest(), _admin.OffsetSpec.max_timestamp())
)

STAND_INS: dict[object, object] = {
    confluent_kafka.Producer: Producer,
    confluent_kafka.Consumer: Consumer,
    confluent_kafka.Message: Message,
    confluent_kafka.admin.AdminClient: AdminClient,
}
