"""Large packages that are worked on beside their partition, whose writer goes on with all others meanwhile.

Two things take long with 100,000 files: reading an open package back from the state file, and making its manifest and
storing it. Each is done in a thread of its own; requests for that package are held until it is done, and pushed back
when they are too many. Nothing else changes such a package, so that what the thread found still holds afterwards.

A manifest names the time of its event, and times never step back within a partition. So the partition's time stands
still from the moment that a manifest is begun until its event is appended; others' events get that time meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from enum import Enum
from threading import Thread
from uuid import UUID

from artifact_store.errors import ArtifactStoreError, PushBackError, UnavailableError
from services.clock import Clock
from services.core.commands import Command, FinalizePackage
from services.core.decide import Decision, decide
from services.core.limits import EVENT_OVERHEAD_BYTES, Limits
from services.core.state import CREATED, PackageState
from services.log.port import PutManifest
from services.log.sequencer.queue import Request
from services.log.state.partition_state import PartitionState
from services.log.state.state_file import StateFileError

PUT_SECONDS = 15.0
"""How long a manifest may take to be stored."""

AT_A_TIME = 4
"""How many manifests of a partition are made at a time."""

TOGETHER_MICROS = 1_000_000
"""How much later than another one a manifest may be begun beside it, so that time does not stand still for ever."""

HELD_BYTES = 4 << 20
"""About how much memory requests for one package may wait in; the next one is pushed back."""

MAX_ASIDE = 100
"""How many packages of a partition may wait for their turn."""

_SURELY_LARGE = 4_096
_METADATA_GROWTH = 3
"""A JSON number of few digits may take nine bytes in CBOR."""

_LOG = logging.getLogger(__name__)


class _Task(Enum):
    LOAD = "load"
    FINALIZE = "finalize"


@dataclass(eq=False, slots=True)
class _Aside:
    """One package. `task` and `command` are what is to be done, the other fields what has become of it."""

    package_id: UUID
    task: _Task
    command: Command | None = None
    requests: list[Request] = field(default_factory=list)
    size: int = 0
    running: bool = False
    cancelled: bool = False
    done: bool = False
    loaded: PackageState | None = None
    decision: Decision | None = None
    error: ArtifactStoreError | None = None
    putting: Future[None] | None = None


class Asides:
    """Of one tenure; used by the writer's thread alone. No method blocks for longer than a look into the state file."""

    def __init__(
        self,
        state: PartitionState,
        *,
        limits: Limits,
        clock: Clock,
        put_manifest: PutManifest,
        loop: asyncio.AbstractEventLoop,
        wake: Callable[[], None],
    ) -> None:
        """`wake` is called in another thread when there may be something for `settle`."""
        self._state = state
        self._limits = limits
        self._clock = clock
        self._put_manifest = put_manifest
        self._loop = loop
        self._wake = wake
        self._asides: dict[UUID, _Aside] = {}
        self._decisions: dict[UUID, tuple[Command, Decision]] = {}
        self._at_hand: set[UUID] = set()
        """Packages that could not be loaded aside: the writer is to find out why."""
        self._time: int | None = None

    def now(self) -> int:
        """The time for the partition's next event (µs since 1970)."""
        return max(self._clock(), self._state.last_created_at) if self._time is None else self._time

    def holds(self, request: Request) -> bool:
        """Whether the request was taken to wait for its package. Raises PushBackError, StateFileError."""
        package_id = request.asked.package_id
        aside = self._asides.get(package_id) if self._asides else None
        if aside is None:
            aside = self._needed(request)
            if aside is None:
                return False
            if len(self._asides) >= MAX_ASIDE:
                raise PushBackError("too many large packages of the partition are worked on", 2.0)
            self._asides[package_id] = aside
        elif aside.size + request.size > HELD_BYTES:
            aside.requests = [held for held in aside.requests if not held.answer.done()]
            aside.size = sum(held.size for held in aside.requests)
            if aside.size + request.size > HELD_BYTES:
                raise PushBackError(f"package {package_id} is being finalized or loaded; others wait already", 2.0)
        aside.requests.append(request)
        aside.size += request.size
        return True

    def decision(self, command: Command) -> Decision | None:
        """What the command becomes, if its manifest was made and stored for it."""
        made = self._decisions.get(command.package_id) if self._decisions else None
        if made is None or made[0] != command or made[1].appended is None:
            return None
        package, first = self._state.package(command.package_id), made[1].events[0]
        follows = package is not None and (first.sequence, first.previous_digest) == (
            package.sequence + 1,
            package.digest,
        )
        return made[1] if follows else None

    def settle(self) -> tuple[list[Request], list[tuple[Request, ArtifactStoreError]]]:
        """Requests whose package is ready, to be decided before all others, and those that failed.

        Call it once before every batch: a decision holds for the next batch alone.
        """
        self._decisions.clear()
        self._at_hand.clear()
        back: list[Request] = []
        failed: list[tuple[Request, ArtifactStoreError]] = []
        for aside in [aside for aside in self._asides.values() if aside.done]:
            del self._asides[aside.package_id]
            if aside.task is _Task.LOAD:
                self._adopt(aside)
            elif aside.decision is not None and aside.command is not None:
                self._decisions[aside.package_id] = aside.command, aside.decision
            for request in aside.requests:
                if aside.error is not None and request.asked == aside.command:
                    failed.append((request, aside.error))
                else:
                    back.append(request)
        at_work = {aside.package_id for aside in self._asides.values() if aside.running}
        self._state.pinned = {*at_work, *self._decisions}
        if not self._decisions and not self._finalizing():
            self._time = None
        return back, failed

    def begin(self) -> None:
        """Begin what may be begun; call it while all of the state is confirmed."""
        for aside in list(self._asides.values()):
            if aside.running:
                continue
            if self._state.away(aside.package_id):
                aside.task = _Task.LOAD
            if aside.task is _Task.LOAD:
                if not any(other.running and other.task is _Task.LOAD for other in self._asides.values()):
                    self._run(aside, self._loading(aside))
            elif self._may_finalize():
                command = aside.command
                package = None if command is None else self._state.package(aside.package_id, command.command_id)
                if package is None or command is None:
                    aside.done = True
                    self._wake()
                    continue
                self._time = self.now()
                self._state.pinned.add(aside.package_id)
                self._run(aside, self._finalizing_of(aside, command, package, self._time))

    def cancel(self) -> list[Request]:
        """Give up everything; the requests that are held, in their order."""
        held = []
        for aside in self._asides.values():
            aside.cancelled = True
            if aside.putting is not None:
                aside.putting.cancel()
            held += aside.requests
        self._asides.clear()
        return held

    def _adopt(self, aside: _Aside) -> None:
        try:
            if aside.loaded is not None:
                self._state.adopt(aside.loaded)
                return
        except StateFileError:
            pass  # the writer meets it again when it reads the package itself, and then ends its tenure
        self._at_hand.add(aside.package_id)

    def _needed(self, request: Request) -> _Aside | None:
        asked = request.asked
        if self._state.away(asked.package_id) and asked.package_id not in self._at_hand:
            return _Aside(asked.package_id, _Task.LOAD)
        if not isinstance(asked, FinalizePackage):
            return None
        made = self._decisions.get(asked.package_id)
        if made is not None and made[0] == asked:
            return None
        package = self._state.package(asked.package_id, asked.command_id)
        if package is None or package.status != CREATED or package.unfinished is not None:
            return None
        return _Aside(asked.package_id, _Task.FINALIZE, asked) if self._may_be_large(package) else None

    def _may_be_large(self, package: PackageState) -> bool:
        """Whether the package's manifest may have to travel as a claim check, or takes long to make."""
        files, limits = package.files, self._limits
        if len(files) > _SURELY_LARGE:
            return True
        size = EVENT_OVERHEAD_BYTES + _METADATA_GROWTH * len(package.created.metadata.encode())
        size += sum(len(file.manifest_item) + len(file.receipt_item) for file in files.values())
        return size > min(limits.inline_manifest_bytes, limits.max_event_bytes - EVENT_OVERHEAD_BYTES)

    def _finalizing(self) -> int:
        return sum(aside.running and aside.task is _Task.FINALIZE for aside in self._asides.values())

    def _may_finalize(self) -> bool:
        if self._time is None:
            return True
        return self._finalizing() < AT_A_TIME and self._clock() < self._time + TOGETHER_MICROS

    def _run(self, aside: _Aside, work: Callable[[], None]) -> None:
        aside.running = True

        def run() -> None:
            try:
                work()
            except ArtifactStoreError as error:
                aside.error = error
            except Exception as error:  # noqa: BLE001 - whatever it is, the command is told and the partition goes on
                _LOG.exception("package %s could not be worked on", aside.package_id)
                aside.error = UnavailableError(f"the package could not be worked on: {type(error).__name__}")
            aside.done = True
            self._wake()

        # A daemon, as the writer's own thread is: nothing that it does may keep the process.
        Thread(target=run, name=f"log-aside-{aside.task.value}", daemon=True).start()

    def _loading(self, aside: _Aside) -> Callable[[], None]:
        file = self._state.beside()

        def load() -> None:
            try:
                aside.loaded = file.load(aside.package_id, None, 0)
            finally:
                file.close()

        return load

    def _finalizing_of(self, aside: _Aside, command: Command, package: PackageState, now: int) -> Callable[[], None]:
        def finalize() -> None:
            decision = decide(package, command, now, self._limits)
            if decision.claim_check is not None:
                self._put(aside, decision.claim_check)
                decision = replace(decision, claim_check=None)
            aside.decision = decision

        return finalize

    def _put(self, aside: _Aside, manifest: bytes) -> None:
        """Make a manifest durable before its event is appended. Blocks. Raises UnavailableError, PushBackError."""
        try:
            act = _awaited(self._put_manifest, manifest)
            try:
                aside.putting = asyncio.run_coroutine_threadsafe(act, self._loop)
            except RuntimeError:  # the loop is closed
                act.close()
                raise UnavailableError("the process ends; nothing is recorded") from None
            if aside.cancelled:
                aside.putting.cancel()
            aside.putting.result(PUT_SECONDS)
        except (TimeoutError, CancelledError):
            if aside.putting is not None:
                aside.putting.cancel()
            raise UnavailableError("the manifest could not be stored in time; nothing is recorded") from None
        except ArtifactStoreError:
            raise
        # Whatever the blob store's own failure is, the command is not recorded and may be tried again.
        except Exception as error:
            raise UnavailableError(
                f"the manifest could not be stored ({type(error).__name__}); nothing is recorded"
            ) from error


async def _awaited(put_manifest: PutManifest, manifest: bytes) -> None:
    await put_manifest(manifest)
