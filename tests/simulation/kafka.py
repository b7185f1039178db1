"""A model of a Kafka cluster: brokers, replicated partitions, transactions, groups. Nothing in it waits.

Clients reach it through `tests.simulation.clients`; time advances by ticks and by the scheduler's queue.

- The controller always works. A broker that it has not heard from for SESSION_SECONDS loses its leaderships. A broker
  that is cut off from controller and peers does not know that: it continues to answer clients as a leader, with the end
  that it knows, and cannot replicate anything.
- Each replica is a separate list of entries. Followers copy the entries of the leader that they know, and truncate what
  that leader does not have. The high watermark is what all in-sync replicas have.
- Transactions follow the protocol before KIP-890's second part (no new epoch for each transaction). Brokers check them
  as in KIP-890's first part: records outside an open transaction are refused.
- Groups use the classic protocol with the cooperative assignor.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from confluent_kafka import KafkaError

from tests.simulation.scheduler import EPOCH_SECONDS, Process, Scheduler, Signal

TICK_SECONDS = 0.25
SESSION_SECONDS = 3.0
"""After so long without the controller a broker is fenced; `make services` and the fault tests use the same."""

LAG_SECONDS = 5.0
"""After so long a replica that cannot copy is not in sync any more."""

NO_OFFSET = -1


class RefusedError(Exception):
    """A broker's answer by an error code of the protocol."""

    def __init__(self, code: int) -> None:
        super().__init__(KafkaError(code).name())
        self.code = code


@dataclass(slots=True, eq=False)
class Entry:
    """A record, or a marker (`control` is what it says). All replicas share it."""

    key: bytes | None
    value: bytes | None
    headers: Any = None
    timestamp: int = 0
    producer: int = -1
    epoch: int = -1
    sequence: int = -1
    control: str | None = None
    leader_epoch: int = 0
    sender: Process | None = None

    @property
    def transactional(self) -> bool:
        return self.producer >= 0


