"""Background jobs for large packages, during which the partition's writer serves all other packages.

Two things take long with 100,000 files: reading a package back into memory, and making and storing its manifest. Each
is done in a separate thread. Until it is done, requests for that package are held, or pushed back if they are too many.
So nothing else changes the package meanwhile.

A manifest contains the time of its event, and times never go back within a partition. So the partition's time stands
still from the start of a manifest until its event is appended; events of other packages get that same time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from enum import Enum
from threading import Thread
from uuid import UUID

from artifact_store.errors import ArtifactStoreError, PushBackError, RejectedError, UnavailableError
from artifact_store.events import Event
from services.core.decide import (
    EVENT_OVERHEAD_BYTES,
    Command,
    FinalizePackage,
    Limits,
    claim_check,
    decide,
    require_write,
)
from services.core.state import CREATED, PackageState
from services.log.port import NotAppendedError, PutManifest
from services.log.sequencer.driver import State
from services.log.sequencer.queue import Request
from services.log.state.state_file import StateFileError
from services.runtime.clock import Clock

PUT_SECONDS = 15.0
"""How long storing a manifest may take."""

AT_A_TIME = 4
"""How many manifests of a partition are made at the same time."""

MANIFEST_WINDOW_MICROS = 1_000_000
"""While a manifest is made, others are begun only within this time (µs), so that the partition's time can advance."""

HELD_BYTES = 4 << 20
"""Push a request back if the held requests for its package would take about this much memory."""

MAX_JOBS = 100
"""How many packages of a partition may have a job at the same time."""

_SURELY_LARGE = 4_096
_METADATA_GROWTH = 3
"""How much larger metadata can be in CBOR: a short JSON number may take nine bytes."""

_LOG = logging.getLogger(__name__)


class _Task(Enum):
    LOAD = "load"
    FINALIZE = "finalize"


@dataclass(eq=False, slots=True)
class _Job:
    """The job for one package: `task` and `command` say what to do, the other fields how far it is."""

    package_id: UUID
    task: _Task
    command: Command | None = None
    requests: list[Request] = field(default_factory=list)
    size: int = 0
    running: bool = False
    cancelled: bool = False
    done: bool = False
    loaded: PackageState | None = None
    made: Sequence[Event] | ArtifactStoreError = ()
    putting: Future[None] | None = None


