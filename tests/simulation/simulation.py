"""One run: a cluster, gateways, projectors, clients and faults, from one seed, for a number of steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

from services.config import Settings
from services.log.kafka.log import KafkaLog
from services.log.state import restore, snapshots
from tests.simulation import clients, processes
from tests.simulation.checker import Checker, ViolationError
from tests.simulation.clients import Network, World
from tests.simulation.faults import CALM_SECONDS, Faults, Focus
from tests.simulation.kafka import Cluster
from tests.simulation.mutations import MUTATIONS, mutated
from tests.simulation.processes import TOPIC, Database, Gateway, Projector, Stage, Store
from tests.simulation.scheduler import Process, Scheduler, installed
from tests.simulation.workload import Client

PARTITIONS = 2
_PRODUCT = ("artifact_store", "services", "projector")
_SETTLE_SECONDS = 400.0
"""How long everything may take, once no more faults come, until all is answered and folded."""


@dataclass
class Result:
    """What a run was like."""

    seed: int
    asked: int
    mutation: str | None
    steps: int
    trace: int
    violation: str | None
    virtual_seconds: float
    events: int
    acknowledged: int
    takeovers: int
    faults: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """What happened, and the command that repeats it when a promise was broken."""
        mutation = f" --mutation {self.mutation}" if self.mutation else ""
        text = (
            f"seed {self.seed}: {self.steps} steps, {self.virtual_seconds:.0f} s of virtual time, "
            f"{self.events} events, {self.acknowledged} answers, {self.takeovers} take-overs, "
            f"trace {self.trace & 0xFFFFFFFF:08x}"
        )
        if self.violation is None:
            return text
        command = f"python -m tests.simulation --seed {self.seed} --steps {self.asked}{mutation}"
        return f"{text}\n  {self.violation}\n  {command}\n "


def run(seed: int, steps: int, mutation: str | None = None, focus: Focus | None = None) -> Result:
    """Simulate so many steps with faults, then the quiet in which everything is finished; blocks until done.

    `focus`: what the run is to look at most; a mutation has its own.
    """
    if mutation is not None:
        focus = MUTATIONS[mutation].focus
    with TemporaryDirectory(prefix="simulation-", dir=_memory()) as folder, _quiet(), _small(), mutated(mutation):
        return _Run(seed, Path(folder), focus or Focus()).run(steps, mutation)


class _Run:
    def __init__(self, seed: int, folder: Path, focus: Focus) -> None:
        self.seed = seed
        self.focus = focus
        self.scheduler = Scheduler(seed)
        self.cluster = Cluster(self.scheduler, TOPIC, PARTITIONS)
        self.network = Network()
        self.checker = Checker(self.cluster)
        settings = Settings(log_url="kafka://b0:9092,b1:9092,b2:9092/sim", kafka_partitions=PARTITIONS)
        self.stage = Stage(self.scheduler, self.cluster, self.checker, folder, settings)
        self.clients: list[Client] = []

    def run(self, steps: int, mutation: str | None) -> Result:
        World.cluster, World.network, World.scheduler = self.cluster, self.network, self.scheduler
        stand_ins = {**clients.STAND_INS, **processes.STAND_INS}
        with installed(self.scheduler, _PRODUCT, stand_ins):
            faults = self._begin()
            violation = None
            try:
                self._steps(steps)
                faults.stop()
                self._settle()
            except ViolationError as error:
                violation = str(error)
            stage = self.stage
            result = Result(
                self.seed,
                steps,
                mutation,
                self.scheduler.steps,
                self.scheduler.trace,
                violation,
                self.scheduler.now,
                self.checker.events,
                sum(client.answers for client in self.clients),
                sum(t.epoch + 1 for name, t in self.cluster.transactions.items() if not name.startswith("stranger")),
                faults.happened,
            )
            for gateway in stage.gateways:
                gateway.kill()
            for projector in stage.projectors:
                projector.kill()
            self.working.kill()
            if stage.operator is not None:
                stage.operator.kill()
            self.scheduler.end()
            return result

    def _begin(self) -> Faults:
        rng, stage = self.scheduler.rng, self.stage
        for number in range(rng.choice((2, 3))):
            stage.gateways.append(Gateway(stage, number))
        if rng.random() < 0.5:
            stage.store = Store(self.scheduler)
        stage.checker.is_kept = stage.is_kept
        database = Database(stage, UUID(int=rng.getrandbits(128), version=4))
        self.database = database
        for number in range(2):
            stage.projectors.append(Projector(stage, number, database))
        self.working = Process(self.scheduler, "clients")
        self.working.loop.create_task(self._start())
        think = 4.0 if self.focus.calm else rng.choice((1.0, 2.0, 4.0))
        for number in range(3 if self.focus.calm else rng.choice((3, 5, 8))):
            client = Client(stage, self.working, number, think)
            self.clients.append(client)
            self.working.loop.create_task(client.work())
        faults = Faults(stage, self.network, rng.choice((0.5, 2.0, 5.0)), self.focus.kinds)
        self.scheduler.after(CALM_SECONDS if self.focus.calm else rng.uniform(0.5, 2.0), faults.begin)
        return faults

    async def _start(self) -> None:
        """Make the topic as `artifact-store migrate` does, then start what works on it."""
        await KafkaLog(self.stage.settings).migrate()
        for gateway in self.stage.gateways:
            gateway.start()
        for projector in self.stage.projectors:
            projector.start()

    def _steps(self, steps: int) -> None:
        scheduler, check = self.scheduler, self._check
        while scheduler.steps < steps:
            scheduler.step()
            check()

    def _check(self) -> None:
        self.checker.look()
        if self.checker.violation is not None:
            raise ViolationError(self.checker.violation)
        if self.scheduler.crashes:
            raise ViolationError(self.scheduler.crashes[0])
        for projector in self.stage.projectors:
            if projector.failure is not None and self._is_explained():
                projector.failure = None  # it names what mends that
            if projector.failure is not None:
                raise ViolationError(f"a projector stopped for good: {projector.failure!r}")

    def _is_explained(self) -> bool:
        stage = self.stage
        return bool(stage.foreign_offset or stage.bad_records or stage.views_behind_loss)

    def _settle(self) -> None:
        """Everything is answered, every event folded, and nothing that was acknowledged is missing."""
        for gateway in self.stage.gateways:
            gateway.start()
        for projector in self.stage.projectors:
            projector.start()
        for client in self.clients:
            client.stop = True
        until = self.scheduler.now + _SETTLE_SECONDS
        while not self._settled():
            if self.scheduler.now > until:
                raise ViolationError(f"nothing goes on: {self._what_waits()}")
            self.scheduler.step()
            self._check()
        for command, answer in list(self.checker.acknowledged.values()):
            self.checker.answered(command, answer)
        for package_id, history in self.checker.histories.items():
            if self.database.packages.get(package_id) != len(history.digests):
                raise ViolationError(f"the view has not all of package {package_id}")

    def _settled(self) -> bool:
        return all(client.done for client in self.clients) and (
            sum(self.database.packages.values()) >= self.checker.events
        )

    def _what_waits(self) -> str:
        waiting = [str(client.unanswered) for client in self.clients if not client.done]
        troubles = [
            f"{gateway.name}: {status.partition}: {status.trouble}"
            for gateway in self.stage.gateways
            if gateway.writer is not None
            for status in gateway.writer.status_here()
        ]
        return "; ".join([*waiting[:1], *troubles]) or "the views are behind"


def _memory() -> str | None:
    """A folder in memory, where there is one: state files are many and small."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - a folder of its own is made in it


_SMALL = {
    (snapshots, "SNAPSHOT_OFFSETS"): 40,
    (snapshots, "SNAPSHOT_SECONDS"): 4.0,
    (snapshots, "CLOSING_OFFSETS"): 20,
    (restore, "WORTH_OFFSETS"): 20,
}
"""In a run of a few minutes there must be snapshots, although it has few events."""


@contextmanager
def _small() -> Iterator[None]:
    before = {(module, name): getattr(module, name) for module, name in _SMALL}
    try:
        for (module, name), value in _SMALL.items():
            setattr(module, name, value)
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


@contextmanager
def _quiet() -> Iterator[None]:
    """The product warns of every fault."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
