"""Appending to the log on Kafka: the port `CommandWriter`, on the writers of this process and of others.

`KafkaWriter` starts and stops the writers of the partitions that the group assigns to this process. `Router` routes a
request to the writer of its partition, in this process or another, and retries until the writer answers.

Retrying is safe, because a command carries its id. But once a writer may have tried a command, the log may hold it. If
another writer then refuses it (because it is full, or cannot write), that does not answer the command.

The router stands above the sequencers. A sequencer that cannot answer raises PartitionNotOwnedError if nobody has tried
the command, or UnavailableError if the log may hold it. The router then asks elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import shutil
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Event as Flag
from typing import cast
from urllib.parse import urlsplit
from uuid import UUID

from blake3 import blake3

from artifact_store.errors import (
    ArtifactStoreError,
    ConfigurationError,
    ConflictError,
    PushBackError,
    RejectedError,
    UnavailableError,
)
from artifact_store.models import Acknowledgement
from artifact_store.position import Position
from artifact_store.rules import is_loopback
from services.config import Settings
from services.core.decide import Command, IngestCheck, Limits
from services.log.kafka.cluster import Member, Topic
from services.log.kafka.connection import READS_PRINCIPALS, partition_of
from services.log.kafka.driver import KafkaDriver
from services.log.kafka.log import KafkaLog
from services.log.kafka.ownership import Owner, Owners, WriterGroup
from services.log.kafka.topic import Guard
from services.log.port import (
    EXTENT_SECONDS,
    Forwarder,
    NotAppendedError,
    PackageExtent,
    PartitionNotOwnedError,
    PartitionStatus,
    PutManifest,
    SnapshotStore,
    TimedStore,
)
from services.log.records import Confirmation
from services.log.sequencer.partition_writer import FairLock, PartitionWriter, WriterContext
from services.log.sequencer.queue import Counts, EndQuestion, in_doubt, size_of
from services.log.state.restore import ExposedFolderError, States, require_own_folder
from services.log.state.snapshots import Snapshots
from services.log.state.state_file import StateFileError
from services.runtime.clock import Clock, system_clock

_LOG = logging.getLogger(__name__)

SUBMIT_SECONDS = 9.0
"""How long a request may take, with all retries. Then the outcome of a command is unknown.

One and a half times as long as it takes until a killed owner has a successor. Less than the 10 s after which many
clients and proxies give up, so that they learn the cause.
"""

CONFIRM_SECONDS = 30.0
"""How long an operator's confirmation may take: all groups of readers are asked first."""

THIS_PROCESS = "this process"

_HAND_OVER_SECONDS = 15.0
SNAPSHOT_SECONDS = 20.0
"""How long `close` waits for running snapshots after the partitions are handed over."""
_IDENTITY_SECONDS = 1.0
"""How often to check that the topic is still the same. For this long, events may go to one that was created again."""

_READERS_SECONDS = 5.0
"""How long it counts as known who can read events with a principal. Commands without a principal do not need it."""

_GUARD_SECONDS = 10.0
"""How often to check that the topic's settings still keep all events."""


