"""An operator's view while something is wrong: alerts in Prometheus, `doctor`, `status`, `/readyz`, and logs."""

from __future__ import annotations

import asyncio
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path

import aiohttp

from tests.faults.small_disk import SmallMinio, SmallPostgres
from tests.faults.torture.stage import Part, Stage, in_thread, staged
from tests.integration.processes import run_command
from tests.services.process import Server
from tests.services.prometheus import RULES, PrometheusServer, hastened_rules

_LOOK_SECONDS = 0.5
_WELL_SECONDS = 150.0
_CLIENTS = 3
_PAUSE_SECONDS = 0.4


@dataclass(frozen=True)
class Pace:
    """How fast Prometheus is. The default is production's, where a projector may take 8 s to give its metrics."""

    scrape_seconds: int = 10
    hastened: int = 1
    """How many times sooner than by the rules of the chart an alert fires once its condition holds."""
    lingers: frozenset[str] = frozenset()
    """Alerts whose end is not waited for."""


HASTENED = Pace(1, 6, frozenset({"RequestsFail", "ComponentSlow"}))
"""For a few drills that must not take long. What it does not wait for tells of the whole last minute."""


@dataclass
class Scene:
    """The installation under light load. `prometheus` has seen nothing of what was before this drill."""

    stage: Stage
    prometheus: PrometheusServer
    pace: Pace = field(default_factory=Pace)
    began: float = field(default_factory=time.monotonic)
    _read_from: dict[Path, int] = field(default_factory=dict)

    @property
    def gateways(self) -> list[Part]:
        """All of them."""
        return self.stage.gateways

    @property
    def projectors(self) -> list[Part]:
        """All of them."""
        return self.stage.projectors

    def begin(self) -> None:
        """From now on the clock runs, and what is logged counts."""
        self.began = time.monotonic()
        self._read_from = {part.log: part.log.stat().st_size for part in self._parts if part.log.exists()}

    @property
    def _parts(self) -> list[Part]:
        return [*self.gateways, *self.projectors]

    async def all_run(self) -> None:
        """Start what a drill that failed has left behind."""
        await asyncio.gather(*(self.stage.up_again(part) for part in self._parts if not part.running))

    async def doctor(self) -> tuple[int, str]:
        """The exit code and text of `artifact-store doctor`."""
        return await self.command("doctor")

    async def command(self, *arguments: str) -> tuple[int, str]:
        """The exit code of a command, and all that it said."""
        done = await in_thread(lambda: run_command(self.stage.settings, *arguments))
        return done.returncode, (done.stdout + done.stderr).decode(errors="replace")

    async def readiness(self) -> str:
        """What all gateways that answer say at `/readyz`: the names of components with their causes."""
        return "\n".join(await asyncio.gather(*(in_thread(partial(_ready, gateway)) for gateway in self.gateways)))

    def logged(self) -> str:
        """What all gateways and projectors have logged since the drill began."""
        found = []
        for part in self._parts:
            with part.log.open("rb") as file:
                file.seek(self._read_from.get(part.log, 0))
                found.append(file.read().decode(errors="replace"))
        return "\n".join(found)

    async def firing(self) -> set[str]:
        """The alerts that fire now."""
        return await self._alerts('ALERTS{alertstate="firing"}')

    async def pending(self) -> set[str]:
        """The alerts whose condition holds, but not for long enough."""
        return await self._alerts('ALERTS{alertstate="pending"}')

    async def fired(self) -> set[str]:
        """The alerts that have fired since Prometheus was started."""
        return await self._alerts('count_over_time(ALERTS{alertstate="firing"}[1h])')

    async def _alerts(self, expression: str) -> set[str]:
        found = await in_thread(lambda: self.prometheus.query(expression))
        return {series["metric"]["alertname"].removeprefix("ArtifactStore") for series in found}

    async def becomes(self, condition: Callable[[], Awaitable[bool]], seconds: float) -> bool:
        """Wait for what a coroutine function says, at most that long; whether it came."""
        deadline = time.monotonic() + seconds
        while True:
            with suppress(OSError, HTTPException):
                if await condition():
                    return True
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(_LOOK_SECONDS)

    async def well(self, *, but: frozenset[str] = frozenset()) -> None:
        """Wait until every process is up, takes writes, and no alert fires, `but` these. Raises AssertionError."""

        async def quiet() -> bool:
            up = await in_thread(lambda: self.prometheus.query("up == 1"))
            waits = (await self.firing() | await self.pending()) - but - self.pace.lingers
            return len(up) == len(self._parts) and not waits and not (await self.readiness()).strip()

        if not await self.becomes(quiet, _WELL_SECONDS):
            alerts = await self.firing() | await self.pending()
            raise AssertionError(
                f"not well after {_WELL_SECONDS:.0f} s: alerts {sorted(alerts)}, readiness {await self.readiness()!r}"
            )