@dataclass(slots=True, eq=False)
class Replica:
    """One broker's copy of a partition, and what the broker believes of it."""

    broker: int
    log: list[Entry] = field(default_factory=list)
    high: int = 0
    leads: int | None = None
    """The epoch in which the broker believes to be the leader."""
    follows: tuple[int, int] | None = None
    """The leader that it knows, and its epoch."""
    began: int = 0
    """Where its leadership began."""
    isr: set[int] = field(default_factory=set)
    copied: dict[int, int] = field(default_factory=dict)
    """As leader: how far each follower has come."""
    lagging_since: dict[int, float] = field(default_factory=dict)
    producers: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By producer id: its epoch, and the next sequence."""
    open: dict[int, int] = field(default_factory=dict)
    """By producer id: where its open transaction begins."""
    ended: list[tuple[int, int]] = field(default_factory=list)
    """First offset and marker of transactions whose marker may not be replicated yet."""
    aborted: set[int] = field(default_factory=set)

    @property
    def stable(self) -> int:
        """The last stable offset."""
        self.ended = [(first, marker) for first, marker in self.ended if marker >= self.high]
        return min([self.high, *self.open.values(), *(first for first, _ in self.ended)])

    def append(self, entry: Entry) -> int:
        """Add an entry; its offset."""
        offset = len(self.log)
        self.log.append(entry)
        if entry.control is not None:
            first = self.open.pop(entry.producer, None)
            if first is not None:
                self.ended.append((first, offset))
                if entry.control == "abort":
                    self.aborted.update(o for o in range(first, offset) if self.log[o].producer == entry.producer)
            _, sequence = self.producers.get(entry.producer, (0, 0))
            self.producers[entry.producer] = entry.epoch, sequence
        elif entry.transactional:
            self.producers[entry.producer] = entry.epoch, entry.sequence + 1
            self.open.setdefault(entry.producer, offset)
        return offset

    def cut(self, length: int) -> None:
        """Drop what lies at this offset and behind it."""
        kept = self.log[:length]
        self.log, self.producers, self.open, self.ended, self.aborted = [], {}, {}, [], set()
        for entry in kept:
            self.append(entry)
        self.high = min(self.high, length)

    def copy_from(self, leader: Replica) -> None:
        """Become what the leader has."""
        same = min(len(self.log), len(leader.log))
        while same and self.log[same - 1] is not leader.log[same - 1]:
            same -= 1
        if same < len(self.log):
            self.cut(same)
        for entry in leader.log[same:]:
            self.append(entry)


@dataclass(slots=True, eq=False)
class Partition:
    """A partition as the controller has it."""

    number: int
    replicas: list[Replica]
    leader: int | None
    epoch: int
    isr: set[int]


@dataclass(slots=True, eq=False)
class Broker:
    """A broker. `heard` is when the controller heard of it last; `reached` whether it hears of the controller."""

    number: int
    alive: bool = True
    heard: float = 0.0
    fenced: bool = False
    starts: int = 1

    @property
    def name(self) -> str:
        return f"b{self.number}"


@dataclass(slots=True, eq=False)
class Transaction:
    """What the coordinator knows of one transactional id."""

    name: str
    producer: int
    epoch: int = -1
    state: str = "empty"
    """empty, ongoing, prepare-commit, prepare-abort, complete-commit, complete-abort"""
    partitions: set[int] = field(default_factory=set)
    since: float = 0.0
    timeout: float = 60.0
    left: set[int] = field(default_factory=set)
    """Partitions that have no marker yet."""
    offsets: dict[str, dict[int, tuple[int, str]]] = field(default_factory=dict)
    marking: int = 0


@dataclass(slots=True, eq=False)
class Member:
    """A member of a group. `owned` is what it said when it joined last, `given` what it was assigned then."""

    id: str
    client_id: str
    process: Process
    session: float
    seen: float
    polled: float
    longest_poll: float
    owned: set[int] = field(default_factory=set)
    given: set[int] = field(default_factory=set)
    joined: bool = False


@dataclass(slots=True, eq=False)
class Group:
    """A consumer group."""

    name: str
    state: str = "Empty"
    generation: int = 0
    members: dict[str, Member] = field(default_factory=dict)
    since: float = 0.0
    offsets: dict[int, tuple[int, str]] = field(default_factory=dict)


class Cluster:
    """All of it. Methods that clients call raise RefusedError."""

    def __init__(self, scheduler: Scheduler, topic: str, partitions: int, brokers: int = 3) -> None:
        self.scheduler = scheduler
        self.topic = topic
        self.identity = uuid.UUID(int=scheduler.rng.getrandbits(128), version=4)
        self.exists = False
        self.minimum = min(2, brokers)
        self.settings = {
            "cleanup.policy": "delete",
            "retention.ms": "-1",
            "retention.bytes": "-1",
            "unclean.leader.election.enable": "false",
            "message.timestamp.type": "CreateTime",
            "min.insync.replicas": str(self.minimum),
            "max.message.bytes": str(2 << 20),
            "message.timestamp.after.max.ms": str(2**63 - 1),
        }
        self.brokers = [Broker(number) for number in range(brokers)]
        self.partitions = [self._partition(number) for number in range(partitions)]
        self.cuts: dict[frozenset[str], int] = {}
        """Pairs that cannot reach each other, and by how many faults."""
        self.transactions: dict[str, Transaction] = {}
        self.groups: dict[str, Group] = {}
        self.away_until = {"group": 0.0, "transaction": 0.0, "describe": 0.0}
        """Until when a coordinator answers nobody, or does not say who the members of a group are."""
        self.coordinator = {"group": 0, "transaction": 1 % brokers}
        self.changed = [Signal(scheduler) for _ in range(partitions)]
        """Something has happened in a partition."""
        self._producers = 1000
        self._member = 0
        scheduler.after(TICK_SECONDS, self._tick)

    def _partition(self, number: int) -> Partition:
        all_of_them = {broker.number for broker in self.brokers}
        replicas = [Replica(broker.number) for broker in self.brokers]
        leader = number % len(self.brokers)
        for replica in replicas:
            replica.follows = (leader, 0)
        replicas[leader].leads = 0
        replicas[leader].isr = set(all_of_them)
        return Partition(number, replicas, leader, 0, set(all_of_them))

    # --- the network ---

    def connected(self, one: str, other: str) -> bool:
        return not self.cuts or frozenset((one, other)) not in self.cuts

    def cut(self, pairs: Iterable[tuple[str, str]]) -> Callable[[], None]:
        """Cut connections; what is returned mends them."""
        cut = [frozenset(pair) for pair in pairs]
        for pair in cut:
            self.cuts[pair] = self.cuts.get(pair, 0) + 1

        def mend() -> None:
            for pair in cut:
                self.cuts[pair] -= 1
                if not self.cuts[pair]:
                    del self.cuts[pair]

        return mend

    def reachable(self, process: Process, broker: int) -> bool:
        """Whether a client in this process reaches the broker."""
        return self.brokers[broker].alive and self.connected(process.name, self.brokers[broker].name)

    # --- brokers and leaders ---

    def stop_broker(self, number: int) -> None:
        """Kill a broker; its disk stays."""
        self.brokers[number].alive = False
        for partition in self.partitions:
            partition.replicas[number].leads = None
            self.stir(partition.number)

    def start_broker(self, number: int) -> None:
        """Start it again. Requests that were on their way to it are gone."""
        self.brokers[number].alive = True
        self.brokers[number].starts += 1
        for partition in self.partitions:
            partition.replicas[number].follows = None

    def lose_tail(self, number: int, length: int) -> Replica:
        """Let every copy of a partition end at this offset at the latest, as if all brokers had lost power.

        For when no broker is up; a copy that all others follow from now on.
        """
        partition = self.partitions[number]
        for replica in partition.replicas:
            if len(replica.log) > length:
                replica.cut(length)
        return partition.replicas[min(partition.isr)]

    def make_again(self) -> None:
        """Delete the topic and make it again: another identity, and nothing in it. For when no client has it open."""
        self.identity = uuid.UUID(int=self.scheduler.rng.getrandbits(128), version=4)
        self.partitions = [self._partition(partition.number) for partition in self.partitions]
        for group in self.groups.values():
            group.offsets.clear()
        for found in self.transactions.values():
            found.marking += 1
            found.partitions, found.left, found.offsets = set(), set(), {}
            if found.state == "ongoing" or found.state.startswith("prepare"):
                found.state = "complete-abort"

    def truth(self, number: int) -> Replica | None:
        """The copy of the leader by the controller's word, if it leads by now."""
        partition = self.partitions[number]
        if partition.leader is None:
            return None
        replica = partition.replicas[partition.leader]
        return replica if replica.leads == partition.epoch else None

    def leader_of(self, number: int, broker: int, *, epoch: int | None = None) -> Replica:
        """The broker's copy, if the broker believes to lead it."""
        if not self.exists or number >= len(self.partitions):
            raise RefusedError(KafkaError.UNKNOWN_TOPIC_OR_PART)
        replica = self.partitions[number].replicas[broker]
        if replica.leads is None:
            raise RefusedError(KafkaError.NOT_LEADER_FOR_PARTITION)
        if epoch is not None and epoch > replica.leads:
            raise RefusedError(KafkaError.UNKNOWN_LEADER_EPOCH)
        if epoch is not None and epoch < replica.leads:
            raise RefusedError(KafkaError.FENCED_LEADER_EPOCH)
        return replica

    def metadata(self, broker: int) -> dict[int, tuple[int, int]]:
        """Who leads what and in which epoch, as this broker knows it."""
        found = {}
        for partition in self.partitions:
            replica = partition.replicas[broker]
            if replica.leads is not None:
                found[partition.number] = broker, replica.leads
            elif replica.follows is not None:
                found[partition.number] = replica.follows
        return found

    def _tick(self) -> None:
        now = self.scheduler.now
        for broker in self.brokers:
            if broker.alive and self.connected(broker.name, "controller"):
                broker.heard = now
                broker.fenced = False
            elif now - broker.heard > SESSION_SECONDS and not broker.fenced:
                broker.fenced = True
        for partition in self.partitions:
            self._elect(partition)
            for broker in self.brokers:
                if broker.alive and not broker.fenced and self.connected(broker.name, "controller"):
                    self._learn(partition, broker.number)
            self._in_sync(partition)
            self.replicate(partition.number)
        for transaction in list(self.transactions.values()):
            self._look_after(transaction)
        for kind, number in self.coordinator.items():
            if self.brokers[number].fenced:
                usable = [broker.number for broker in self.brokers if broker.alive and not broker.fenced]
                if usable:
                    self.coordinator[kind] = usable[0]
                    self.away_until[kind] = max(self.away_until[kind], now + 0.5)
        for group in self.groups.values():
            self._look_after_group(group)
        self.scheduler.after(TICK_SECONDS, self._tick)

    def _elect(self, partition: Partition) -> None:
        leader = partition.leader
        if leader is not None and not self.brokers[leader].fenced and self._leads_or_will(partition, leader):
            return
        candidates = [n for n in sorted(partition.isr) if self.brokers[n].alive and not self.brokers[n].fenced]
        if leader is not None and self.brokers[leader].fenced and len(partition.isr) > 1:
            partition.isr.discard(leader)
            candidates = [n for n in candidates if n != leader]
        if not candidates:
            partition.leader = None
            return
        partition.leader = self.scheduler.rng.choice(candidates)
        partition.epoch += 1

    def _leads_or_will(self, partition: Partition, leader: int) -> bool:
        """A broker that was restarted leads again only in a new epoch."""
        replica = partition.replicas[leader]
        return replica.leads == partition.epoch or (
            replica.follows is not None and replica.follows[1] < partition.epoch
        )

    def _learn(self, partition: Partition, broker: int) -> None:
        """A broker hears of the controller's decisions."""
        replica = partition.replicas[broker]
        if partition.leader is None:
            if replica.leads is not None:
                replica.leads = None
                self.stir(partition.number)
            return
        if partition.leader == broker:
            if replica.leads != partition.epoch:
                replica.leads, replica.follows = partition.epoch, (broker, partition.epoch)
                replica.began = len(replica.log)
                replica.isr = set(partition.isr)
                replica.copied, replica.lagging_since = {}, {}
                self.stir(partition.number)
        elif replica.follows != (partition.leader, partition.epoch):
            replica.leads, replica.follows = None, (partition.leader, partition.epoch)
            self.stir(partition.number)

    def _in_sync(self, partition: Partition) -> None:
        """The true leader, if it reaches the controller, says who is in sync."""
        leader = self.truth(partition.number)
        if leader is None or not self.connected(self.brokers[leader.broker].name, "controller"):
            return
        now = self.scheduler.now
        for broker in self.brokers:
            number = broker.number
            if number == leader.broker:
                continue
            if not broker.fenced and self._follows(partition, leader, number):
                leader.lagging_since.pop(number, None)
                if number not in partition.isr and leader.copied.get(number, -1) >= leader.high:
                    partition.isr.add(number)
            elif number in partition.isr:
                since = leader.lagging_since.setdefault(number, now)
                if broker.fenced or now - since > LAG_SECONDS:
                    partition.isr.discard(number)
        leader.isr = set(partition.isr)

    def _follows(self, partition: Partition, leader: Replica, number: int) -> bool:
        replica = partition.replicas[number]
        return (
            self.brokers[number].alive
            and self.brokers[leader.broker].alive
            and replica.leads is None
            and replica.follows == (leader.broker, leader.leads)
            and self.connected(self.brokers[number].name, self.brokers[leader.broker].name)
        )

    def replicate(self, number: int) -> None:
        """Let followers copy what they can, and the high watermark move."""
        partition = self.partitions[number]
        for leader in partition.replicas:
            if leader.leads is None or not self.brokers[leader.broker].alive:
                continue
            for replica in partition.replicas:
                if replica is not leader and self._follows(partition, leader, replica.broker):
                    replica.copy_from(leader)
                    replica.high = max(replica.high, min(leader.high, len(replica.log)))
                    leader.copied[replica.broker] = len(replica.log)
            ends = [len(leader.log) if n == leader.broker else leader.copied.get(n, 0) for n in leader.isr]
            if len(ends) >= self.minimum and min(ends) > leader.high:
                leader.high = min(ends)
                self.stir(number)

    def stir(self, number: int) -> None:
        """Wake whoever waits for something in the partition."""
        self.changed[number].notify()

    # --- appending ---

    def append(self, replica: Replica, number: int, entries: list[Entry], owner: str | None) -> int:
        """A batch of one producer, at a broker that believes to lead; the offset behind it. Replicated later."""
        if len(replica.isr) < int(self.settings["min.insync.replicas"]):
            raise RefusedError(KafkaError.NOT_ENOUGH_REPLICAS)
        first = entries[0]
        newest = (self.scheduler.now + EPOCH_SECONDS) * 1000 + int(self.settings["message.timestamp.after.max.ms"])
        if any(entry.timestamp > newest for entry in entries):
            raise RefusedError(KafkaError.INVALID_TIMESTAMP)
        if first.transactional:
            epoch, sequence = replica.producers.get(first.producer, (first.epoch, 0))
            if first.epoch < epoch:
                raise RefusedError(KafkaError.INVALID_PRODUCER_EPOCH)
            if first.epoch > epoch:
                sequence = 0
            if first.sequence < sequence:
                return self._appended_before(replica, first.producer, first.epoch, entries[-1].sequence)
            if first.sequence > sequence and first.producer in replica.producers:
                raise RefusedError(KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER)
            if owner is not None and first.producer not in replica.open:
                self._check_ongoing(owner, first, number)
        for entry in entries:
            entry.leader_epoch = replica.leads or 0
            replica.append(entry)
        self.scheduler.after(self.scheduler.rng.uniform(0.0002, 0.003), lambda: self.replicate(number))
        return len(replica.log)

    def _appended_before(self, replica: Replica, producer: int, epoch: int, sequence: int) -> int:
        for offset in range(len(replica.log) - 1, -1, -1):
            entry = replica.log[offset]
            if (entry.producer, entry.epoch, entry.sequence) == (producer, epoch, sequence) and not entry.control:
                return offset + 1
        raise RefusedError(KafkaError.DUPLICATE_SEQUENCE_NUMBER)

    def _check_ongoing(self, owner: str, entry: Entry, number: int) -> None:
        found = self.transactions.get(owner)
        if (
            found is None
            or found.state != "ongoing"
            or (found.producer, found.epoch) != (entry.producer, entry.epoch)
            or number not in found.partitions
        ):
            raise RefusedError(KafkaError.INVALID_TXN_STATE)

    # --- transactions ---

    def init_producer(self, name: str, timeout: float) -> tuple[int, int]:
        """A producer id and an epoch that fences all before it."""
        found = self.transactions.get(name)
        if found is None:
            self._producers += 1
            found = self.transactions[name] = Transaction(name, self._producers)
        if found.state == "ongoing":
            found.epoch += 1
            self._prepare(found, "abort")
            raise RefusedError(KafkaError.CONCURRENT_TRANSACTIONS)
        if found.state.startswith("prepare"):
            raise RefusedError(KafkaError.CONCURRENT_TRANSACTIONS)
        found.epoch += 1
        found.state, found.timeout = "empty", timeout
        return found.producer, found.epoch

    def _fenced(self, name: str, producer: int, epoch: int) -> Transaction:
        found = self.transactions.get(name)
        if found is None or found.producer != producer:
            raise RefusedError(KafkaError.INVALID_PRODUCER_ID_MAPPING)
        if found.epoch != epoch:
            raise RefusedError(KafkaError.INVALID_PRODUCER_EPOCH)
        return found

    def add_partition(self, name: str, producer: int, epoch: int, number: int) -> None:
        """`number` is a partition, or -1 for a group's offsets."""
        found = self._fenced(name, producer, epoch)
        if found.state.startswith("prepare"):
            raise RefusedError(KafkaError.CONCURRENT_TRANSACTIONS)
        if found.state != "ongoing":
            found.state, found.partitions, found.since, found.offsets = "ongoing", set(), self.scheduler.now, {}
        found.partitions.add(number)

    def add_offsets(
        self, name: str, producer: int, epoch: int, group: str, offsets: dict[int, tuple[int, str]]
    ) -> None:
        """Offsets that are committed with the transaction."""
        found = self._fenced(name, producer, epoch)
        if found.state != "ongoing":
            raise RefusedError(KafkaError.INVALID_TXN_STATE)
        found.offsets.setdefault(group, {}).update(offsets)

    def end_transaction(self, name: str, producer: int, epoch: int, outcome: str) -> None:
        """`outcome`: commit or abort. Returns once it is decided; the markers follow."""
        found = self._fenced(name, producer, epoch)
        if found.state == "ongoing":
            self._prepare(found, outcome)
        elif found.state == f"complete-{outcome}":
            return
        elif found.state == f"prepare-{outcome}":
            raise RefusedError(KafkaError.CONCURRENT_TRANSACTIONS)
        else:
            raise RefusedError(KafkaError.INVALID_TXN_STATE)

    def _prepare(self, found: Transaction, outcome: str) -> None:
        found.state = f"prepare-{outcome}"
        found.left = {number for number in found.partitions if number >= 0}
        found.marking += 1
        if outcome == "commit":
            for group, offsets in found.offsets.items():
                self.group(group).offsets.update(offsets)
        found.offsets = {}
        marking = found.marking
        for number in sorted(found.left):
            self.scheduler.after(self.scheduler.rng.uniform(0.0002, 0.004), partial(self._mark, found, marking, number))
        if not found.left:
            found.state = f"complete-{outcome}"

    def _mark(self, found: Transaction, marking: int, number: int) -> None:
        """Write the marker, and again until it is replicated."""
        if found.marking != marking or number not in found.left:
            return
        leader = self.truth(number)
        name = self.brokers[self.coordinator["transaction"]].name
        if (
            leader is None
            or not self.brokers[leader.broker].alive
            or not (self.brokers[leader.broker].name == name or self.connected(self.brokers[leader.broker].name, name))
        ):
            self.scheduler.after(TICK_SECONDS, lambda: self._mark(found, marking, number))
            return
        outcome = found.state.removeprefix("prepare-")
        epoch = leader.leads
        offset = leader.append(
            Entry(None, None, producer=found.producer, epoch=found.epoch, control=outcome, leader_epoch=epoch or 0)
        )
        self.replicate(number)
        self._marked(found, marking, number, leader, epoch, offset)

    def _marked(
        self, found: Transaction, marking: int, number: int, leader: Replica, epoch: int | None, offset: int
    ) -> None:
        if found.marking != marking:
            return
        if leader.high > offset and leader.leads == epoch:
            found.left.discard(number)
            if not found.left:
                found.state = "complete-" + found.state.removeprefix("prepare-")
        elif self.truth(number) is not leader:
            self._mark(found, marking, number)
        else:
            self.replicate(number)
            again = TICK_SECONDS if leader.high <= offset else 0.001
            self.scheduler.after(again, lambda: self._marked(found, marking, number, leader, epoch, offset))

    def _look_after(self, found: Transaction) -> None:
        if found.state == "ongoing" and self.scheduler.now - found.since > found.timeout:
            found.epoch += 1
            self._prepare(found, "abort")

    # --- groups ---

    def group(self, name: str) -> Group:
        return self.groups.setdefault(name, Group(name))

    def join(self, name: str, member: Member | None, joining: Callable[[str], Member], owned: set[int]) -> Member:
        """Join, or join again with what is owned."""
        group, now = self.group(name), self.scheduler.now
        if member is None or member.id not in group.members:
            self._member += 1
            member = joining(f"member-{self._member}")
            group.members[member.id] = member
            owned = set()
        member.seen, member.owned = now, set(owned)
        if group.state != "Preparing":
            self._prepare_group(group)
        member.joined = True
        self._complete_group(group)
        return member

    def leave(self, name: str, member: Member) -> None:
        group = self.group(name)
        if group.members.pop(member.id, None) is not None:
            self._prepare_group(group)
            self._complete_group(group)

    def _prepare_group(self, group: Group) -> None:
        group.state, group.since = "Preparing", self.scheduler.now
        for member in group.members.values():
            member.joined = False

    def _complete_group(self, group: Group) -> None:
        members = list(group.members.values())
        if not members:
            group.state = "Empty"
            return
        if not all(member.joined for member in members):
            return
        most = -(-len(self.partitions) // len(members))
        least = len(self.partitions) // len(members)
        wanted: dict[str, set[int]] = {}
        for member in members:
            wanted[member.id] = set(sorted(member.owned)[:most])
        over = [m for m in members if len(wanted[m.id]) > least]
        allowed = len(self.partitions) - least * len(members)
        for member in over[allowed:]:
            wanted[member.id] = set(sorted(wanted[member.id])[:least])
        free = [p for p in range(len(self.partitions)) if not any(p in found for found in wanted.values())]
        for p in free:
            fewest = min(members, key=lambda m: len(wanted[m.id]))
            wanted[fewest.id].add(p)
        owned_by = {p: m.id for m in members for p in m.owned}
        for member in members:
            member.given = {p for p in wanted[member.id] if owned_by.get(p, member.id) == member.id}
        group.generation += 1
        group.state = "Stable"

    def _look_after_group(self, group: Group) -> None:
        now = self.scheduler.now
        away = now < self.away_until["group"]
        coordinator = self.coordinator["group"]
        gone = False
        for member in list(group.members.values()):
            beats = member.process.alive and member.process.frozen_until <= now
            if beats and now - member.polled > member.longest_poll:
                beats = False
            if away or (beats and self.reachable(member.process, coordinator)):
                member.seen = now
            elif now - member.seen > member.session:
                del group.members[member.id]
                gone = True
        if gone:
            self._prepare_group(group)
        if group.state == "Preparing":
            late = max((m.longest_poll for m in group.members.values()), default=0.0)
            if now - group.since > late:
                for member in [m for m in group.members.values() if not m.joined]:
                    del group.members[member.id]
            self._complete_group(group)