class KafkaWriter:
    """See `CommandWriter`. Commands of partitions that another gateway owns go there through `forwarder`.

    Other gateways reach this process at `internal_url`. Without it, and without a forwarder, one gateway works alone.
    The state of its partitions is kept in `settings.state_dir`, and copied to `snapshots`, if there is such a store.
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
        describe_group: Callable[[str], list[Member] | None] | None = None,
    ) -> None:
        """Does not connect yet. `settings` must be those of `log`. Nothing is written while the clock differs too much
        from that of `times`. `describe_group`, if given, lists members of groups instead of the log's cluster.
        """
        self._log = log
        self._limits = limits
        self._put_manifest = put_manifest
        self._clock = clock
        self._forwarder = forwarder
        self._submit_seconds = submit_seconds
        self._state_dir = settings.state_dir
        self._snapshot_store = snapshots
        self._snapshot_key = _snapshot_key(settings)
        if snapshots is not None and self._snapshot_key is None and not _is_of_this_machine(settings.blobs_url):
            _LOG.warning(
                "no copies of the state are made or read, because others may write to the bucket: "
                "set ARTIFACT_STORE_STATE_KEY to one long random text for all gateways"
            )
            self._snapshot_store = None
        self._snapshots: Snapshots | None = None
        self._group = WriterGroup(
            log.kafka,
            log.cluster,
            internal_url,
            self._assigned,
            self._revoked,
            self._look_after_writers,
            describe_group or log.cluster.members,
        )
        self._owners = Owners(self._group.owners)
        self._ending: list[PartitionWriter] = []
        self._context: WriterContext | None = None
        self._partitions = 0
        self._times = times
        self._guard = Guard(log.kafka, log.cluster, clock, None if times is None else times.clock)
        self._watching: list[asyncio.Task[None]] = []
        self._counts = Counts()
        self._router = Router(self._owners, forwarder, self._counts, submit_seconds)
        self._writers = self._router.writers
        self._readers_asked = asyncio.Lock()
        self._readers_known = -math.inf
        """When it was last checked, on the monotonic clock (s), that every process reads events with a principal."""
        self._readers_lack: str | None = None
        """Which process cannot read them, and what mends that; None if every process can."""

    async def start(self) -> None:
        """See `CommandWriter`.

        Raises ConfigurationError if the topic could lose events, or others may write to the folder of the states;
        UnavailableError.
        """
        try:
            await asyncio.to_thread(require_own_folder, self._state_dir)
        except ExposedFolderError as error:
            raise ConfigurationError(error.detail) from None
        except StateFileError as error:  # it may pass: each take-over tries again
            _LOG.warning("%s", error.detail)
        await self._log.check()
        if self._snapshot_store is not None:
            self._snapshots = Snapshots(self._snapshot_store, asyncio.get_running_loop(), self._snapshot_key)
        topic = await self._log.blocking(self._log.cluster.topic)
        self._partitions = topic.partitions
        states = States(self._state_dir, self._snapshots)
        driver = KafkaDriver(self._log.kafka, self._log.cluster, topic.identity, states, self._group, self._guard)
        self._context = WriterContext(
            driver=driver,
            limits=self._limits,
            put_manifest=self._put_manifest,
            clock=self._clock,
            loop=asyncio.get_running_loop(),
            submit_seconds=self._submit_seconds,
            counts=self._counts,
            fair_lock=FairLock(),
        )
        await self._look()
        self._group.start()
        self._watching = [
            asyncio.create_task(self._watch_topic(topic, driver.doubt), name="log-identity"),
            asyncio.create_task(self._watch_guard(), name="log-guard"),
        ]

    async def submit(self, command: Command) -> Acknowledgement:
        """See `CommandWriter`. Also raises PushBackError while a process runs that cannot read the command's events."""
        await self._require_readers(command)
        partition = self._partition_of(command.package_id)
        return cast("Acknowledgement", await self._router.answer(partition, command))

    async def check_ingest(self, asked: IngestCheck) -> str | None:
        """See `CommandWriter`. Raises PushBackError as `submit`."""
        await self._require_readers(asked)
        return cast("str | None", await self._router.answer(self._partition_of(asked.package_id), asked))

    async def _require_readers(self, asked: Command | IngestCheck) -> None:
        """Return if every process of the installation can read the events that this would become.

        Gateways and projectors of the previous release cannot read events with a principal: they would take them for
        foreign records, and stop. Raises PushBackError, which names one such process.
        """
        if asked.principal is None:
            return
        async with self._readers_asked:
            if time.monotonic() >= self._readers_known + _READERS_SECONDS:
                try:
                    await self._log.blocking(lambda: self._group.require_readers(READS_PRINCIPALS))
                    self._readers_lack = None
                except (ConflictError, PushBackError) as error:
                    self._readers_lack = error.detail
                self._readers_known = time.monotonic()
            if self._readers_lack is not None:
                raise PushBackError(f"nobody can act in another's name now: {self._readers_lack}", _READERS_SECONDS)

    def announce(self, package_id: UUID) -> None:
        """See `CommandWriter`. Writers of other processes are not informed."""
        writer = self._writers.get(self._partition_of(package_id))
        if writer is not None:
            writer.announce()

    async def end(self, partitions: Collection[int]) -> Position:
        """See `CommandWriter`."""
        if self._context is None:
            raise UnavailableError("the log's writers are not started")
        offsets = await asyncio.gather(*map(self._end_of, partitions))
        return Position(self._context.driver.identity, dict(zip(partitions, offsets, strict=True)))

    async def _end_of(self, partition: int) -> int:
        end = cast("int | None", await self._router.answer(partition, EndQuestion()))
        # An owner of the previous release does not support this request; it trusts the brokers itself.
        return end if end is not None else (await self._log.end()).offsets[partition]

    async def end_here(self, partition: int) -> int:
        """As `end`, of one partition, but raises PartitionNotOwnedError if this process is not its writer."""
        return cast("int", await self._router.answer_here(partition, EndQuestion()))

    async def extent(self, package_id: UUID) -> PackageExtent | None:
        """See `CommandWriter`."""
        try:
            async with asyncio.timeout(EXTENT_SECONDS):
                partition = self._partition_of(package_id)
                if partition in self._writers:
                    return await self.extent_here(package_id)
                owner = (await self._owners.all()).get(partition)
                if owner is None or owner.is_self or owner.url is None or self._forwarder is None:
                    return None
                return await self._forwarder.extent(owner.url, package_id)
        except (TimeoutError, ArtifactStoreError):
            return None

    async def extent_here(self, package_id: UUID) -> PackageExtent | None:
        """As `extent`, but raises PartitionNotOwnedError if this process is not the partition's writer."""
        writer = self._writers.get(self._partition_of(package_id))
        if writer is None:
            raise PartitionNotOwnedError("this process does not write to the package's partition")
        return await asyncio.to_thread(writer.extent, package_id)

    async def submit_here(self, command: Command) -> Acknowledgement:
        """As `submit`, but raises PartitionNotOwnedError if this process is not the partition's writer."""
        partition = self._partition_of(command.package_id)
        return cast("Acknowledgement", await self._router.answer_here(partition, command))

    async def check_ingest_here(self, asked: IngestCheck) -> str:
        """As `check_ingest`, but raises PartitionNotOwnedError if this process is not the partition's writer."""
        return cast("str", await self._router.answer_here(self._partition_of(asked.package_id), asked))

    async def confirm_here(self, confirmation: Confirmation) -> Acknowledgement:
        """Record an operator's confirmation for a partition of this process. A repeat gets the same answer.

        Waits while the partition is being taken over, for CONFIRM_SECONDS at most. Raises as `PartitionWriter.confirm`.
        """
        writer = self._writers.get(confirmation.partition)
        if writer is None or self._router.closing:
            raise PartitionNotOwnedError(f"this process does not write to partition {confirmation.partition}")
        try:
            async with asyncio.timeout(CONFIRM_SECONDS):
                return await writer.confirm(confirmation)
        except TimeoutError:
            trouble = writer.trouble or "its writer gave no answer in time"
            raise UnavailableError(
                f"partition {confirmation.partition}: {trouble}; whether it is recorded is unknown: confirm it again"
            ) from None

    def _partition_of(self, package_id: UUID) -> int:
        if not self._partitions:
            raise UnavailableError("the log's writers are not started")
        return partition_of(package_id, self._partitions)

    async def ready(self) -> str | None:
        """See `CommandWriter`."""
        if self._context is None:
            return "the log's writers are not started"
        if (trouble := self._router.foreign or self._guard.trouble) is not None:
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
        """As `status`, of this process's own partitions. Sends no request and does not block."""
        return [writer.status(THIS_PROCESS) for _, writer in sorted(self._writers.items())]

    @property
    def partitions(self) -> int:
        """How many partitions the log has; 0 before `start`."""
        return self._partitions

    @property
    def drifted(self) -> bool:
        """Whether the topic's settings differ from what they should be."""
        return self._guard.drifted

    @property
    def clock_skew_seconds(self) -> float | None:
        """How far this machine's clock is ahead of the blob store's (negative: behind); None if that is not known."""
        return self._guard.skew_seconds

    @property
    def state_free_bytes(self) -> int | None:
        """Free space on the disk of the writers' state; None while its folder does not exist. Asks only the system."""
        try:
            return shutil.disk_usage(self._state_dir).free
        except OSError:
            return None

    @property
    def counts(self) -> Counts:
        """The counts of this process's writers since it started."""
        return self._counts

    async def close(self) -> None:
        """See `CommandWriter`."""
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        await self._router.close()
        await asyncio.to_thread(self._close_threads)
        self._owners.close()

    def _close_threads(self) -> None:
        self._group.close()
        left = [*self._writers.values(), *self._ending]
        for writer in left:
            writer.stop()
        _join(left)
        if self._snapshots is not None:
            self._snapshots.close(SNAPSHOT_SECONDS)

    # The group's thread calls the next three methods. Nobody else starts or stops a writer.

    def _assigned(self, partition: int) -> None:
        if self._context is not None and self._router.foreign is None:
            writer = PartitionWriter(partition, self._context)
            writer.start()
            self._writers[partition] = writer

    def _revoked(self, partitions: Sequence[int], lost: bool) -> None:
        """Stop these writers. Those that are `lost` are fenced already, so there is no need to wait for them."""
        gone = [writer for p in partitions if (writer := self._writers.pop(p, None)) is not None]
        for writer in gone:
            writer.stop()
        if not lost:
            # A writer that cannot write may wait long for an answer.
            _join([writer for writer in gone if not writer.helpless])
        self._ending = [writer for writer in [*self._ending, *gone] if not writer.join(0)]

    def _look_after_writers(self) -> str | None:
        """Drop writers whose partitions have other owners. Returns why to leave the partitions, if necessary."""
        why: str | None = None
        for partition, writer in list(self._writers.items()):
            if writer.disowned:
                del self._writers[partition]
                self._group.rejoin()
            if writer.leave_to_others is not None:
                why, writer.leave_to_others = writer.leave_to_others, None
        return why

    async def _watch_guard(self) -> None:
        """Check the topic's settings and the store's clock regularly. Writers do not wait for the answers."""
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
        """Stop writing if the topic was created again or got more partitions, because the states do not match it then.

        A Kafka client continues on another topic of the same name without notice. While there is no such topic, nothing
        is committed.
        """
        while True:
            await asyncio.sleep(_IDENTITY_SECONDS)
            try:
                self._router.foreign = opened.difference(await self._log.blocking(self._log.cluster.topic))
            except UnavailableError:
                continue
            except ConfigurationError:
                doubt.set()
                continue
            if self._router.foreign is None:
                doubt.clear()
                continue
            doubt.set()
            # Other gateways may be able to write, but not while this one owns the partitions.
            await asyncio.to_thread(self._group.close)
            return


