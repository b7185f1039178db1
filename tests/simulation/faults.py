"""Faults: they begin at random moments, and each has an end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from uuid import UUID

from artifact_store.errors import ConflictError, InvalidRequestError, PushBackError, UnavailableError
from schemas.codec import decode
from services.log.port import Record
from services.log.records import AcceptLoss, BadRecord, SkipRecord, is_administrative
from services.log.state.partition_state import value_digest
from tests.simulation.checker import STORE, Evidence
from tests.simulation.clients import Network
from tests.simulation.kafka import SESSION_SECONDS, Entry, RefusedError, Replica
from tests.simulation.processes import GUARD_SECONDS, PROJECTION, Gateway, Projector, Stage, Store, call
from tests.simulation.scheduler import Process


@dataclass(frozen=True, slots=True)
class Focus:
    """What a run looks at most; without any it looks at everything."""

    kinds: tuple[str, ...] = ()
    """Kinds of faults that come often, while others are rare."""
    calm: bool = False
    """Whether few clients work slowly, so that more time passes in as many steps."""


@dataclass(eq=False)
class Faults:
    """Begins faults now and then, until `stop` is called; that ends those that still last.

    Every run has its own mixture: some kinds do not come at all, others often, so that rare meetings of a few kinds are
    not always drowned by all others.
    """

    stage: Stage
    network: Network
    every_seconds: float
    focus: tuple[str, ...] = ()
    """Kinds that come often, while others are rare."""
    happened: dict[str, int] = field(default_factory=dict)
    _weights: list[float] = field(default_factory=list)
    _mending: dict[int, Callable[[], None]] = field(default_factory=dict)
    _stopped: bool = False
    _strangers: int = 0

    def begin(self) -> None:
        """Let the first one come."""
        rng = self.stage.scheduler.rng
        self._weights = [weight * rng.choice((0, 1, 1, 4)) for weight, _ in KINDS.values()]
        if self.focus:
            self._weights = [10.0 if kind in self.focus else weight / 100 for kind, (weight, _) in KINDS.items()]
        if not any(self._weights):
            self._weights = [weight for weight, _ in KINDS.values()]
        self._next()

    def stop(self) -> None:
        """No more faults; what lasts is mended now."""
        self._stopped = True
        while self._mending:  # what is mended may begin something else that ends
            self._mending.pop(next(iter(self._mending)))()
        self.network.lost_answers = self.network.late_requests = 0.0

    def _next(self) -> None:
        """Some faults within a few seconds, then calm in which something can be written."""
        rng = self.stage.scheduler.rng
        first = rng.expovariate(1 / self.every_seconds)
        for _ in range(rng.choice((1, 2, 3, 4))):
            self.stage.scheduler.after(first + rng.uniform(0.0, 4.0), self._strike)
        self.stage.scheduler.after(first + 4.0, self._next)

    def _strike(self) -> None:
        if self._stopped:
            return
        name = self.stage.scheduler.rng.choices(list(KINDS), self._weights)[0]
        self.happened[name] = self.happened.get(name, 0) + 1
        self.stage.scheduler.note(name)
        if name not in HARMLESS:
            self.stage.disturbed = self.stage.scheduler.now
        KINDS[name][1](self)

    def _unless_stopped(self, act: Callable[[], None]) -> None:
        if not self._stopped:
            act()

    def _for(self, least: float, most: float, mend: Callable[[], None]) -> None:
        """Call `mend` when the fault is over."""
        rng, number = self.stage.scheduler.rng, self.stage.scheduler.next_number()

        def over() -> None:
            if self._mending.pop(number, None) is not None:
                self.stage.disturbed = self.stage.scheduler.now
                mend()

        self._mending[number] = mend
        self.stage.scheduler.after(rng.uniform(least, most), over)

    def kill_gateway(self) -> None:
        rng = self.stage.scheduler.rng
        gateway = rng.choice(self.stage.gateways)
        if gateway.running:
            gateway.kill()
            empty = rng.random() < 0.2
            self._for(0.1, 5.0, lambda: gateway.start(empty_disk=empty))

    def end_gateway(self) -> None:
        gateway = self.stage.scheduler.rng.choice(self.stage.gateways)
        if gateway.running and gateway.writer is not None:
            gateway.stop(lambda: self._for(0.1, 5.0, gateway.start) if not self._stopped else gateway.start())

    def freeze_gateway(self) -> None:
        rng = self.stage.scheduler.rng
        process = rng.choice(self.stage.gateways).process
        seconds = rng.choice((0.5, 3.0, 9.0, 20.0)) * rng.random()
        process.freeze(seconds)
        self._for(seconds, seconds, lambda: None)

    def expel_member(self) -> None:
        """The group takes a member for dead that is not; it learns of it when it asks next."""
        cluster, rng = self.stage.cluster, self.stage.scheduler.rng
        members = [(group, member) for group in cluster.groups.values() for member in group.members.values()]
        if members:
            group, member = rng.choice(members)
            cluster.leave(group.name, member)

    def kill_projector(self) -> None:
        projector = self.stage.scheduler.rng.choice(self.stage.projectors)
        if projector.running:
            projector.kill()
            self._for(0.1, 8.0, projector.start)

    def freeze_projector(self) -> None:
        rng = self.stage.scheduler.rng
        rng.choice(self.stage.projectors).process.freeze(20.0 * rng.random())

    def depose_broker(self) -> None:
        """Cut a broker off from controller and peers; clients reach it still, and some at first nobody else."""
        cluster, rng = self.stage.cluster, self.stage.scheduler.rng
        if not self._brokers_well():
            return
        leaders = [broker for broker in cluster.brokers if any(p.leader == broker.number for p in cluster.partitions)]
        broker = rng.choice(leaders or cluster.brokers)
        others = [other.name for other in cluster.brokers if other is not broker]
        alone, more = rng.choice((0.0, rng.uniform(8.0, 12.0))), rng.uniform(2.0, rng.choice((6.0, 12.0, 40.0)))
        self._for(alone + more, alone + more, cluster.cut((broker.name, o) for o in [*others, "controller"]))
        if alone:
            gateway = rng.choice(self.stage.gateways)
            self._for(alone, alone, cluster.cut((gateway.name, other) for other in others))
        for _ in range(rng.choice((0, 1, 2, 3))):  # where the network is bad, more goes wrong
            act = rng.choice((self.expel_member, self.kill_gateway, self.end_gateway, self.end_gateway))
            when = max(SESSION_SECONDS, alone) + more * rng.random() / 2
            self.stage.scheduler.after(when, partial(self._unless_stopped, act))

    def kill_broker(self) -> None:
        cluster = self.stage.cluster
        alive = [broker for broker in cluster.brokers if broker.alive]
        if len(alive) < 2 or not self._brokers_well():
            return
        broker = self.stage.scheduler.rng.choice(alive)
        cluster.stop_broker(broker.number)
        self._for(0.5, 10.0, lambda: cluster.start_broker(broker.number))

    def _brokers_well(self) -> bool:
        """Whether another broker may fail: two of three at once are rare, since nothing goes on then."""
        cluster = self.stage.cluster
        well = all(broker.alive and cluster.connected(broker.name, "controller") for broker in cluster.brokers)
        return well or self.stage.scheduler.rng.random() < 0.1

    def cut_client(self) -> None:
        """Cut one process off from one broker, or from all."""
        cluster, rng = self.stage.cluster, self.stage.scheduler.rng
        name = rng.choice([*(g.name for g in self.stage.gateways), *(p.name for p in self.stage.projectors)])
        brokers = [broker.name for broker in cluster.brokers]
        if rng.random() < 0.7:
            brokers = [rng.choice(brokers)]
        self._for(0.5, 30.0, cluster.cut((name, broker) for broker in brokers))

    def cut_gateways(self) -> None:
        """Cut gateways off from each other, or the clients from one of them."""
        cluster, rng = self.stage.cluster, self.stage.scheduler.rng
        names = [gateway.name for gateway in self.stage.gateways]
        pair = (rng.choice(names), rng.choice([*names, "clients"]))
        if pair[0] != pair[1]:
            self._for(0.5, 20.0, cluster.cut([pair]))

    def coordinators_away(self) -> None:
        cluster, scheduler = self.stage.cluster, self.stage.scheduler
        seconds = scheduler.rng.uniform(0.5, 15.0)
        for kind in cluster.away_until:
            cluster.away_until[kind] = max(cluster.away_until[kind], scheduler.now + seconds)
        self._for(seconds, seconds, lambda: None)

    def hide_members(self) -> None:
        """For long, nobody is told who the members of a group are, while all else is well."""
        stage, until = self.stage, self.stage.cluster.away_until
        if stage.scheduler.now > until["describe"]:
            seconds = stage.scheduler.rng.uniform(20.0, 90.0)
            until["describe"] = stage.scheduler.now + seconds
            stage.untold_since = stage.scheduler.now if stage.calm_seconds > CALM_SECONDS else None
            self._for(seconds, seconds, lambda: None)

    def change_settings(self) -> None:
        """Somebody changes the topic so that it could lose events."""
        stage, settings = self.stage, self.stage.cluster.settings
        if stage.unsafe_since is not None:
            return
        name, value = stage.scheduler.rng.choice(
            (("retention.ms", "60000"), ("cleanup.policy", "compact"), ("min.insync.replicas", "1"))
        )
        before, settings[name] = settings[name], value
        stage.unsafe_since = stage.scheduler.now

        def mend() -> None:
            settings[name] = before
            stage.unsafe_since = None

        self._for(*stage.scheduler.rng.choice(((5.0, 20.0), (GUARD_SECONDS + 5.0, GUARD_SECONDS + 40.0))), mend)

    def append_garbage(self) -> None:
        """A stranger's committed record that is no event; an operator confirms it after a while."""
        stage, cluster, rng = self.stage, self.stage.cluster, self.stage.scheduler.rng
        partition = rng.choice(cluster.partitions).number
        leader = cluster.truth(partition)
        if leader is None or stage.bad_records or stage.views_behind_loss or leader.high < len(leader.log):
            return
        entry = Entry(b"stranger", rng.randbytes(18), None, 0)
        try:
            offset = cluster.append(leader, partition, [entry], None) - 1
        except RefusedError:
            return
        cluster.replicate(partition)
        if leader.high <= offset:
            leader.cut(offset)  # it could not be committed
            return
        stage.checker.foreign[partition].add(offset)
        stage.bad_records += 1
        bad = BadRecord.of(Record(partition, offset, entry.key or b"", entry.value or b""), "it is no event")
        command_id = UUID(int=rng.getrandbits(128), version=4)
        skip = SkipRecord(partition, offset, bad.digest, "operator", "a stranger's", command_id)
        operator = Process(stage.scheduler, "operator")
        stage.scheduler.after(rng.uniform(1.0, 15.0), lambda: operator.loop.create_task(self._confirm(operator, skip)))

    async def _confirm(self, operator: Process, skip: SkipRecord) -> None:
        """Ask one gateway after the other until the writer has recorded it."""
        stage = self.stage
        while True:
            gateway = stage.scheduler.rng.choice(stage.gateways)
            # A conflict: the topic's settings could lose events now.
            with suppress(UnavailableError, PushBackError, ConflictError, TimeoutError):
                async with asyncio.timeout(20.0):
                    await call(stage, operator, gateway.process, partial(gateway.confirm, skip))
                break
            await asyncio.sleep(stage.scheduler.rng.random())
        await asyncio.sleep(30.0)  # until everybody has seen it
        stage.bad_records -= 1

    def repeat_events(self) -> None:
        """A mirror puts events there once more that the partition has already."""
        cluster, rng = self.stage.cluster, self.stage.scheduler.rng
        number = rng.choice(cluster.partitions).number
        leader = cluster.truth(number)
        if leader is None or leader.high < len(leader.log) or leader.open:
            return
        events = self._events(leader, number, 60)
        if not events:
            return
        first = rng.randrange(len(events))
        copies = [
            Entry(entry.key, entry.value, entry.headers, entry.timestamp)
            for entry in (leader.log[offset] for offset in events[first : first + rng.randrange(1, 6)])
        ]
        begins = len(leader.log)
        try:
            ends = cluster.append(leader, number, copies, None)
        except RefusedError:
            return
        cluster.replicate(number)
        if leader.high < ends:
            leader.cut(begins)  # it could not be committed
        else:
            self.stage.checker.repeated[number].update(range(begins, ends))

    def _events(self, copy: Replica, number: int, most: int) -> list[int]:
        """Offsets of the last events of packages that are committed, `most` offsets back at most."""
        checker = self.stage.checker
        odd = checker.foreign[number] | checker.repeated[number]
        found = range(max(0, min(copy.stable, len(copy.log)) - most), min(copy.stable, len(copy.log)))
        return [
            offset
            for offset in found
            if (entry := copy.log[offset]).control is None
            and entry.sender is not None
            and entry.value
            and offset not in copy.aborted
            and offset not in odd
            and not is_administrative(decode(entry.value))
        ]

    def lose_tail(self) -> None:
        """A partition loses its newest events, under running gateways or without; or the topic is made again.

        What is left on disks, in the memory of writers and in the store proves the loss. After a while an operator
        accepts it and has the views folded again.
        """
        stage, cluster, rng = self.stage, self.stage.cluster, self.stage.scheduler.rng
        if stage.views_behind_loss or stage.checker.evidence or stage.bad_records:
            return
        if stage.foreign_offset or stage.whole_reset or not stage.checker.events or stage.unsafe_since is not None:
            return
        gateways_down, again = rng.choice(((False, False), (False, False), (True, False), (True, True)))
        stage.views_behind_loss = True
        for broker in cluster.brokers:
            cluster.stop_broker(broker.number)
        if gateways_down:
            self._kill_all(stage.gateways)

        def act() -> None:
            if gateways_down:
                self._kill_all(stage.gateways)
            if again:
                self._kill_all(stage.projectors)
            for broker in cluster.brokers:
                cluster.stop_broker(broker.number)
                if again:
                    cluster.start_broker(broker.number)
            if again:
                self._make_again()
            else:
                self._cut_one()
                for broker in cluster.brokers:
                    cluster.start_broker(broker.number)
            for gateway in stage.gateways:
                gateway.start()
            for projector in stage.projectors:
                projector.start()
            self._for(10.0, 30.0, self._fold_again)

        self._for(0.5, 3.0, act)

    @staticmethod
    def _kill_all(processes: Sequence[Gateway | Projector]) -> None:
        for process in processes:
            process.kill()

    def _cut_one(self) -> None:
        stage, cluster, rng = self.stage, self.stage.cluster, self.stage.scheduler.rng
        number = rng.choice(cluster.partitions).number
        copy = cluster.partitions[number].replicas[min(cluster.partitions[number].isr)]
        events = self._events(copy, number, rng.choice((5, 30)))
        if not events:
            return
        length = min([rng.choice(events), *copy.open.values()])
        if rng.random() < 0.5:  # all that the last writer has appended
            last = next(entry for entry in reversed(copy.log) if entry.sender is not None)
            length = min(length, next(o for o, entry in enumerate(copy.log) if entry.sender is last.sender))
        # A stranger's transaction whose marker is lost would stay open until its operator ends it.
        ended = {entry.producer for entry in copy.log[:length] if entry.control is not None}
        for offset, entry in enumerate(copy.log[:length]):
            if entry.sender is None and entry.control is None and entry.transactional and entry.producer not in ended:
                length = offset
                break
        log = cluster.identity
        holders: list[tuple[Process | str, int]] = [
            (gateway.process, gateway.has_read(number)) for gateway in stage.gateways
        ]
        rememberers: list[tuple[str, Gateway | Store]] = [(gateway.name, gateway) for gateway in stage.gateways]
        if stage.store is not None:
            rememberers.append((STORE, stage.store))
        # What an earlier loss took proves nothing of this one.
        there = {(log, offset, value_digest(entry.value or b"")) for offset, entry in enumerate(copy.log)}
        holders += [(name, found[1]) for name, of in rememberers for found in of.remembered(number) if found in there]
        evidence = [Evidence(number, log, offset, holder) for holder, offset in holders if offset >= length]
        self._lost(number, cluster.lose_tail(number, length), evidence)

    def _make_again(self) -> None:
        stage, cluster = self.stage, self.stage.cluster
        evidence = {
            partition.number: [
                *(
                    Evidence(partition.number, log, offset, gateway.name)
                    for gateway in stage.gateways
                    for log, offset, _ in gateway.remembered(partition.number)
                    if offset >= 0
                ),
                *self._of_store(partition.number),
            ]
            for partition in cluster.partitions
        }
        cluster.make_again()
        for number, found in evidence.items():
            self._lost(number, cluster.partitions[number].replicas[0], found)

    def _of_store(self, number: int) -> list[Evidence]:
        store = self.stage.store
        return (
            []
            if store is None
            else [Evidence(number, log, offset, STORE) for log, offset, _ in store.remembered(number)]
        )

    def _lost(self, number: int, copy: Replica, evidence: list[Evidence]) -> None:
        stage = self.stage
        stage.losses[number] = stage.losses.get(number, 0) + 1
        stage.checker.lost(number, copy, evidence)
        if stage.operator is None:
            stage.operator = operator = Process(stage.scheduler, "operator of losses")
            operator.loop.create_task(self._accept(operator))

    async def _accept(self, operator: Process) -> None:
        """Accept, some time after it is shown, whatever a writer says is lost."""
        stage, rng = self.stage, self.stage.scheduler.rng
        while True:
            await asyncio.sleep(rng.uniform(2.0, 8.0))
            for gateway in stage.gateways:
                for status in gateway.writer.status_here() if gateway.writer is not None else ():
                    if status.lost_offset is None or status.lost_digest is None:
                        continue
                    number, command_id = status.partition, UUID(int=rng.getrandbits(128), version=4)
                    if not stage.losses.get(number):
                        stage.checker.broken(f"partition {number} is said to have lost offset {status.lost_offset}")
                    digest = bytes.fromhex(status.lost_digest)
                    loss = AcceptLoss(number, status.lost_offset, digest, "operator", "power was lost", command_id)
                    with suppress(UnavailableError, PushBackError, ConflictError, InvalidRequestError, TimeoutError):
                        async with asyncio.timeout(20.0):
                            await call(stage, operator, gateway.process, partial(gateway.confirm, loss))

    def _fold_again(self) -> None:
        """What `artifact-store replay` does after a loss, in place."""
        stage = self.stage
        self._kill_all(stage.projectors)
        stage.projectors[0].database.empty()
        for projector in stage.projectors:
            projector.failure = None
            projector.start()
        stage.views_behind_loss = False

    def set_group(self) -> None:
        """An operator stops the projectors and sets their group to an offset, or all of it to the log's start."""
        stage, rng = self.stage, self.stage.scheduler.rng
        if stage.foreign_offset or stage.whole_reset or stage.views_behind_loss:
            return
        for projector in stage.projectors:
            projector.kill()
        group = stage.cluster.group(stage.settings.log_url.rpartition("/")[2] + f".projector.{PROJECTION}")
        stage.whole_reset = rng.random() < 0.3
        stage.foreign_offset = not stage.whole_reset

        def act() -> None:
            if group.members or len(group.offsets) < len(stage.cluster.partitions):
                stage.whole_reset = stage.foreign_offset = False
                start()
                return
            chosen = rng.choice(sorted(group.offsets))
            for number, (offset, _) in list(group.offsets.items()):
                if stage.whole_reset:
                    group.offsets[number] = 0, ""
                elif number == chosen:
                    group.offsets[number] = rng.choice((0, rng.randrange(offset + 1))), ""
            start()
            self._for(10.0, 20.0, put_right)

        def put_right() -> None:
            """Say by a commit as the projectors make them that the view's own checkpoint holds.

            A whole reset stays: nobody takes it back before a projector has come to follow it.
            """
            if stage.whole_reset and all(place == (0, "") for place in group.offsets.values()):
                if not self._stopped:
                    self._for(10.0, 20.0, put_right)
                return
            if stage.foreign_offset:
                for projector in stage.projectors:
                    projector.kill()
                group.members.clear()
                group.state = "Empty"
                database = stage.projectors[0].database
                stands = {p: database.offsets.get(p, 0) for p in group.offsets}
                group.offsets.update({p: (offset, str(database.generation)) for p, offset in stands.items()})
                start()
            stage.whole_reset = stage.foreign_offset = False

        def start() -> None:
            for projector in stage.projectors:
                projector.start()

        self._for(8.0, 9.0, act)

    def lose_answers(self) -> None:
        self.network.lost_answers = 0.1

        def mend() -> None:
            self.network.lost_answers = 0.0

        self._for(1.0, 20.0, mend)

    def repeat_requests(self) -> None:
        """Requests that end a transaction are carried out once more, later."""
        self.network.late_requests = 0.3

        def mend() -> None:
            self.network.late_requests = 0.0

        self._for(1.0, 20.0, mend)

    def move_clock(self) -> None:
        rng = self.stage.scheduler.rng
        gateway = rng.choice(self.stage.gateways)
        gateway.clock_ahead = gateway.process.clock_ahead = rng.uniform(-20.0, 20.0)

    def open_transaction(self) -> None:
        """A stranger's transaction, which hides the end of a partition until it is aborted."""
        cluster, rng = self.stage.cluster, self.stage.scheduler.rng
        partition = rng.choice(cluster.partitions)
        leader = cluster.truth(partition.number)
        self._strangers += 1
        name = f"stranger-{self._strangers}"
        if leader is None:
            return
        producer, epoch = cluster.init_producer(name, 30.0)
        cluster.add_partition(name, producer, epoch, partition.number)
        entry = Entry(b"stranger", b"", None, 0, producer, epoch, 0)
        with suppress(RefusedError):
            cluster.append(leader, partition.number, [entry], name)

        def abort() -> None:
            try:
                cluster.end_transaction(name, producer, epoch, "abort")
            except RefusedError:
                return

        self._for(1.0, 40.0, abort)


