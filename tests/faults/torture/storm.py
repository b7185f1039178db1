"""The torturer's own commands: repeats of acknowledged commands, and new ones whose first answer is dropped."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random
from time import monotonic
from uuid import UUID, uuid4

from tests.faults.torture.clients import PlainClient, UnexpectedAnswerError
from tests.faults.torture.work import Complaint, Entry, Journal, Work, creation

_SAMPLE = 5_000
_AT_ONCE = 30


class Storm:
    """Sends by plain HTTP and writes to its own journal, as every producer does."""

    def __init__(self, client: PlainClient, journal: Journal, rng: Random) -> None:
        self._client = client
        self._journal = journal
        self._rng = rng
        self._sample: list[Entry] = []
        self._seen = 0
        self.repeated = 0
        """How many acknowledged commands were asked for again."""

    def remember(self, entry: Entry) -> None:
        """Keep a fair sample of what was acknowledged (reservoir sampling)."""
        self._seen += 1
        if len(self._sample) < _SAMPLE:
            self._sample.append(entry)
        elif (at := self._rng.randrange(self._seen)) < _SAMPLE:
            self._sample[at] = entry

    async def repeat(self, rng: Random, count: int) -> None:
        """Ask again for commands that were acknowledged; a different answer is noted as a complaint."""
        entries = iter(rng.sample(self._sample, min(count, len(self._sample))))

        async def ask() -> None:
            for entry in entries:  # shared: each is taken once
                await self._again(entry)

        await asyncio.gather(*(ask() for _ in range(_AT_ONCE)))

    async def _again(self, entry: Entry) -> None:
        try:
            answer, _ = await self._client.send(entry.work)
        except UnexpectedAnswerError as error:
            self._journal.write(Complaint(f"a retry was refused: {error}"))
            return
        self.repeated += 1
        if answer != entry.answer:
            self._journal.write(Complaint(f"a retry of {entry.work} got {answer}, the first answer was {entry.answer}"))

    def fresh(self, rng: Random, count: int) -> list[Work]:
        """Creations that nobody has asked for yet."""
        return [creation(UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]

    async def carry_out(self, works: Sequence[Work]) -> None:
        """Send until acknowledged, and write it down."""

        async def one(work: Work) -> None:
            began = monotonic()
            try:
                answer, attempts = await self._client.send(work)
            except UnexpectedAnswerError as error:
                self._journal.write(Complaint(str(error)))
            else:
                self._journal.write(Entry(work, answer, began, monotonic(), attempts))

        await asyncio.gather(*(one(work) for work in works))

    async def open_package(self) -> UUID:
        """A package that stays open."""
        made = creation(uuid4())
        await self.carry_out([made])
        return made.package_id