MAX_BYTES = 64 << 20
"""About how much memory the requests for one partition may take (bytes): twice the limit of its queue, because more
are being decided or wait for another process."""

_FIRST_PAUSE = 0.02
_LONGEST_PAUSE = 0.5

Answer = Acknowledgement | str | int | None
"""For a command, its acknowledgement; for an `IngestCheck`, the retention class; for an `EndQuestion`, the offset. None
if the owner's release does not know the question."""


class Router:
    """The router of one process. Used on its event loop."""

    def __init__(self, owners: Owners, forwarder: Forwarder | None, counts: Counts, seconds: float) -> None:
        """`seconds` is how long a request may take, with all retries."""
        self.writers: dict[int, PartitionWriter] = {}
        """The writers of this process, by partition. Updated by the code that starts and stops them, in any thread."""
        self.foreign: str | None = None
        """Why the topic is no longer the same log, so that nothing may be written; None while it is."""
        self._owners = owners
        self._forwarder = forwarder
        self._counts = counts
        self._seconds = seconds
        self._held: dict[int, int] = {}
        """The memory that waiting requests take (bytes), by partition."""
        self._under_way = 0
        self._idle = asyncio.Event()
        self.closing = False
        """Whether new requests are refused."""

    async def answer(self, partition: int, asked: Command | IngestCheck) -> Answer:
        """Ask the partition's writer, wherever it is, until it answers.

        Raises as `CommandWriter.submit`, and ConfigurationError or CorruptError if the writer cannot write.
        """
        if self.closing:
            raise PushBackError("this gateway is being shut down")
        with self._room(partition, size_of(asked)), self._counted():
            return await self._sought(partition, asked)

    async def answer_here(self, partition: int, asked: Command | IngestCheck) -> Answer:
        """As `answer`, but raises PartitionNotOwnedError if this process is not the partition's writer."""
        if self.closing:
            raise PartitionNotOwnedError("this process hands its partitions over")
        with self._counted():
            return await self._here(partition, asked)

    async def close(self) -> None:
        """Refuse new requests. Returns when all earlier ones are answered."""
        self.closing = True
        while self._under_way:
            self._idle.clear()
            await self._idle.wait()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    @contextmanager
    def _room(self, partition: int, size: int) -> Iterator[None]:
        """Reserve the request's memory within the block. Raises PushBackError if too little is left."""
        held = self._held.get(partition, 0)
        if held and held + size > MAX_BYTES:
            self._counts.pushed_back += 1
            raise PushBackError("too many commands are looking for the writer of the package's partition", 2.0)
        self._held[partition] = held + size
        try:
            yield
        finally:
            self._held[partition] -= size

    async def _sought(self, partition: int, asked: Command | IngestCheck) -> Answer:
        loop, pause, doubtful = asyncio.get_running_loop(), _FIRST_PAUSE, False
        check = isinstance(asked, IngestCheck)
        deadline = loop.time() + self._seconds
        while True:
            if self.foreign is not None:
                raise in_doubt(self.foreign) if doubtful else UnavailableError(self.foreign)
            own = self.writers.get(partition)
            try:
                return await self._once(partition, asked, deadline)
            except (RejectedError, NotAppendedError):
                raise
            except PartitionNotOwnedError as error:
                trouble = error.detail
            except TimeoutError:
                trouble, doubtful = "the partition's writer gave no answer in time", not check
            except UnavailableError as error:
                if own is not None and not own.ended:
                    raise  # the partition is still this process's, so this is its writer's answer
                trouble, doubtful = error.detail, not check
            except ArtifactStoreError as error:
                if not doubtful:
                    raise
                trouble = error.detail
            self._owners.forget()
            if loop.time() + pause > deadline:
                if check:
                    self._counts.pushed_back += 1
                    raise PushBackError(trouble, 2.0)
                raise in_doubt(trouble)
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _once(self, partition: int, asked: Command | IngestCheck, deadline: float) -> Answer:
        """Ask the process that is known as the partition's writer.

        Raises what the writer raises; PartitionNotOwnedError: nobody has tried the request; TimeoutError: another
        process did not answer.
        """
        with suppress(PartitionNotOwnedError):
            return await self._here(partition, asked, deadline)
        try:
            async with asyncio.timeout_at(deadline):
                owner = (await self._owners.all()).get(partition)
        except UnavailableError as error:
            raise PartitionNotOwnedError(error.detail) from error
        except TimeoutError:
            raise PartitionNotOwnedError("the group of writers did not say in time who owns the partition") from None
        if owner is None or owner.is_self:
            raise PartitionNotOwnedError(f"partition {partition} has no writer now")
        if owner.url is None or self._forwarder is None:
            raise PartitionNotOwnedError(f"partition {partition} is written by another process that cannot be reached")
        there = _asking(self._forwarder, owner.url, partition, asked)
        async with asyncio.timeout_at(deadline):
            return await self._owners.while_owned(partition, owner, there)

    def _here(
        self, partition: int, asked: Command | IngestCheck, deadline: float = math.inf
    ) -> asyncio.Future[Acknowledgement | str]:
        """Let this process's writer answer. Raises PartitionNotOwnedError, and as `PartitionWriter.submit`."""
        if self.foreign is not None:
            raise UnavailableError(self.foreign)
        writer = self.writers.get(partition)
        if writer is None:
            raise PartitionNotOwnedError("this process does not write to the package's partition")
        return writer.submit(asked, deadline)