CALM_SECONDS = 8.0
"""After so long without a fault everybody knows who owns what."""

HARMLESS = ("members of groups untold", "settings change", "a tool sets a group")
"""Kinds that are no excuse for anything that takes long, or is acknowledged."""

KINDS: dict[str, tuple[float, Callable[[Faults], None]]] = {
    "kill a gateway": (3, Faults.kill_gateway),
    "end a gateway": (2, Faults.end_gateway),
    "freeze a gateway": (4, Faults.freeze_gateway),
    "expel a member": (4, Faults.expel_member),
    "kill a projector": (1, Faults.kill_projector),
    "freeze a projector": (1, Faults.freeze_projector),
    "cut a broker off from controller and peers": (4, Faults.depose_broker),
    "kill a broker": (2, Faults.kill_broker),
    "cut a process off from brokers": (2, Faults.cut_client),
    "cut gateways off from each other": (1, Faults.cut_gateways),
    "coordinators away": (1, Faults.coordinators_away),
    "answers lost": (2, Faults.lose_answers),
    "late repeats": (2, Faults.repeat_requests),
    "a clock moves": (1, Faults.move_clock),
    "members of groups untold": (0.3, Faults.hide_members),
    "settings change": (0.3, Faults.change_settings),
    "a stranger's committed record": (0.3, Faults.append_garbage),
    "a tool sets a group": (0.5, Faults.set_group),
    "a mirror repeats": (0.3, Faults.repeat_events),
    "the log loses its tail": (0.3, Faults.lose_tail),
    "a stranger's open transaction": (1, Faults.open_transaction),
}
