"""The simulated processes: gateways with real writers, and projectors with the real runner on a database in memory."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, TypeVar, cast
from uuid import UUID

from artifact_store.errors import ConfigurationError, UnavailableError
from artifact_store.events import Event
from artifact_store.models import Acknowledgement
from artifact_store.position import Position
from projector import runner
from schemas.codec import decode
from services.config import Settings
from services.core.decide import Command, IngestCheck, IngestFiles, Limits
from services.log.kafka.connection import partition_of
from services.log.kafka.log import KafkaLog
from services.log.kafka.writer import KafkaWriter
from services.log.port import PackageExtent
from services.log.records import Confirmation
from services.log.state.state_file import ForeignStateError, LogPartition, StateFile, StateFileError
from services.views.engine import apply, checkpoints, generations
from services.views.engine.checkpoints import Checkpoint, LastRecord, StaleCheckpointError
from services.views.engine.source import EventBatch
from services.views.projections import projection_named
from tests.simulation.checker import STORE, Checker, Evidence
from tests.simulation.kafka import Cluster
from tests.simulation.scheduler import Process, Scheduler

_T = TypeVar("_T")

LIMITS = Limits(inline_manifest_bytes=6_000)
"""Manifests of a few files are large already, so that they are made beside the partition."""

TOPIC = "sim.events"
PROJECTION = "registry"

GUARD_SECONDS = 60.0
"""After so long on a topic that could lose events nothing is acknowledged."""


@dataclass(eq=False)
class Stage:
    """What all processes share."""

    scheduler: Scheduler
    cluster: Cluster
    checker: Checker
    folder: Path
    settings: Settings
    gateways: list[Gateway] = field(default_factory=list)
    projectors: list[Projector] = field(default_factory=list)
    disturbed: float = 0.0
    """When a fault began or ended last."""
    untold_since: float | None = None
    """Since when nobody is told of a group's members, if all was well before."""
    bad_records: int = 0
    """How many records that are no events wait for an operator."""
    unsafe_since: float | None = None
    """Since when the topic's settings could lose events."""
    whole_reset: bool = False
    """Whether an operator's tool has set a projection's whole group to the log's start."""
    foreign_offset: bool = False
    """Whether such a tool has set a part of it, to wherever."""
    store: Store | None = None
    """Where writers leave snapshots, if they do."""
    losses: dict[int, int] = field(default_factory=dict)
    """By partition, how often it has lost what was acknowledged."""
    views_behind_loss: bool = False
    """Whether the views may still have what the log has lost."""
    operator: Process | None = None

    def is_kept(self, found: Evidence) -> bool:
        """Whether evidence of a loss is still where it was."""
        if not isinstance(found.holder, str):
            return True
        holder = self.store if found.holder == STORE else next(g for g in self.gateways if g.name == found.holder)
        remembered = holder.remembered(found.partition) if holder is not None else []
        return any(log == found.log and offset >= found.offset for log, offset, _ in remembered)

    def losses_of(self, package_id: UUID) -> int:
        """As `losses`, of the package's partition."""
        return self.losses.get(partition_of(package_id, len(self.cluster.partitions)), 0)

    @property
    def calm_seconds(self) -> float:
        """For how long no fault has begun or ended."""
        return self.scheduler.now - self.disturbed


Remembered = tuple[UUID, int, bytes]
"""A record that something remembers: its log, its offset, and the BLAKE3 of its value."""