def _asking(forwarder: Forwarder, url: str, partition: int, asked: Command | IngestCheck) -> Awaitable[Answer]:
    """Ask the process at this URL."""
    if isinstance(asked, EndQuestion):
        return forwarder.end(url, partition)
    if isinstance(asked, IngestCheck):
        return forwarder.check_ingest(url, asked)
    return forwarder.submit(url, asked)


def _join(writers: Sequence[PartitionWriter]) -> None:
    """Block until all of them have ended, for at most _HAND_OVER_SECONDS."""
    deadline = time.monotonic() + _HAND_OVER_SECONDS
    for writer in writers:
        writer.join(max(0.0, deadline - time.monotonic()))


def _elsewhere(partition: int, owner: Owner | None) -> PartitionStatus:
    if owner is None or owner.is_self:
        return PartitionStatus(partition, None)
    return PartitionStatus(partition, owner.url or "another process")


def _snapshot_key(settings: Settings) -> bytes | None:
    """The key that signs snapshots; None if the settings have no secret for it."""
    secret = settings.state_key or settings.internal_secret
    if secret is None:
        return None
    return blake3(secret.get_secret_value().encode(), derive_key_context="artifact-store 2026-11 snapshots").digest()


def _is_of_this_machine(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme == "file" or is_loopback(parts.hostname or "")
    except ValueError:
        return False
