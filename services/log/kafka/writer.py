"""Appending to the log on Kafka: the `CommandWriter` port over the writers of this process and those of others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Collection, Sequence
from contextlib import suppress
from threading import Event as Flag
from threading import Lock
from typing import TypeVar, cast
from uuid import UUID

from artifact_store.errors import ArtifactStoreError, ConfigurationError, PushBackError, UnavailableError
from artifact_store.models import Acknowledgement
from artifact_store.position import Position
from services.config import Settings
from services.core.commands import Command
from services.core.limits import Limits
from services.log.kafka.cluster import Topic
from services.log.kafka.driver import KafkaDriver
from services.log.kafka.log import KafkaLog
from services.log.kafka.ownership import WriterGroup
from services.log.kafka.topic import Guard
from services.log.port import (
    EXTENT_SECONDS,
    Forwarder,
    PackageExtent,
    PartitionNotOwnedError,
    PartitionStatus,
    PutManifest,
    SnapshotStore,
    TimedStore,
)
from services.log.records import Confirmation
from services.log.router import Owner, Owners, Router, There
from services.log.sequencer.answers import Counts
from services.log.sequencer.partition_writer import FairLock, PartitionWriter, WriterContext
from services.log.sequencer.queue import EndQuestion, IngestCheck, Request, size_of
from services.log.state.restore import States
from services.log.state.snapshots import Snapshots
from services.runtime.clock import Clock, system_clock

SUBMIT_SECONDS = 30.0
"""How long a command may look for its owner, and how long wait there for its turn; the outcome is unknown then."""

THIS_PROCESS = "this process"

_HAND_OVER_SECONDS = 15.0
SNAPSHOT_SECONDS = 20.0
"""How long `close` waits for snapshots that are being made, once the partitions are handed over."""
_IDENTITY_SECONDS = 1.0
"""How often it is looked whether the topic is still the log's: so much may be written to one that was made anew."""

_GUARD_SECONDS = 10.0
"""How often it is looked whether the topic still keeps what is written to it."""

_T = TypeVar("_T")


