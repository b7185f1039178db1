"""What goes wrong: faults that come at random moments, each with its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from uuid import UUID

from artifact_store.errors import PushBackError, UnavailableError
from services.log.port import Record
from services.log.records import BadRecord, SkipRecord
from tests.simulation.clients import Network
from tests.simulation.kafka import Entry, RefusedError
from tests.simulation.processes import PROJECTION, Stage, call
from tests.simulation.scheduler import Process


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
        """Cut a broker off from controller and peers; clients reach it still."""
        cluster, rng = self.stage.cluster, self.stage.scheduler.rng
        if not self._brokers_well():
            return
        broker = rng.choice(cluster.brokers)
        others = [other.name for other in cluster.brokers if other is not broker]
        self._for(1.0, rng.choice((6.0, 20.0, 60.0)), cluster.cut((broker.name, o) for o in [*others, "controller"]))
        for _ in range(rng.choice((0, 1, 2, 3))):  # where the network is bad, more goes wrong
            act = rng.choice((self.expel_member, self.kill_gateway, self.end_gateway))
            self.stage.scheduler.after(rng.uniform(3.0, 40.0), partial(self._unless_stopped, act))

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

        self._for(5.0, stage.scheduler.rng.choice((20.0, 150.0)), mend)

    def append_garbage(self) -> None:
        """A stranger's committed record that is no event; an operator confirms it after a while."""
        stage, cluster, rng = self.stage, self.stage.cluster, self.stage.scheduler.rng
        partition = rng.choice(cluster.partitions).number
        leader = cluster.truth(partition)
        if leader is None or stage.bad_records or leader.high < len(leader.log):
            return
        entry = Entry(b"stranger", rng.randbytes(18), None, 0)
        offset = cluster.append(leader, partition, [entry], None) - 1
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
            with suppress(UnavailableError, PushBackError, TimeoutError):
                async with asyncio.timeout(20.0):
                    await call(stage, operator, gateway.process, partial(gateway.confirm, skip))
                break
            await asyncio.sleep(stage.scheduler.rng.random())
        await asyncio.sleep(30.0)  # until everybody has seen it
        stage.bad_records -= 1

    def set_group(self) -> None:
        """An operator stops the projectors and sets their group to an offset, or all of it to the log's start."""
        stage, rng = self.stage, self.stage.scheduler.rng
        if stage.foreign_offset or stage.whole_reset:
            return
        for projector in stage.projectors:
            projector.kill()
        group = stage.cluster.group(stage.settings.log_url.rpartition("/")[2] + f".projector.{PROJECTION}")
        stage.whole_reset = rng.random() < 0.3
        stage.foreign_offset = not stage.whole_reset

        def act() -> None:
            if group.members or len(group.offsets) < len(stage.cluster.partitions):
                stage.whole_reset = stage.foreign_offset = False
            else:
                chosen = rng.choice(sorted(group.offsets))
                for number, (offset, _) in list(group.offsets.items()):
                    if stage.whole_reset:
                        group.offsets[number] = 0, ""
                    elif number == chosen:
                        group.offsets[number] = rng.choice((0, rng.randrange(offset + 1))), ""
            start()
            self._for(10.0, 20.0, put_right)

        def put_right() -> None:
            """Say by a commit as the projectors make them that the view's own checkpoint holds."""
            if stage.foreign_offset:
                for projector in stage.projectors:
                    projector.kill()
                group.members.clear()
                group.state = "Empty"
                database = stage.projectors[0].database
                group.offsets.update({p: (o, str(database.generation)) for p, o in database.offsets.items()})
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
    "a stranger's open transaction": (1, Faults.open_transaction),
}
