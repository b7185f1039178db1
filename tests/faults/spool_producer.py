"""A producer with a spool, as a process that can be killed: it prints each path after its file was added."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from uuid import UUID

from artifact_store import Client, RetryPolicy

FILES = 300
"""How many files a process adds; then it only sends."""

_AT_ONCE = 15
_POLICY = RetryPolicy(total_seconds=0.3, first_pause_seconds=0.01, longest_pause_seconds=0.05)


def content(path: str) -> bytes:
    """The bytes of the file of this path, up to 10 KiB of them."""
    return path.encode() * (hash_of(path) % 1_000)


def hash_of(path: str) -> int:
    """A number that is the same in every process."""
    return sum(ord(character) * (31 + place) for place, character in enumerate(path))


async def produce(url: str, package_id: UUID, spool: Path, attempt: str) -> None:
    """Add files until killed. Without an `attempt`, only send what is in the spool, and return."""
    async with (
        Client(url, _POLICY, lambda *_: None) as registry,
        registry.stream(package_id, spool=spool) as files,
    ):

        async def add(number: int) -> None:
            path = f"{attempt}/{number:03}"
            await files.add(path, content(path))
            print(path, flush=True)  # noqa: T201  what the test reads

        if not attempt:
            return
        for first in range(0, FILES, _AT_ONCE):
            await asyncio.gather(*(add(number) for number in range(first, first + _AT_ONCE)))
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(produce(sys.argv[1], UUID(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]))
