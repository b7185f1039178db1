"""A producer is killed again and again, with its gateway down half of the time: every file arrives once.

Each test prints its seed; `FAULT_SEED` repeats it, as far as processes can be repeated.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import pytest
from blake3 import blake3

from artifact_store import Client
from artifact_store.manifest import decode
from services.config import Settings
from tests.faults.spool_producer import FILES, content
from tests.integration.gateway.cutting_proxy import cutting_proxy
from tests.integration.http_gateway import running_gateway

pytestmark = pytest.mark.processes

_LONGEST_REQUEST_BYTES = 1 << 20
_PATIENCE_SECONDS = 120.0


class Producers:
    """One process after the other, on the same spool."""

    def __init__(self, url: str, package_id: UUID, spool: Path, draw: random.Random) -> None:
        self.confirmed: list[str] = []
        self._arguments = (url, str(package_id), str(spool))
        self._draw = draw

    async def run_and_kill(self, attempt: int) -> None:
        """Start one, and kill it once it has confirmed some of its files, or a moment after the last."""
        lines = self._draw.choice((0, self._draw.randrange(FILES), FILES))
        async with self._running(f"{attempt}") as process:
            assert process.stdout is not None
            for _ in range(lines):
                line = await process.stdout.readline()
                assert line, "the producer ended by itself"
                self.confirmed.append(line.decode().strip())
            await asyncio.sleep(self._draw.random() * 0.5)  # the moment is the test's subject
            process.kill()
            self.confirmed += (await process.stdout.read()).decode().split("\n")[:-1]
            assert await process.wait() == -signal.SIGKILL

    async def send_the_rest(self) -> None:
        """Start one that only sends, and ends."""
        async with self._running("") as process:
            assert await process.wait() == 0

    @asynccontextmanager
    async def _running(self, attempt: str) -> AsyncIterator[asyncio.subprocess.Process]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "error", "-m", "tests.faults.spool_producer", *self._arguments, attempt),
            stdout=subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                yield process
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.endurance)])
async def test_every_file_of_a_producer_that_is_killed_arrives_once(
    embedded_settings: Settings, tmp_path: Path, kills: int
) -> None:
    seed = int(os.environ.get("FAULT_SEED") or random.randrange(2**32))
    print(f"seed {seed}")  # noqa: T201  shown when the test fails
    draw = random.Random(seed)
    away = False

    def budget() -> int | None:
        """After how many bytes the next connection breaks: in its first request, or between request and answer."""
        if away:
            return 0
        return draw.choice((None, draw.randrange(1, _LONGEST_REQUEST_BYTES)))

    async with (
        running_gateway(embedded_settings) as gateway,
        cutting_proxy(gateway.port, budget) as proxy,
        Client(gateway.url) as registry,
    ):
        package_id = await registry.create_package("n", "p", "s", "scratch")
        producers = Producers(proxy.url, package_id, tmp_path / "spool", draw)
        for attempt in range(kills):
            away = attempt % 2 == 0
            await producers.run_and_kill(attempt)
        away = False
        await producers.send_the_rest()
        await registry.finalize_package(package_id)
        files = decode(await registry.get_manifest_bytes(package_id)).files
        events = [event async for event in registry.read_events(package_id=package_id)]
    arrived = {file.relative_path: file.blake3 for file in files}
    assert set(producers.confirmed) <= arrived.keys()
    assert len(producers.confirmed) == len(set(producers.confirmed))
    assert {path: blake3(content(path)).hexdigest() for path in arrived} == arrived
    assert len(events) == len(arrived) + 2
    assert [path.name for path in (tmp_path / "spool").iterdir()] == ["lock"]  # nothing is left, nothing was refused
