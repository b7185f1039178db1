"""Starts `tests.faults.kafka_gateway`, and kills, freezes or resumes it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from services.config import Settings
from tests.services.shared import ROOT

PATIENCE_SECONDS = 60.0


@dataclass
class Child:
    """One such process."""

    process: asyncio.subprocess.Process

    async def says(self, word: str) -> None:
        """Wait until it prints the word. Raises AssertionError when it ends before, TimeoutError."""
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE_SECONDS):
            while line := await self.process.stdout.readline():
                if line.strip() == word.encode():
                    return
        raise AssertionError(f"the process ended before it said {word!r}")

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        """SIGKILL; waits for its end."""
        self.process.kill()
        await self.process.wait()

    async def end(self) -> int:
        """SIGTERM; its exit code."""
        self.process.terminate()
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self.process.wait()


@asynccontextmanager
async def child_gateway(settings: Settings, step: str | None = None) -> AsyncIterator[Child]:
    """A started process for the length of the block; killed at its end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.faults.kafka_gateway",
        *([step] if step is not None else []),
        cwd=ROOT,
        env={**os.environ, **settings.environment()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    child = Child(process)
    try:
        await child.says("started")
        yield child
    finally:
        if process.returncode is None:
            child.thaw()
            await child.kill()