def _ready(gateway: Part) -> str:
    try:
        with urllib.request.urlopen(f"{gateway.endpoint}/readyz", timeout=8) as answer:  # noqa: S310 - of our own
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        found = json.loads(error.read())
    except (OSError, HTTPException) as error:
        return f"no answer: {error}"
    return "\n".join(f"{name}: {part['cause']}" for name, part in found["parts"].items() if part["state"] != "ok")


def recipe(said: str, command: str) -> list[str]:
    """The command in backquotes that begins so, as a message gives it. Raises AssertionError if there is none."""
    found = re.search(f"`({command}[^`]*)`", said)
    assert found is not None, f"nothing says `{command} …`: {said}"
    return found[1].split()


@contextmanager
def frozen(*servers: Server) -> Iterator[None]:
    """Within the block they stand still, and connections stay open."""
    for server in servers:
        server.freeze()
    try:
        yield
    finally:
        for server in servers:
            server.thaw()


@asynccontextmanager
async def away(*servers: Server) -> AsyncIterator[None]:
    """Within the block they do not run."""
    for server in servers:
        await in_thread(server.kill)
    try:
        yield
    finally:
        await asyncio.gather(*(in_thread(server.start) for server in servers))


class _BlobsOnSmallDisk(SmallMinio):
    """Takes what an hour of light load writes."""

    mib = 1024


class _ViewsOnSmallDisk(SmallPostgres):
    """Its tables are on the small disk, which takes what an hour of light load writes, twice for a replay."""

    mib = 256
    _made = False

    def start(self) -> None:
        super().start()
        if not self._made:
            asyncio.run(self.small_database())
            self._made = True

    def url(self, database: str = "views") -> str:
        return super().url(database)


@asynccontextmanager
async def installation(folder: Path) -> AsyncIterator[Stage]:
    """Everything that drills need, under light load."""
    minio, postgres = _BlobsOnSmallDisk(folder / "minio"), _ViewsOnSmallDisk(folder / "postgres")
    async with (
        staged(folder, keep=lambda: False, proxied=True, minio=minio, postgres=postgres) as stage,
        _under_load(stage, _CLIENTS),
    ):
        yield stage


@asynccontextmanager
async def small_installation(folder: Path) -> AsyncIterator[Stage]:
    """One broker and two gateways, for drills that neither need more nor full disks."""
    async with staged(folder, keep=lambda: False, brokers=1, gateways=2) as stage, _under_load(stage, 1):
        yield stage


@asynccontextmanager
async def _under_load(stage: Stage, clients: int) -> AsyncIterator[None]:
    running = [asyncio.create_task(_publish(stage, n)) for n in range(clients)]
    try:
        yield
    finally:
        for client in running:
            client.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@asynccontextmanager
async def watched(stage: Stage, folder: Path, pace: Pace) -> AsyncIterator[Scene]:
    """A Prometheus that has just begun to watch the installation, which is well."""
    targets = {
        "gateway": [f"127.0.0.1:{part.port}" for part in stage.gateways],
        "projector": [f"127.0.0.1:{part.port}" for part in stage.projectors],
    }
    rules = RULES if pace.hastened == 1 else hastened_rules(folder, pace.hastened)
    prometheus = PrometheusServer(folder, targets, scrape_seconds=pace.scrape_seconds, rules=rules)
    await in_thread(prometheus.start)
    try:
        scene = Scene(stage, prometheus, pace)
        await scene.well()
        yield scene
    finally:
        await in_thread(prometheus.close)


async def _publish(stage: Stage, number: int) -> None:
    """Publish small packages for ever, and read them; whatever fails is left."""
    about = {"name": "run", "producer": "lab", "subject": "sample", "retention_class": "scratch"}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=15)) as session:
        while True:
            url = f"{stage.urls[number % len(stage.urls)]}/v1/packages"
            with suppress(aiohttp.ClientError, TimeoutError, KeyError):
                async with session.post(url, json=about) as answer:
                    package = f"{url}/{(await answer.json())['package_id']}"
                async with session.put(f"{package}/files/a.txt", data=b"x" * 9_000) as answer:
                    await answer.read()
                async with session.post(f"{package}/finalize") as answer:
                    await answer.read()
                async with session.get(f"{package}?wait_sequence=1") as answer:
                    await answer.read()
            number += 1
            await asyncio.sleep(_PAUSE_SECONDS)
