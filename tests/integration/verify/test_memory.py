"""The oracle's memory does not depend on the length of the log or on its packages, files and blobs.

Measured in a separate process: its peak resident memory while it verifies a log that is generated as it is read.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SLACK_MIB = 24

_VERIFY = """
import asyncio, json, sys
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from uuid import UUID, uuid5

from schemas.codec import encode
from services.blobs.local import LocalBlobStore
from schemas.runs import StoredFile
from services.core.decide import FinalizePackage, IngestFiles, Limits
from artifact_store.manifest import content_key
from services.core.decide import decide
from services.core.state import evolve
from services.log.port import Batch, Record
from artifact_store.position import Position
from services.verify import verify
from services.views.database import Views
from tests.memory_log import MemoryLog
from tests.commands import create

PACKAGES, FILES, OPEN, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
LOG = UUID(int=1)


class LongLog(MemoryLog):
    # Package after package, of which every OPEN-th is never finalized; every blob has a key of its own.

    async def end(self, covering: Position | None = None) -> Position:
        return Position(self.id, {0: PACKAGES * (1 + FILES) + sum(number % OPEN > 0 for number in range(PACKAGES))})

    async def scan(self, starts, ends) -> AsyncGenerator[Batch]:
        offset = 0
        for number in range(PACKAGES):
            state = None
            made = create(number)
            digests = [uuid5(LOG, f"{number} {i}").bytes * 2 for i in range(FILES)]
            files = tuple(
                StoredFile(f"folder/{i}", "text/plain", 7, d, d, "local", content_key(d), 0, 7, 1)
                for i, d in enumerate(digests)
            )
            asked = [made, IngestFiles(made.package_id, uuid5(LOG, str(number)), "ada", files)]
            if number % OPEN:
                asked.append(FinalizePackage(made.package_id, uuid5(LOG, f"end {number}"), "ada"))
            for command in asked:
                for event in decide(state, command, number + 1, Limits()):
                    state = evolve(state, event)
                    offset += 1
                    record = Record(0, offset - 1, str(event.package_id).encode(), encode(event))
                    yield Batch([record], {0: offset})
        assert offset == ends[0]


class EveryBlob(LocalBlobStore):
    async def size(self, key):
        return 7


async def main():
    views = Views(f"sqlite+aiosqlite:///{folder}/views.db")
    await views.migrate()
    blobs = EveryBlob(Path(folder) / "blobs")
    report = await verify(LongLog(1), blobs, views)
    await blobs.close()
    await views.close()
    assert report.clean, report.violations[:3]
    # Not ru_maxrss, which begins at what the process held that started this one (Linux, fs/exec.c).
    status = Path("/proc/self/status").read_text()
    most = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    print(json.dumps({"events": report.events, "blobs": report.blobs, "mib": most}))


asyncio.run(main())
"""


def most_resident(folder: Path, packages: int, files: int, every_open: int) -> tuple[int, float]:
    """How many events were verified, and how many MiB that process held at most."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _VERIFY, str(packages), str(files), str(every_open), str(folder)],
        capture_output=True,
        check=False,
        cwd=Path(__file__).resolve().parents[3],
    )
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    assert found["blobs"] == packages * files
    return found["events"], found["mib"]


def grows(folder: Path, few: int, times: int) -> float:
    """By how many MiB a log that is so many times longer needs more memory."""
    short, least = most_resident(folder / "short", few, 8, 3)
    long, most = most_resident(folder / "long", few * times, 8, 3)
    assert long > (times - 1) * short
    print(f"{short:,} events: {least:.1f} MiB, {long:,} events: {most:.1f} MiB")  # noqa: T201  shown with -s
    return most - least


@pytest.mark.processes
def test_ten_times_the_log_needs_no_more_memory(tmp_path: Path) -> None:
    assert grows(tmp_path, 200, 10) < SLACK_MIB


@pytest.mark.endurance
def test_fifty_times_the_log_needs_no_more_memory(tmp_path: Path) -> None:
    assert grows(tmp_path, 2_000, 50) < SLACK_MIB