class BackgroundJobs:
    """The jobs of one lease. Used by the writer's thread.

    Methods block no longer than a read of the state file takes; only `store` blocks for longer.
    """

    def __init__(
        self,
        state: State,
        *,
        exclusive: bool,
        limits: Limits,
        clock: Clock,
        put_manifest: PutManifest,
        loop: asyncio.AbstractEventLoop,
        wake: Callable[[], None],
    ) -> None:
        """`wake` is called, in another thread, when a job is done: see `settle`. For `exclusive` see `Lease`."""
        self._state = state
        self._exclusive = exclusive
        self._limits = limits
        self._clock = clock
        self._put_manifest = put_manifest
        self._loop = loop
        self._wake = wake
        self._jobs: dict[UUID, _Job] = {}
        self._decisions: dict[UUID, tuple[Command, Sequence[Event] | ArtifactStoreError]] = {}
        """By package: the command whose manifest was made for the next batch, and its events or the job's error."""
        self._at_hand: set[UUID] = set()
        """Packages that a job could not load: for one batch, the writer loads them itself and gets the error."""
        self._time: int | None = None
        """The partition's time while it stands still; None while it follows the clock."""

    def now(self) -> int:
        """The time of the partition's next event (µs since 1970)."""
        return max(self._clock(), self._state.last_created_at) if self._time is None else self._time

    def holds(self, request: Request) -> bool:
        """Hold the request if it must wait for its package. Returns whether it is held.

        Raises PushBackError, StateFileError; CorruptError as `State.package`.
        """
        package_id = request.asked.package_id
        job = self._jobs.get(package_id) if self._jobs else None
        if job is None:
            job = self._needed(request)
            if job is None:
                return False
            if len(self._jobs) >= MAX_JOBS:
                raise PushBackError("too many large packages of the partition are being loaded or finalized", 2.0)
            self._jobs[package_id] = job
        elif job.size + request.size > HELD_BYTES:
            job.requests = [held for held in job.requests if not held.answer.done()]
            job.size = sum(held.size for held in job.requests)
            if job.size + request.size > HELD_BYTES:
                # The sender's rights are not checked yet, so the text must not reveal anything about the package.
                raise PushBackError("too many commands wait for the package's partition", 2.0)
        job.requests.append(request)
        job.size += request.size
        return True

    def events(self, command: Command) -> Sequence[Event]:
        """The events of a command whose manifest a job has made and stored, if one has. Raises the job's error."""
        decided, made = self._decisions.get(command.package_id, (None, ()))
        if decided != command or not made:
            return ()
        if isinstance(made, ArtifactStoreError):
            raise made
        package, first = self._state.package(command.package_id), made[0]
        follows = package is not None and (first.sequence, first.previous_digest) == (
            package.sequence + 1,
            package.digest,
        )
        return made if follows else ()

    def settle(self) -> list[Request]:
        """Return the requests that need not wait any longer. Decide them before all others.

        Call it before every batch: a decision is valid for the next batch only.
        """
        self._decisions.clear()
        self._at_hand.clear()
        back: list[Request] = []
        for job in [job for job in self._jobs.values() if job.done]:
            del self._jobs[job.package_id]
            if job.task is _Task.LOAD:
                self._adopt(job)
            elif job.made and job.command is not None:
                self._decisions[job.package_id] = job.command, job.made
            back += job.requests
        at_work = {job.package_id for job in self._jobs.values() if job.running}
        self._state.pinned = {*at_work, *self._decisions}
        if not self._decisions and not self._finalizing():
            self._time = None
        return back

    def begin(self) -> None:
        """Start the waiting jobs that may run now. Call it while all of the state is confirmed."""
        for job in list(self._jobs.values()):
            if job.running:
                continue
            if self._state.away(job.package_id):
                job.task = _Task.LOAD
            if job.task is _Task.LOAD:
                if not any(other.running and other.task is _Task.LOAD for other in self._jobs.values()):
                    self._run(job, self._loading(job))
            elif self._may_finalize():
                command = job.command
                package = None if command is None else self._state.package(job.package_id, command.command_id)
                if package is None or command is None:
                    job.done = True
                    self._wake()
                    continue
                self._time = self.now()
                self._state.pinned.add(job.package_id)
                self._run(job, self._finalizing_of(job, command, package, self._time))

    def cancel(self) -> list[Request]:
        """Give up all jobs. Returns the requests that they held, in order."""
        held = []
        for job in self._jobs.values():
            job.cancelled = True
            if job.putting is not None:
                job.putting.cancel()
            held += job.requests
        self._jobs.clear()
        return held

    def _adopt(self, job: _Job) -> None:
        try:
            if job.loaded is not None:
                self._state.adopt(job.loaded)
                return
        except StateFileError:
            pass  # the writer gets the error when it reads the package itself, and ends its lease
        self._at_hand.add(job.package_id)

    def _needed(self, request: Request) -> _Job | None:
        asked = request.asked
        if self._state.away(asked.package_id) and asked.package_id not in self._at_hand:
            return _Job(asked.package_id, _Task.LOAD)
        if not isinstance(asked, FinalizePackage) or not self._exclusive:
            return None
        made = self._decisions.get(asked.package_id)
        if made is not None and made[0] == asked:
            return None
        package = self._state.package(asked.package_id, asked.command_id)
        try:
            require_write(package, asked)
        except RejectedError:
            return None
        if package is None or package.status != CREATED or package.unfinished is not None:
            return None
        return _Job(asked.package_id, _Task.FINALIZE, asked) if self._may_be_large(package) else None

    def _may_be_large(self, package: PackageState) -> bool:
        """Whether the package's manifest may become a claim check, or takes long to make."""
        files, limits = package.files, self._limits
        if len(files) > _SURELY_LARGE:
            return True
        size = EVENT_OVERHEAD_BYTES + _METADATA_GROWTH * len(package.created.metadata.encode())
        size += sum(len(file.manifest_item) + len(file.receipt_item) for file in files.values())
        return size > min(limits.inline_manifest_bytes, limits.max_event_bytes - EVENT_OVERHEAD_BYTES)

    def _finalizing(self) -> int:
        return sum(job.running and job.task is _Task.FINALIZE for job in self._jobs.values())

    def _may_finalize(self) -> bool:
        if self._time is None:
            return True
        return self._finalizing() < AT_A_TIME and self._clock() < self._time + MANIFEST_WINDOW_MICROS

    def _run(self, job: _Job, work: Callable[[], None]) -> None:
        job.running = True

        def run() -> None:
            try:
                work()
            except ArtifactStoreError as error:
                job.made = error
            except Exception as error:  # noqa: BLE001 - the caller gets an error, and the partition goes on
                _LOG.exception("the background job of package %s failed", job.package_id)
                job.made = UnavailableError(f"the background job of the package failed: {type(error).__name__}")
            job.done = True
            self._wake()

        # A daemon, like the writer's own thread: it must not keep the process alive.
        Thread(target=run, name=f"log-job-{job.task.value}", daemon=True).start()

    def _loading(self, job: _Job) -> Callable[[], None]:
        load = self._state.loading(job.package_id)

        def run() -> None:
            job.loaded = load()

        return run

    def _finalizing_of(self, job: _Job, command: Command, package: PackageState, now: int) -> Callable[[], None]:
        def finalize() -> None:
            events = decide(package, command, now, self._limits)
            if (manifest := claim_check(package, events)) is not None:
                self.store(manifest, job)
            package.find_unportable()  # for the answer; the package remembers it
            job.made = events

        return finalize

    def store(self, manifest: bytes, job: _Job | None = None) -> None:
        """Make a manifest durable before its event is appended. Blocks for at most PUT_SECONDS.

        Raises NotAppendedError, and any other ArtifactStoreError that the blob store raises: nothing is recorded.
        """
        act = _awaited(self._put_manifest, manifest)
        try:
            putting = asyncio.run_coroutine_threadsafe(act, self._loop)
        except RuntimeError:  # the loop is closed
            act.close()
            raise NotAppendedError("the process ends; nothing is recorded") from None
        if job is not None:
            job.putting = putting
            if job.cancelled:
                putting.cancel()
        try:
            putting.result(PUT_SECONDS)
        except (TimeoutError, CancelledError):
            putting.cancel()
            raise NotAppendedError("the manifest could not be stored in time; nothing is recorded") from None
        except UnavailableError as error:
            raise NotAppendedError(f"the manifest could not be stored: {error.detail}; nothing is recorded") from error
        except ArtifactStoreError:
            raise
        # Whatever the blob store raises, the command is not recorded and may be tried again.
        except Exception as error:
            raise NotAppendedError(
                f"the manifest could not be stored ({type(error).__name__}); nothing is recorded"
            ) from error


async def _awaited(put_manifest: PutManifest, manifest: bytes) -> None:
    await put_manifest(manifest)
