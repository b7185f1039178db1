"""Callers of one writer in this process, for tests of faults below it: steady load, and every answer is kept."""

from __future__ import annotations

import asyncio
from uuid import uuid4

from artifact_store.models import Acknowledgement
from services.core.decide import Command, IngestFiles
from services.log.kafka import KafkaLog, KafkaWriter
from tests.commands import stored
from tests.contract.log_invariants import assert_recorded_once, read_valid
from tests.contract.log_stage import PATIENCE_SECONDS, ready, settled
from tests.integration.conditions import until
from tests.integration.kafka_stage import PARTITIONS, create_in

_FILES = 5
"""A command of several events, so that half of one would show."""


class Callers:
    """Each creates a package and adds files in one command, again and again, and insists until it is answered."""

    def __init__(self, *writers: KafkaWriter, callers: int = 12) -> None:
        """They begin at once; each always asks the same writer, for the same partition."""
        self.done: list[tuple[Command, Acknowledgement]] = []
        self._stop = asyncio.Event()
        self._writers = writers
        self._tasks = [asyncio.ensure_future(self._call(n)) for n in range(callers)]

    async def grow(self, by: int = 50) -> None:
        """Wait until this many more commands are answered."""
        enough = len(self.done) + by

        async def there() -> bool:
            return len(self.done) >= enough or any(task.done() for task in self._tasks)

        await until(there, PATIENCE_SECONDS, "commands are not answered any more")

    async def end(self, log: KafkaLog) -> None:
        """Finish what is under way, and hold the log to its promises. Raises what a caller met."""
        self._stop.set()
        await asyncio.gather(*self._tasks)
        for writer in self._writers:
            await ready(writer)
        events = await read_valid(log)
        assert_recorded_once(events, self.done)
        assert len(events) == sum(len(c.files) if isinstance(c, IngestFiles) else 1 for c, _ in self.done)

    async def _call(self, n: int) -> None:
        writer = self._writers[n % len(self._writers)]
        while not self._stop.is_set():
            made = create_in(n % PARTITIONS)
            await self._submit(writer, made)
            files = tuple(stored(f"{i}.bin") for i in range(_FILES))
            await self._submit(writer, IngestFiles(made.package_id, uuid4(), "ada", files))

    async def _submit(self, writer: KafkaWriter, command: Command) -> None:
        self.done.append((command, await settled(writer, command)))