class KafkaWriter:
    """See `CommandWriter`. Commands of partitions that another gateway owns go there through `forwarder`.

    `internal_url` is where others reach this process; without it, and without a forwarder, one gateway works alone.
    The state of its partitions lies in `settings.state_dir`, and copies of it in `snapshots`, if there is such a store.
    """

    def __init__(
        self,
        settings: Settings,
        log: KafkaLog,
        *,
        limits: Limits,
        put_manifest: PutManifest,
        clock: Clock = system_clock,
        forwarder: Forwarder | None = None,
        internal_url: str | None = None,
        snapshots: SnapshotStore | None = None,
        times: TimedStore | None = None,
        submit_seconds: float = SUBMIT_SECONDS,
    ) -> None:
        """Connects to nothing yet. `settings` are those that `log` was made of.

        Nothing is written while the clock differs much from that of `times`.
        """
        self._log = log
        self._limits = limits
        self._put_manifest = put_manifest
        self._clock = clock
        self._forwarder = forwarder
        self._submit_seconds = submit_seconds
        self._state_dir = settings.state_dir
        self._snapshot_store = snapshots
        self._snapshots: Snapshots | None = None
        self._group = WriterGroup(log.kafka, log.cluster, internal_url, self._assigned, self._revoked)
        self._owners = Owners(self._group.owners)
        self._writers: dict[int, PartitionWriter] = {}
        self._assigning = Lock()
        """Held while a writer begins or goes: one that ends as it begins must not be taken for its successor."""
        self._ending: list[PartitionWriter] = []
        self._context: WriterContext | None = None
        self._times = times
        self._guard = Guard(log.kafka, log.cluster, clock, None if times is None else times.clock)
        self._watching: list[asyncio.Task[None]] = []
        self._foreign: str | None = None
        """What makes the topic another log than the one that was opened."""
        self._in_flight = InFlight()
        self._moving: set[asyncio.Task[Acknowledgement]] = set()
        self._counts = Counts()
        self._router = Router(self._owners, forwarder, self._here, lambda: self._foreign, self._counts, submit_seconds)
        self._closing = False

    async def start(self) -> None:
        """See `CommandWriter`. Raises ConfigurationError when the topic could lose events, UnavailableError."""
        await self._log.check()
        if self._snapshot_store is not None:
            self._snapshots = Snapshots(self._snapshot_store, asyncio.get_running_loop())
        topic = await self._log.blocking(self._log.cluster.topic)
        states = States(self._state_dir, self._snapshots)
        driver = KafkaDriver(self._log.kafka, self._log.cluster, topic.identity, states, self._group, self._guard)
        self._context = WriterContext(
            driver=driver,
            limits=self._limits,
            put_manifest=self._put_manifest,
            clock=self._clock,
            loop=asyncio.get_running_loop(),
            submit_seconds=self._submit_seconds,
            disowned=self._disowned,
            give_way=self._group.give_way,
            counts=self._counts,
            fair_lock=FairLock(),
        )
        await self._look()
        self._group.start()
        self._watching = [
            asyncio.create_task(self._watch_topic(topic, driver.doubt), name="log-identity"),
            asyncio.create_task(self._watch_guard(), name="log-guard"),
        ]

    def submit(self, command: Command) -> Awaitable[Acknowledgement]:
        """See `CommandWriter`. What this process's own writer takes needs no task and no coroutine."""
        if not self._closing and self._foreign is None:
            writer = self._writers.get(self._log.partition_of(command.package_id))
            if writer is not None:
                try:
                    return cast("Awaitable[Acknowledgement]", writer.submit(command, self._moved))
                except PushBackError as error:
                    return _refused(error)
                except PartitionNotOwnedError:
                    pass
        return self._routed(command, _submitting(command))

    async def check_ingest(
        self, package_id: UUID, relative_paths: Sequence[str], command_id: UUID | None
    ) -> str | None:
        """See `CommandWriter`."""
        asked = IngestCheck(package_id, tuple(relative_paths), command_id)
        return await self._routed(
            asked, lambda forwarder, url: forwarder.check_ingest(url, package_id, relative_paths, command_id)
        )

    async def end(self, partitions: Collection[int]) -> Position:
        """See `CommandWriter`."""
        if self._context is None:
            raise UnavailableError("the log's writers are not started")
        offsets = await asyncio.gather(*map(self._end_of, partitions))
        return Position(self._context.driver.identity, dict(zip(partitions, offsets, strict=True)))

    async def _end_of(self, partition: int) -> int:
        if self._closing:
            raise PushBackError("this gateway is being shut down")
        asked = EndQuestion()
        there: There[int | None] = lambda forwarder, url: forwarder.end(url, partition)  # noqa: E731 - its type is told
        with self._in_flight:
            end = await self._router.answer(partition, asked, there, doubtful=False)
        # An owner of the previous release believes the brokers, as all of its reads do.
        return end if end is not None else (await self._log.end()).offsets[partition]

    async def end_here(self, partition: int) -> int:
        """As `end`, of one partition, but PartitionNotOwnedError when this process is not its writer."""
        if self._closing:
            raise PartitionNotOwnedError("this process hands its partitions over")
        with self._in_flight:
            return cast("int", await self._here(EndQuestion(), partition))

    async def extent(self, package_id: UUID) -> PackageExtent | None:
        """See `CommandWriter`."""
        try:
            async with asyncio.timeout(EXTENT_SECONDS):
                partition = self._log.partition_of(package_id)
                if partition in self._writers:
                    return await self.extent_here(package_id)
                owner = (await self._owners.all()).get(partition)
                if owner is None or owner.is_self or owner.url is None or self._forwarder is None:
                    return None
                return await self._forwarder.extent(owner.url, package_id)
        except (TimeoutError, ArtifactStoreError):
            return None

    async def extent_here(self, package_id: UUID) -> PackageExtent | None:
        """As `extent`, but PartitionNotOwnedError when this process is not the partition's writer."""
        writer = self._writers.get(self._log.partition_of(package_id))
        if writer is None:
            raise PartitionNotOwnedError("this process does not write to the package's partition")
        return await asyncio.to_thread(writer.extent, package_id)

    async def submit_here(self, command: Command) -> Acknowledgement:
        """As `submit`, but PartitionNotOwnedError when this process is not the partition's writer."""
        return cast("Acknowledgement", await self._accepted(command))

    async def check_ingest_here(self, package_id: UUID, relative_paths: Sequence[str], command_id: UUID | None) -> str:
        """As `check_ingest`, but PartitionNotOwnedError when this process is not the partition's writer."""
        return cast("str", await self._accepted(IngestCheck(package_id, tuple(relative_paths), command_id)))

    async def confirm_here(self, confirmation: Confirmation) -> Acknowledgement:
        """Record what an operator confirmed about a partition that this process writes to; a repeat gets its answer.

        Waits as long as a command does. Raises PartitionNotOwnedError; ConflictError and InvalidRequestError: it is
        refused, nothing is recorded; UnavailableError: the outcome is unknown, confirm it again.
        """
        writer = self._writers.get(confirmation.partition)
        if writer is None or self._closing:
            raise PartitionNotOwnedError(f"this process does not write to partition {confirmation.partition}")
        try:
            async with asyncio.timeout(self._submit_seconds):
                return await writer.confirm(confirmation)
        except TimeoutError:
            trouble = writer.trouble or "its writer gave no answer in time"
            raise UnavailableError(f"partition {confirmation.partition}: {trouble}") from None

    async def ready(self) -> str | None:
        """See `CommandWriter`."""
        if self._context is None:
            return "the log's writers are not started"
        if (trouble := self._foreign or self._guard.trouble) is not None:
            return trouble
        owners = await self._owners.all()
        for p in range(await self._log.partitions()):
            writer, owner = self._writers.get(p), owners.get(p)
            if writer is not None:
                if writer.trouble is not None:
                    return f"partition {p} cannot be written to: {writer.trouble}"
            elif owner is None or owner.is_self:
                return self._group.trouble or f"partition {p} has no writer yet"
            elif owner.url is None or self._forwarder is None:
                return f"partition {p} is written by another process that commands cannot be forwarded to"
        return None

    async def status(self) -> Sequence[PartitionStatus]:
        """See `CommandWriter`."""
        owners = await self._owners.all()
        here = {found.partition: found for found in self.status_here()}
        return [here.get(p) or _elsewhere(p, owners.get(p)) for p in range(await self._log.partitions())]

    def status_here(self) -> list[PartitionStatus]:
        """As `status`, of the partitions that this process writes to; asks nobody and does not block."""
        return [writer.status(THIS_PROCESS) for _, writer in sorted(self._writers.items())]

    @property
    def clock_skew_seconds(self) -> float | None:
        """How far this machine's clock is ahead of the blob store's (negative: behind); None when that is not known."""
        return self._guard.skew_seconds

    @property
    def counts(self) -> Counts:
        """What the writers of this process have counted since it began."""
        return self._counts

    async def close(self) -> None:
        """See `CommandWriter`."""
        self._closing = True
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        await self._all_answered()
        await asyncio.to_thread(self._close_threads)
        self._owners.close()

    async def _all_answered(self) -> None:
        """Wait until there is an answer to everything that was taken."""
        await self._in_flight.none()
        while open_ := [f for writer in [*self._writers.values(), *self._ending] for f in writer.unanswered()]:
            await asyncio.wait(open_)
            await self._in_flight.none()

    def _close_threads(self) -> None:
        self._group.close()
        left = [*self._writers.values(), *self._ending]
        for writer in left:
            writer.stop()
        _join(left)
        if self._snapshots is not None:
            self._snapshots.close(SNAPSHOT_SECONDS)

    async def _accepted(self, asked: Command | IngestCheck) -> Acknowledgement | str:
        if self._closing:
            raise PartitionNotOwnedError("this process hands its partitions over")
        with self._in_flight:
            return await self._here(asked, self._log.partition_of(asked.package_id))

    def _moved(self, request: Request) -> None:
        """Find the answer to a command elsewhere that this process's writer took and cannot answer any more."""
        command = cast("Command", request.asked)
        task = asyncio.ensure_future(self._sought(command, _submitting(command), doubtful=request.failures > 0))
        self._moving.add(task)

        def pass_on(task: asyncio.Task[Acknowledgement]) -> None:
            self._moving.discard(task)
            error = None if task.cancelled() else task.exception()
            if request.answer.done():
                return
            if task.cancelled():
                request.answer.cancel()
            elif error is not None:
                request.answer.set_exception(error)
            else:
                request.answer.set_result(task.result())

        task.add_done_callback(pass_on)

    async def _routed(self, asked: Command | IngestCheck, there: There[_T]) -> _T:
        """Bring a request to the partition's writer, wherever it is."""
        if self._closing:
            raise PushBackError("this gateway is being shut down")
        with self._router.room(self._log.partition_of(asked.package_id), size_of(asked)):
            return await self._sought(asked, there)

    async def _sought(self, asked: Command | IngestCheck, there: There[_T], *, doubtful: bool = False) -> _T:
        with self._in_flight:
            return await self._router.answer(self._log.partition_of(asked.package_id), asked, there, doubtful=doubtful)

    def _here(self, asked: Command | IngestCheck, partition: int) -> asyncio.Future[Acknowledgement | str]:
        """Let this process's writer carry it out. Raises PartitionNotOwnedError, and as `PartitionWriter.submit`."""
        writer = self._writers.get(partition)
        if self._foreign is not None:
            raise UnavailableError(self._foreign)
        if writer is None:
            raise PartitionNotOwnedError("this process does not write to the package's partition")
        return writer.submit(asked)

    def _assigned(self, partition: int) -> None:
        """Called in the group's thread."""
        if self._context is not None and self._foreign is None:
            writer = PartitionWriter(partition, self._context)
            with self._assigning:
                writer.start()
                self._writers[partition] = writer

    def _revoked(self, partitions: Sequence[int], lost: bool) -> None:
        """Called in the group's thread. What was lost is another's already, and fenced: waiting would help nobody."""
        with self._assigning:
            gone = [writer for p in partitions if (writer := self._writers.pop(p, None)) is not None]
        for writer in gone:
            writer.stop()
        if not lost:
            # One that is helpless writes nothing, and may wait for an answer for long.
            _join([writer for writer in gone if not writer.helpless])
        self._ending = [writer for writer in [*self._ending, *gone] if not writer.join(0)]

    def _disowned(self, writer: PartitionWriter) -> None:
        """Called in a writer's thread, which ends."""
        with self._assigning:
            if self._writers.get(writer.partition) is not writer:
                return  # the group has said so meanwhile, or has given it back
            del self._writers[writer.partition]
        self._group.rejoin()

    async def _watch_guard(self) -> None:
        """Look at the topic's settings and the store's clock again and again; no writer waits for the answers."""
        while True:
            await asyncio.sleep(_GUARD_SECONDS)
            await self._look()

    async def _look(self) -> None:
        async def hear_time() -> None:
            if self._times is not None:
                with suppress(UnavailableError):
                    await self._times.now()

        await asyncio.gather(self._log.blocking(self._guard.look), hear_time())

    async def _watch_topic(self, opened: Topic, doubt: Flag) -> None:
        """Stop writing when the topic was made anew, or grew: what we know of the packages is not where it should be.

        A client goes on with another topic of that name as if nothing had been. While there is none, nothing is
        committed.
        """
        while True:
            await asyncio.sleep(_IDENTITY_SECONDS)
            try:
                self._foreign = opened.difference(await self._log.blocking(self._log.cluster.topic))
            except UnavailableError:
                continue
            except ConfigurationError:
                doubt.set()
                continue
            if self._foreign is None:
                doubt.clear()
                continue
            doubt.set()
            # Others may be sound, and find no owner as long as this process is one.
            await asyncio.to_thread(self._group.close)
            return


def _join(writers: Sequence[PartitionWriter]) -> None:
    """Block until they have ended, _HAND_OVER_SECONDS at most for all of them."""
    deadline = time.monotonic() + _HAND_OVER_SECONDS
    for writer in writers:
        writer.join(max(0.0, deadline - time.monotonic()))


def _refused(error: PushBackError) -> asyncio.Future[Acknowledgement]:
    """An answer that is there already: the caller hears of it where it waits."""
    answer: asyncio.Future[Acknowledgement] = asyncio.get_running_loop().create_future()
    answer.set_exception(error)
    return answer


def _submitting(command: Command) -> There[Acknowledgement]:
    return lambda forwarder, url: forwarder.submit(url, command)


def _elsewhere(partition: int, owner: Owner | None) -> PartitionStatus:
    if owner is None or owner.is_self:
        return PartitionStatus(partition, None)
    return PartitionStatus(partition, owner.url or "another process")


class InFlight:
    """Counts requests that no writer of this process holds yet, so that `close` can wait for them."""

    def __init__(self) -> None:
        self._count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __enter__(self) -> None:
        self._count += 1
        self._idle.clear()

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        if not self._count:
            self._idle.set()

    async def none(self) -> None:
        """Wait until there is none."""
        await self._idle.wait()
