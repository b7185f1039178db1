"""One round of torture: load, faults at random moments, healing, the drain, and the oracle."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.faults.torture import oracle
from tests.faults.torture.clients import GIVE_UP_SECONDS, PlainClient
from tests.faults.torture.figures import Delays, Window
from tests.faults.torture.kinds import KINDS, Kind, Scene
from tests.faults.torture.load import LoadSettings
from tests.faults.torture.oracle import Verdict
from tests.faults.torture.stage import Stage, in_thread
from tests.faults.torture.storm import Storm
from tests.faults.torture.work import Complaint, Entry, Journal, JournalReader
from tests.services.shared import ROOT

_PAUSE_SECONDS = (2.5, 7.0)
"""Between one fault and the next; faults last longer than that, so that several are there at once."""

_REST_SECONDS = (1.0, 5.0)
"""Before the same is taken away again."""

_PROGRESS_SECONDS = 10.0
_FAULT_SECONDS = 240.0
_VIEWS_SECONDS = 180.0
_SAMPLE = 500


@dataclass
class Result:
    """What a round found."""

    verdict: Verdict
    windows: list[Window]
    delays: Delays

    @property
    def last_line(self) -> str:
        """The line that tools read."""
        verdict = self.verdict
        return (
            f"faults={len(self.windows)} kinds={len({w.kind for w in self.windows})} "
            f"acknowledged={verdict.acknowledged} missing={verdict.missing} duplicates={verdict.duplicates} "
            f"violations={verdict.violations}"
        )


@dataclass
class Producers:
    """One process of producers, and what it last said of itself."""

    process: asyncio.subprocess.Process
    in_flight: int = 0
    oldest: float = 0.0

    async def listen(self) -> None:
        """Until it ends."""
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            said = json.loads(line)
            self.in_flight, self.oldest = said["in_flight"], said["oldest"]
        self.in_flight, self.oldest = 0, 0.0


@dataclass
class Round:
    """A stage under fire."""

    stage: Stage
    seed: int
    say: Callable[[str], None]
    loads: list[LoadSettings]
    kinds: Sequence[Kind] = tuple(KINDS)
    windows: list[Window] = field(default_factory=list)
    delays: Delays = field(default_factory=Delays)
    verdict: Verdict = field(default_factory=Verdict)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._taken: set[str] = set()
        self._running: set[asyncio.Task[None]] = set()
        self._journals = [Path(load.journal) for load in self.loads] + [self.stage.folder / "storm.journal"]
        self._reader = JournalReader(self._journals)
        self._began = time.time_ns() // 1000
        self._acknowledged = 0
        self._longest = 0.0
        self._producers: list[Producers] = []

    async def run(self, seconds: float) -> Result:
        """Everything, the oracle included. Raises when the round itself could not be carried out."""
        async with PlainClient(self.stage.urls) as client:
            storm = Storm(client, Journal(self._journals[-1]), random.Random(f"{self.seed}-storm"))
            watch = asyncio.create_task(self.stage.watch())
            listening = [asyncio.create_task((await self._start(load)).listen()) for load in self.loads]
            progress = asyncio.create_task(self._progress(storm))
            try:
                await self._inject(seconds, Scene(self.stage, self._rng, storm))
                self.say("the faults are over; the producers finish what they have begun")
                await self._drain(listening)
                self._take_in(storm)
                await storm.repeat(self._rng, _SAMPLE)
            finally:
                progress.cancel()
                watch.cancel()
                await self._end_producers()
                for task in [*self._running, *listening]:
                    task.cancel()
                await asyncio.gather(progress, watch, *self._running, *listening, return_exceptions=True)
        self.say(f"{storm.repeated:,} acknowledged commands were asked for again")
        await self._judge()
        return Result(self.verdict, self.windows, self.delays)

    async def _start(self, load: LoadSettings) -> Producers:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.faults.torture.load",
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None
        process.stdin.write((json.dumps(asdict(load)) + "\n").encode())
        producers = Producers(process)
        self._producers.append(producers)
        return producers

    async def _inject(self, seconds: float, scene: Scene) -> None:
        """Begin faults until the time is over; return when all are healed."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            free = [kind for kind in self.kinds if not kind.takes & self._taken]
            if free:
                chosen = self._rng.choices(free, [kind.weight for kind in free])[0]
                # Each fault draws from its own numbers, so that a seed means the same faults whatever else happens.
                own = Scene(scene.stage, random.Random(self._rng.getrandbits(64)), scene.storm)
                self._taken |= chosen.takes
                task = asyncio.create_task(self._one(chosen, own))
                self._running.add(task)
                task.add_done_callback(self._running.discard)
            await asyncio.sleep(min(self._rng.uniform(*_PAUSE_SECONDS), max(0.0, end - time.monotonic())))
        await asyncio.gather(*self._running)

    async def _one(self, chosen: Kind, scene: Scene) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(_FAULT_SECONDS):
                await chosen.act(scene)
        # What a fault took away does not come back, whatever the cause: a finding, and the round goes on.
        except Exception as error:  # noqa: BLE001 - see above
            text = f"after `{chosen.name}`: {type(error).__name__}: {error}"
            self.verdict.violation(text)
            self.say(f"VIOLATION {text}")
        finally:
            self.windows.append(Window(chosen.name, began, time.monotonic()))
        await asyncio.sleep(scene.rng.uniform(*_REST_SECONDS))
        self._taken -= chosen.takes

    async def _drain(self, listening: list[asyncio.Task[None]]) -> None:
        for producers in self._producers:
            with suppress(ProcessLookupError):
                producers.process.terminate()
        _, left = await asyncio.wait(listening, timeout=GIVE_UP_SECONDS + 60)
        if left:
            self.verdict.violation("producers do not come to their end")
        for producers in self._producers:
            if not left and await producers.process.wait() != 0:
                self.verdict.violation("a process of producers failed")

    async def _end_producers(self) -> None:
        for producers in self._producers:
            if producers.process.returncode is None:
                producers.process.kill()
                await producers.process.wait()

    async def _progress(self, storm: Storm) -> None:
        while True:
            await asyncio.sleep(_PROGRESS_SECONDS)
            self._take_in(storm)
            kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(w.kind for w in self.windows).most_common())
            oldest = max((p.oldest for p in self._producers), default=0.0)
            self.say(
                f"acknowledged {self._acknowledged:,}, in flight "
                f"{sum(p.in_flight for p in self._producers)}, longest wait {max(self._longest, oldest):.1f} s, "
                f"violations {self.verdict.violations}, faults {len(self.windows)}: {kinds}"
            )

    def _take_in(self, storm: Storm) -> None:
        """Read on in the journals."""
        for entry in self._reader.new():
            if isinstance(entry, Complaint):
                self.verdict.violation(entry.text)
                self.say(f"VIOLATION {entry.text}")
                continue
            self._acknowledged += 1
            self._longest = max(self._longest, entry.ended - entry.began)
            self.delays.add(entry.began, entry.ended)
            storm.remember(entry)
        for text in self.stage.ended:
            self.verdict.violation(text)
            self.say(f"VIOLATION {text}")
        self.stage.ended.clear()

    async def _judge(self) -> None:
        settings, verdict = self.stage.settings, self.verdict
        # Complaints that came after the last look, the repeats' among them, are in the journals.
        for entry in self._reader.new():
            if isinstance(entry, Complaint):
                verdict.violation(entry.text)
        self.say("comparing journals and log")
        strays = self.stage.strays
        events = oracle.read_log(settings, strays)
        await in_thread(lambda: oracle.compare(self._entries(), events, verdict, strays=strays, began=self._began))
        self.say("waiting for the projections")
        deadline = time.monotonic() + _VIEWS_SECONDS
        while not await in_thread(lambda: oracle.caught_up(settings)):
            if time.monotonic() > deadline:
                verdict.violation(f"the projections did not reach the end of the log in {_VIEWS_SECONDS:.0f} s")
                break
            await asyncio.sleep(1)
        self.say("verify reads log, blobs and views")
        await in_thread(lambda: oracle.verify(settings, verdict, strays))

    def _entries(self) -> Iterator[Entry]:
        return (entry for entry in JournalReader(self._journals).new() if isinstance(entry, Entry))