class Store:
    """The blob store, as far as snapshots need it. It never fails."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.objects: dict[str, bytes] = {}
        self._scheduler = scheduler

    async def put_object(self, key: str, data: bytes) -> None:
        await self._pause()
        self.objects[key] = data
        await self._pause()

    async def get_object(self, key: str) -> bytes | None:
        await self._pause()
        return self.objects.get(key)

    async def list_objects(self, prefix: str) -> list[str]:
        await self._pause()
        return sorted(key for key in self.objects if key.startswith(prefix))

    async def delete_object(self, key: str) -> None:
        await self._pause()
        self.objects.pop(key, None)

    def remembered(self, partition: int) -> list[Remembered]:
        """What the witnesses of a partition remember."""
        names = [key.rpartition("/")[2] for key in self.objects if f"witnesses/{TOPIC}/{partition}/" in key]
        parts = (name.split("-") for name in names)
        return [(UUID(log), int(place) - 1, bytes.fromhex(digest)) for place, _, log, digest in parts]

    async def _pause(self) -> None:
        await asyncio.sleep(self._scheduler.rng.random() * 0.01)


class Gateway:
    """A gateway that may be killed and started again, with the state files that its predecessor left."""

    def __init__(self, stage: Stage, number: int) -> None:
        self.name = f"g{number}"
        self.url = f"http://{self.name}"
        self.writer: KafkaWriter | None = None
        self.process = Process(stage.scheduler, self.name)
        self.process.alive = False
        self.clock_ahead = 0.0
        self._stage = stage
        self._starts = 0

    @property
    def running(self) -> bool:
        return self.process.alive

    def remembered(self, partition: int) -> list[Remembered]:
        """What the state files of a partition stand on."""
        origin = LogPartition(self._stage.cluster.identity, TOPIC, partition)
        found: list[Remembered] = []
        with TemporaryDirectory(dir=self._stage.folder) as folder:
            for path in sorted(self._state_dir.glob(f"{TOPIC}-{partition}.*db*")):
                shutil.copy(path, folder)
            for path in sorted(Path(folder).glob("*.db")):
                try:
                    file = StateFile.open(path, origin)
                except ForeignStateError as error:
                    found.append((error.log, error.anchor.next_offset - 1, error.anchor.digest))
                except StateFileError:
                    continue
                else:
                    found.append((origin.identity, file.anchor.next_offset - 1, file.anchor.digest))
                    file.close()
        return found

    def has_read(self, partition: int) -> int:
        """The offset of the record that its writer has read last; -1 while it serves nothing there."""
        writers: Any = getattr(self.writer, "_writers", {}) if self.running else {}
        state = getattr(writers.get(partition), "_state", None)
        return -1 if state is None else int(state.next_offset) - 1

    @property
    def _state_dir(self) -> Path:
        return self._stage.folder / f"{self.name}-{self._starts}"

    def start(self, *, empty_disk: bool = False) -> None:
        """Begin; does nothing while it runs. On an empty disk, or on what the process before it left there."""
        if self.running:
            return
        left = self._state_dir
        self._starts += 1
        if left.exists() and not empty_disk:
            left.rename(self._state_dir)
        if empty_disk:
            checker = self._stage.checker
            checker.evidence = [found for found in checker.evidence if found.holder != self.name]
        self.process = process = Process(self._stage.scheduler, self.name)
        process.clock_ahead = self.clock_ahead
        process.loop.create_task(self._serve(process), name=self.name)

    async def _serve(self, process: Process) -> None:
        self.writer = None
        settings = replace(self._stage.settings, state_dir=self._state_dir)
        log = KafkaLog(settings)
        writer = KafkaWriter(
            settings,
            log,
            limits=LIMITS,
            put_manifest=_stored,
            clock=process.wall_clock,
            forwarder=Forwarding(self._stage, process),
            internal_url=self.url,
            snapshots=self._stage.store,
        )
        while True:
            try:
                await writer.start()
                break
            except (UnavailableError, ConfigurationError):
                await asyncio.sleep(1.0)
        self.writer = writer

    def kill(self) -> None:
        """As SIGKILL."""
        if self.running:
            # As the files are now: while they unwind, its threads may still write to what they have open.
            kept = self._state_dir.with_suffix(".kept")
            if self._state_dir.exists():
                shutil.copytree(self._state_dir, kept, ignore=shutil.ignore_patterns("*.lock", "*-shm"))
            self.process.kill()
            self.writer = None
            shutil.rmtree(self._state_dir, ignore_errors=True)
            if kept.exists():
                kept.rename(self._state_dir)

    def stop(self, stopped: Callable[[], object]) -> None:
        """As SIGTERM; `stopped` is called when it has ended."""
        writer, process = self.writer, self.process
        if writer is None or not process.alive:
            self.kill()
            stopped()
            return
        closing: KafkaWriter = writer

        async def close() -> None:
            await closing.close()
            if process is self.process and process.alive:
                self.kill()
            stopped()

        process.loop.create_task(close())

    async def submit(self, command: Command) -> Acknowledgement:
        """What the HTTP route does; in this process."""
        writer = self.writer
        if writer is None:
            raise UnavailableError("the gateway is starting")
        answer = await writer.submit(command)
        stage, unsafe = self._stage, self._stage.unsafe_since
        if unsafe is not None and min(stage.scheduler.now - unsafe, stage.calm_seconds) > GUARD_SECONDS:
            stage.checker.broken(f"a command was acknowledged {GUARD_SECONDS} s after the topic could lose it")
        stage.checker.answered(command, answer)
        return answer

    async def confirm(self, confirmation: Confirmation) -> None:
        """What an operator's command asks of the writer; in this process."""
        if self.writer is None:
            raise UnavailableError("the gateway is starting")
        await self.writer.confirm_here(confirmation)

    async def end(self, partition: int) -> int:
        """What a read asks for before it says that something is not there."""
        if self.writer is None:
            raise UnavailableError("the gateway is starting")
        return (await self.writer.end([partition])).offsets[partition]

    async def check_ingest(self, command: IngestFiles) -> None:
        """As `submit`, the question that comes before it."""
        if self.writer is None:
            raise UnavailableError("the gateway is starting")
        paths = [file.relative_path for file in command.files]
        await self.writer.check_ingest(
            IngestCheck(command.package_id, paths, command.command_id, command.grants, command.principal)
        )


