"""A process of producers: each creates packages, fills and finalizes them, one after another, until SIGTERM.

`python -m tests.faults.torture.load` reads its `LoadSettings` as JSON from standard input. Once a second it prints the
packages in progress. On SIGTERM it finishes these packages first.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from uuid import UUID

from tests.faults.torture.clients import Client, LibraryClient, PlainClient, UnexpectedAnswerError
from tests.faults.torture.work import FINALIZE, INGEST, Complaint, Entry, Journal, Work, creation

_FILES = (0, 1, 1, 1, 2, 2, 3, 4)
_MANY_FILES, _MANY_ODDS = 60, 0.01
_FILES_AT_ONCE = 4
_COMMON_CONTENTS = 500
_NEW_CONTENT_ODDS = 0.1
_TURN_SECONDS = 2.0


@dataclass(frozen=True)
class LoadSettings:
    """`library`: by the client library instead of plain HTTP. `at_once`: how many commands are under way at most, not
    counting those that have waited for a while: who waits for a partition in trouble must not hold up the others.
    """

    urls: list[str]
    journal: str
    producers: int
    at_once: int
    seed: int
    library: bool = False


class Load:
    """The producers of one process."""

    def __init__(self, settings: LoadSettings, client: Client, journal: Journal) -> None:
        self._settings = settings
        self._client = client
        self._journal = journal
        self._stop = asyncio.Event()
        self._under_way: dict[UUID, float] = {}
        self._turns = asyncio.Semaphore(settings.at_once)

    def stop(self) -> None:
        """Begin no further package."""
        self._stop.set()

    async def run(self) -> None:
        """Until `stop`, and every package that was begun is finalized."""
        reports = asyncio.create_task(self._report())
        await asyncio.gather(*(self._produce(n) for n in range(self._settings.producers)))
        reports.cancel()

    async def _produce(self, n: int) -> None:
        rng = random.Random(f"{self._settings.seed}-{n}")
        while not self._stop.is_set():
            try:
                await self._package(rng)
            except UnexpectedAnswerError as error:
                self._journal.write(Complaint(str(error)))

    async def _package(self, rng: random.Random) -> None:
        made = creation(UUID(int=rng.getrandbits(128), version=4))
        await self._carry_out(made)
        count = _MANY_FILES if rng.random() < _MANY_ODDS else rng.choice(_FILES)
        files = iter([self._file(made, n, rng) for n in range(count)])

        async def send() -> None:
            for work in files:  # shared: each is taken once
                await self._carry_out(work)

        await asyncio.gather(*(send() for _ in range(_FILES_AT_ONCE)))
        await self._carry_out(Work(FINALIZE, made.package_id, UUID(int=rng.getrandbits(128), version=4)))

    def _file(self, made: Work, n: int, rng: random.Random) -> Work:
        is_new = rng.random() < _NEW_CONTENT_ODDS
        content = rng.getrandbits(40) if is_new else rng.randrange(_COMMON_CONTENTS)
        return Work(INGEST, made.package_id, UUID(int=rng.getrandbits(128), version=4), f"{n % 3}/{n}.txt", content)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """One of the places for commands under way, for a while."""
        await self._turns.acquire()
        held = True

        def give_back() -> None:
            nonlocal held
            if held:
                held = False
                self._turns.release()

        expiry = asyncio.get_running_loop().call_later(_TURN_SECONDS, give_back)
        try:
            yield
        finally:
            expiry.cancel()
            give_back()

    async def _carry_out(self, work: Work) -> None:
        async with self._turn():
            began = self._under_way[work.command_id] = monotonic()
            try:
                answer, attempts = await self._client.send(work)
                self._journal.write(Entry(work, answer, began, monotonic(), attempts))
            finally:
                del self._under_way[work.command_id]

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(1)
            now = monotonic()
            oldest = max((now - began for began in self._under_way.values()), default=0.0)
            print(json.dumps({"in_flight": len(self._under_way), "oldest": oldest}), flush=True)  # noqa: T201 - the process's way to tell


async def main() -> None:
    settings = LoadSettings(**json.loads(sys.stdin.readline()))
    journal = Journal(Path(settings.journal))
    loop = asyncio.get_running_loop()
    # Whoever started this holds the other end of the pipe: without them there is nothing left to do.
    loop.add_reader(sys.stdin, lambda: os._exit(1))
    async with LibraryClient(settings.urls) if settings.library else PlainClient(settings.urls) as client:
        load = Load(settings, client, journal)
        loop.add_signal_handler(signal.SIGTERM, load.stop)
        await load.run()
    loop.remove_reader(sys.stdin)
    journal.close()


if __name__ == "__main__":
    asyncio.run(main())
