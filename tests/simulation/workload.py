"""Clients: they create packages, fill and finalize them, and repeat unanswered commands at any gateway."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from uuid import UUID

from artifact_store.errors import (
    ArtifactStoreError,
    CommandReusedError,
    CorruptError,
    DuplicateRelativePathError,
    IllegalPackageStateError,
    LogLostError,
    PackageNotFoundError,
    PushBackError,
    RejectedError,
    UnavailableError,
)
from artifact_store.models import Acknowledgement
from schemas import identifiers
from schemas.runs import StoredFile
from services.core.decide import Command, CreatePackage, FinalizePackage, IngestFiles
from services.log.kafka.writer import SUBMIT_SECONDS
from services.log.port import NotAppendedError
from tests.simulation.processes import Gateway, Stage, call
from tests.simulation.scheduler import Process

_PATIENCE_SECONDS = 20.0
"""How long a client waits for one answer."""


class _PackageLostError(Exception):
    """The log has lost events of the package: whoever fills it begins another one."""


class Client:
    """One client, which works until `stop` is set and then finishes what it has begun."""

    def __init__(self, stage: Stage, process: Process, number: int, think_seconds: float) -> None:
        self.stop = False
        self.done = False
        self.answers = 0
        self.unanswered: Command | None = None
        self._stage = stage
        self._process = process
        self._actor = f"client {number}"
        self._principal = f"token:service-{number}" if number % 5 == 4 else None
        """Who sends its commands, in the actor's name; None: the actor."""
        self._think_seconds = think_seconds
        self._rng = stage.scheduler.rng
        self._made: list[tuple[Command, Acknowledgement]] = []
        self._losses: dict[UUID, int] = {}
        """By package, how often its partition had lost something when it was begun."""

    async def work(self) -> None:
        """Fill one package after the other."""
        while not self.stop:
            with suppress(_PackageLostError):
                await self._fill_one()
        self.done = True

    async def _fill_one(self) -> None:
        """One package, from its creation to its finalization."""
        package_id = await self._create()
        files = self._rng.choice((0, 1, 2, 3, 5, 8))
        first = self._ingest(package_id, 0) if files else None
        for number in range(files):
            command = first if number == 0 and first is not None else self._ingest(package_id, number)
            if self._rng.random() < 0.3:
                await self._ask(command)
            await self._settled(command)
            await self._look_back(package_id)
            await asyncio.sleep(self._think_seconds * self._rng.random())
        if self._rng.random() < 0.8:
            finalize = FinalizePackage(package_id, self._id(), self._actor, principal=self._principal)
            if self._rng.random() < 0.1:  # two of them at a time: one wins
                await asyncio.gather(
                    self._settled(finalize, may_fail=True),
                    self._settled(replace(finalize, command_id=self._id()), may_fail=True),
                )
            else:
                await self._settled(finalize)
            if first is not None and self._rng.random() < 0.2:
                late = replace(first, command_id=self._id())
                await self._settled(late, may_fail=True)

    async def _create(self) -> UUID:
        command_id = self._id()
        package_id = identifiers.package_id(self._principal or self._actor, command_id)
        self._losses[package_id] = self._stage.losses_of(package_id)
        command = CreatePackage(
            *(package_id, command_id, self._actor, "run", "lab", "sample"),
            *(self._rng.choice(("report", "scratch")), "{}"),
            principal=self._principal,
        )
        if self._rng.random() < 0.1:  # asked for in vain, before it is there
            await self._ask(self._ingest(package_id, 0), exists=False)
        await self._settled(command)
        return package_id

    async def _look_back(self, package_id: UUID) -> None:
        """Now and then: a retry gets the same answer, what is there cannot be added again, and is found."""
        if not self._made or self._rng.random() < 0.6:
            return
        command, answer = self._rng.choice(self._made[-20:])
        if self._is_lost(command.package_id):
            return
        again = await self._settled(command)
        if again != answer:
            self._stage.checker.broken(f"command {command.command_id} was answered in two ways")
        if self._principal is not None:
            stranger = replace(command, principal="token:stranger")  # in the same actor's name
            if await self._settled(stranger, may_fail=True) is not None:
                self._stage.checker.broken(f"command {command.command_id} was answered to another sender")
        if isinstance(command, IngestFiles):
            await self._settled(replace(command, command_id=self._id()), may_fail=True)
        await self._ask_for_end()

    async def _ask_for_end(self) -> None:
        """The proven end of a partition lies behind all that was in it before the question."""
        gateway, checker = self._rng.choice(self._stage.gateways), self._stage.checker
        partition = self._rng.randrange(len(self._stage.cluster.partitions))
        least, losses = checker.end(partition), self._stage.losses.get(partition, 0)
        with suppress(UnavailableError, PushBackError, TimeoutError, CorruptError):
            async with asyncio.timeout(_PATIENCE_SECONDS):
                end = await call(self._stage, self._process, gateway.process, lambda: gateway.end(partition))
            if end < least and losses == self._stage.losses.get(partition, 0):
                checker.broken(f"partition {partition} was said to end at {end}; it had events up to {least} before")

    async def _settled(self, command: Command, *, may_fail: bool = False) -> Acknowledgement | None:
        """Submit until the outcome is known."""
        self.unanswered = command
        in_doubt = False
        checker = self._stage.checker
        while True:
            gateway = self._rng.choice(self._stage.gateways)
            expected, began = checker.exists(command.package_id), self._stage.scheduler.now
            try:
                answer = await self._within(gateway, command)
            except NotAppendedError as error:
                if not in_doubt:
                    checker.denied(command, error.detail)
            except RejectedError as error:
                self._refused(command, error, expected=expected, may_fail=may_fail)
                return None
            except LogLostError as error:
                if not self._stage.losses_of(command.package_id):
                    checker.broken(f"a writer takes the log for cut short: {error.detail}")
            except PushBackError:
                pass
            except UnavailableError as error:
                in_doubt = True
                self._excuse(began, error)
            except ArtifactStoreError as error:
                lost = isinstance(error, CorruptError) and self._stage.losses_of(command.package_id)
                if not self._stage.bad_records and not lost:
                    checker.broken(f"{type(error).__name__}: {error.detail}")
                    return None
            else:
                self.answers += 1
                self._made.append((command, answer))
                self.unanswered = None
                return answer
            await asyncio.sleep(self._rng.random())

    async def _within(self, gateway: Gateway, command: Command) -> Acknowledgement:
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                return await call(self._stage, self._process, gateway.process, lambda: gateway.submit(command))
        except TimeoutError:
            raise UnavailableError("no answer in time") from None
        finally:
            self._require_whole(command.package_id)

    def _is_lost(self, package_id: UUID) -> bool:
        """Whether its partition has lost something since the package was begun."""
        return self._losses[package_id] != self._stage.losses_of(package_id)

    def _require_whole(self, package_id: UUID) -> None:
        if self._is_lost(package_id):
            raise _PackageLostError

    def _excuse(self, began: float, error: UnavailableError) -> None:
        """While nobody says who the members are, commands still find the owner that was known."""
        stage, now = self._stage, self._stage.scheduler.now
        since, waited = stage.untold_since, now - began
        if since is None or now > stage.cluster.away_until["describe"] or stage.disturbed > since or stage.unsafe_since:
            return
        if began > since and waited >= SUBMIT_SECONDS - 1:
            stage.checker.broken(
                f"no owner was found in {waited:.0f} s while nobody told the group's members: {error.detail}"
            )

    def _refused(self, command: Command, error: RejectedError, *, expected: bool, may_fail: bool) -> None:
        checker = self._stage.checker
        if isinstance(error, PackageNotFoundError) and expected:
            checker.broken(f"package {command.package_id} is in the log, and was not found")
        if not may_fail:
            checker.broken(f"command {command.command_id} was refused: {type(error).__name__}: {error.detail}")
        if not isinstance(error, CommandReusedError):
            checker.refused_for_good(command, error.detail)

    async def _ask(self, command: IngestFiles, *, exists: bool = True) -> None:
        """Ask before the bytes are sent."""
        gateway = self._rng.choice(self._stage.gateways)
        checker = self._stage.checker
        expected = checker.exists(command.package_id)
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                await call(self._stage, self._process, gateway.process, lambda: gateway.check_ingest(command))
        except (UnavailableError, PushBackError, TimeoutError, CorruptError):
            return
        except PackageNotFoundError:
            self._require_whole(command.package_id)
            if expected:
                checker.broken(f"package {command.package_id} is in the log, and was not found")
        except (IllegalPackageStateError, DuplicateRelativePathError) as error:
            checker.broken(f"a new file of package {command.package_id} was refused: {error.detail}")
        else:
            self._require_whole(command.package_id)
            if not checker.exists(command.package_id):
                checker.broken(f"package {command.package_id} was found, and is not in the log")

    def _ingest(self, package_id: UUID, number: int) -> IngestFiles:
        files = tuple(_file(f"{number}/{n}.txt") for n in range(self._rng.choice((1, 1, 1, 2, 4))))
        return IngestFiles(package_id, self._id(), self._actor, files, principal=self._principal)

    def _id(self) -> UUID:
        return UUID(int=self._rng.getrandbits(128), version=4)


def _file(path: str) -> StoredFile:
    mark = path.encode().ljust(32, b".")[:32]
    return StoredFile(path, "text/plain", 32, mark, mark[::-1], "local", f"blobs/{path}", 0, 32, 7)
