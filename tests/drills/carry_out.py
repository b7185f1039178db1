"""Running a drill: the failure is caused, observed, mended, and observed to be mended."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.drills.drills import Drill
from tests.drills.scene import Pace, Scene, watched
from tests.faults.torture.stage import Stage

RUNBOOKS = Path(__file__).resolve().parents[2] / "docs" / "runbooks.md"
_SAID_SECONDS = 60.0


@dataclass
class Outcome:
    """How a drill went. `wrong` is what an operator would miss."""

    name: str
    alert_seconds: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    fired: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    def line(self) -> str:
        """For a table."""
        alerts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.alert_seconds.items()) or "none"
        return f"{'ok  ' if not self.wrong else 'FAIL'} {self.name}: {alerts}; {self.seconds:.0f} s in all"


async def carry_out(stage: Stage, drill: Drill, folder: Path, pace: Pace | None = None) -> Outcome:
    """Run one drill on an installation that is well, and leave it well."""
    outcome = Outcome(drill.name)
    try:
        async with watched(stage, folder, pace or Pace()) as scene:
            scene.begin()
            try:
                async with drill.make(scene):
                    await _await_alerts(scene, drill, outcome)
                    await _hear(scene, drill, outcome)
                    outcome.wrong += _runbook(drill)
                    await drill.mend(scene)
                await scene.well(but=drill.lingers)
            finally:
                outcome.fired = await scene.fired()
                outcome.seconds = time.monotonic() - scene.began
                await scene.all_run()
    except Exception as error:  # noqa: BLE001 - whatever a client or command raises is a finding; the next drill follows
        outcome.wrong.append(f"{type(error).__name__}: {error}")
    if cried := outcome.fired - drill.alerts - drill.also:
        outcome.wrong.append(f"these cried without need: {sorted(cried)}")
    return outcome


async def _await_alerts(scene: Scene, drill: Drill, outcome: Outcome) -> None:
    """Note when each alert fires. A drill without one waits as long as one would take."""

    async def all_fired() -> bool:
        for name in await scene.fired() & drill.alerts:
            outcome.alert_seconds.setdefault(name, time.monotonic() - scene.began)
        return bool(drill.alerts) and drill.alerts <= outcome.alert_seconds.keys()

    if not await scene.becomes(all_fired, drill.seconds) and drill.alerts:
        missing = sorted(drill.alerts - outcome.alert_seconds.keys())
        outcome.wrong.append(f"{missing} did not fire within {drill.seconds:.0f} s")


async def _hear(scene: Scene, drill: Drill, outcome: Outcome) -> None:
    async def doctor() -> str:
        return (await scene.doctor())[1]

    async def status() -> str:
        return (await scene.command("status"))[1]

    async def logged() -> str:
        return scene.logged()

    sources: list[tuple[str, Sequence[str], Callable[[], Awaitable[str]]]] = [
        ("/readyz", drill.ready, scene.readiness),
        ("doctor", drill.doctor, doctor),
        ("status", drill.status, status),
        ("the log", drill.log, logged),
    ]

    async def hear(name: str, texts: Sequence[str], say: Callable[[], Awaitable[str]]) -> None:
        said, missing = "", list(texts)

        async def heard() -> bool:
            nonlocal said
            said = await say()
            missing[:] = [text for text in missing if not re.search(text, said, re.MULTILINE)]
            return not missing

        if texts and not await scene.becomes(heard, _SAID_SECONDS):
            outcome.wrong.append(f"{name} does not say {missing}, but: {said[-3000:]}")

    await asyncio.gather(*(hear(*source) for source in sources))


def _runbook(drill: Drill) -> list[str]:
    """Whether the section of one of its alerts says what mends this failure."""
    if not drill.runbook:
        return []
    sections = RUNBOOKS.read_text(encoding="utf-8").split("\n## ")
    found = [s for s in sections if s.partition("\n")[0].removeprefix("ArtifactStore") in drill.alerts | drill.also]
    said = " ".join(" ".join(found).split())
    return (
        [] if re.search(re.escape(drill.runbook).replace(r"\|", "|"), said) else [f"no runbook says {drill.runbook!r}"]
    )