async def _stored(manifest: bytes) -> None:
    await asyncio.sleep(0.01)


async def call(stage: Stage, caller: Process, target: Process, act: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """Let another process do something and wait for its answer, which may never come. Raises what it raises.

    Raises UnavailableError when the other process is known to be away.
    """
    scheduler, cluster = stage.scheduler, stage.cluster
    answer: asyncio.Future[_T] = caller.loop.create_future()

    def connected() -> bool:
        return target.alive and caller.alive and cluster.connected(caller.name, target.name)

    def give(set_: Callable[[Any], None], what: object) -> None:
        if caller.alive and not answer.done():
            set_(what)

    def broken() -> None:
        give(answer.set_exception, UnavailableError("the connection is broken; the outcome is unknown"))

    def arrive() -> None:
        if not connected():
            scheduler.after(scheduler.rng.choice((0.01, 5.0)), broken)
            return
        task = target.loop.create_task(act())
        task.add_done_callback(ended)

    def ended(done: asyncio.Task[_T]) -> None:
        if target.alive:
            scheduler.after(scheduler.rng.random() * 0.002, lambda: back(done))

    def back(done: asyncio.Task[_T]) -> None:
        error = None if done.cancelled() else done.exception()
        if done.cancelled() or not connected():
            scheduler.after(scheduler.rng.choice((0.01, 5.0)), broken)
        elif error is not None:
            give(answer.set_exception, error)
        else:
            give(answer.set_result, done.result())

    scheduler.after(scheduler.rng.random() * 0.002, arrive)
    return await answer


class Forwarding:
    """The forwarder of one gateway: other gateways' internal listeners."""

    def __init__(self, stage: Stage, process: Process) -> None:
        self._stage = stage
        self._process = process

    async def submit(self, owner_url: str, command: Command) -> Acknowledgement:
        return await self._at(owner_url, lambda writer: writer.submit_here(command))

    async def check_ingest(self, owner_url: str, asked: IngestCheck) -> str | None:
        return await self._at(owner_url, lambda writer: writer.check_ingest_here(asked))

    async def end(self, owner_url: str, partition: int) -> int | None:
        return await self._at(owner_url, lambda writer: writer.end_here(partition))

    async def extent(self, owner_url: str, package_id: UUID) -> PackageExtent | None:
        return await self._at(owner_url, lambda writer: writer.extent(package_id))

    async def _at(self, url: str, act: Callable[[KafkaWriter], Awaitable[_T]]) -> _T:
        gateway = next(gateway for gateway in self._stage.gateways if url.startswith(gateway.url))

        async def there() -> _T:
            if gateway.writer is None:
                raise UnavailableError("the gateway is starting")
            return await act(gateway.writer)

        return await call(self._stage, self._process, gateway.process, there)


@dataclass(eq=False)
class Database:
    """The views' database: one projection's live generation. Everything in it changes in one go."""

    stage: Stage
    generation: UUID
    log: UUID | None = None
    offsets: dict[int, int] = field(default_factory=dict)
    last: dict[int, LastRecord] = field(default_factory=dict)
    packages: dict[UUID, int] = field(default_factory=dict)
    """How many events of each package were folded."""
    resets: int = 0
    max_parked: int | None = None

    def empty(self) -> None:
        """Let the view begin again, as a replay does."""
        self.generation = UUID(int=self.stage.scheduler.rng.getrandbits(128), version=4)
        self.log = None
        self.offsets, self.last, self.packages = {}, {}, {}

    @asynccontextmanager
    async def reading(self, **_: object) -> AsyncIterator[Any]:
        await self.pause()
        yield self

    async def pause(self) -> None:
        """What a database takes."""
        await asyncio.sleep(self.stage.scheduler.rng.random() * 0.02)


async def _load_checkpoint(views: Database, _: object, log: UUID) -> Checkpoint:
    await views.pause()
    if views.log is None:
        views.log = log
    return Checkpoint(views.generation, Position(log, dict(views.offsets)), dict(views.last))


async def _live_row(connection: Database, _: object, **__: object) -> Any:
    return SimpleNamespace(generation=connection.generation, log=connection.log)


async def _apply(views: Database, _: object, batch: EventBatch) -> Checkpoint:
    await views.pause()
    expected = batch.since.position.offsets
    if views.generation != batch.since.generation or any(
        views.offsets.get(p, 0) != expected.get(p, 0) for p in batch.ends
    ):
        raise StaleCheckpointError("the view does not stand there")
    repeated = views.stage.checker.repeated
    for record in batch.records:
        if record.offset not in repeated[record.partition]:
            _fold(views, decode(record.value))
    views.offsets.update(batch.ends)
    views.last.update({p: LastRecord.of(record) for p, record in batch.last_records().items()})
    await views.pause()  # the answer to the commit
    return batch.after


def _fold(views: Database, event: Event) -> None:
    before = views.packages.get(event.package_id, 0)
    if event.sequence != before + 1:
        raise views.stage.checker.broken(
            f"a view folds event {event.sequence} of package {event.package_id} after {before}"
        )
    views.packages[event.package_id] = event.sequence
    views.stage.checker.folded(event)


async def _reset(views: Database, _: object, *, expected: UUID | None = None, **__: object) -> UUID:
    await views.pause()
    if expected not in (None, views.generation):
        raise StaleCheckpointError("the view was reset meanwhile")
    if not views.stage.whole_reset:
        views.stage.checker.broken("a view was emptied, although nobody has set its whole group to the log's start")
    views.empty()
    views.resets += 1
    return views.generation


STAND_INS: dict[object, object] = {
    checkpoints.load_checkpoint: _load_checkpoint,
    checkpoints.live_row: _live_row,
    apply.apply: _apply,
    generations.reset: _reset,
}


class Projector:
    """A process that runs one projection."""

    def __init__(self, stage: Stage, number: int, database: Database) -> None:
        self.name = f"p{number}"
        self.process = Process(stage.scheduler, self.name)
        self.process.alive = False
        self.failure: BaseException | None = None
        self._stage = stage
        self.database = database

    @property
    def running(self) -> bool:
        return self.process.alive

    def start(self) -> None:
        """Begin; does nothing while it runs."""
        if not self.running:
            self.process = process = Process(self._stage.scheduler, self.name)
            process.loop.create_task(self._project(process), name=self.name)

    async def _project(self, process: Process) -> None:
        log = KafkaLog(self._stage.settings)
        while True:
            try:
                await runner.run_projection(
                    cast("Any", self.database), log, projection_named(PROJECTION), asyncio.Event()
                )
            except Exception as error:  # the simulation asks for it
                if not process.alive:
                    raise
                self.failure = error
                await asyncio.sleep(5.0)

    def kill(self) -> None:
        """As SIGKILL."""
        if self.running:
            self.process.kill()
