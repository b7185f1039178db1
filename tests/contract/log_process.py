"""Other processes on an embedded log, for tests; each reports over a pipe and may be killed at any time."""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from artifact_store.errors import UnavailableError
from services.core.decide import Command, Limits
from services.log.sqlite import SqliteLog, SqliteWriter
from tests.commands import create, finalize, ingest
from tests.contract.log_stage import no_manifest, settled

_TASKS = 4


@contextmanager
def process(work: Callable[..., None], *arguments: Any) -> Iterator[tuple[BaseProcess, Connection]]:
    """Run `work(*arguments, reports)` in a fresh interpreter, killed at the end; give it and the pipe of reports."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(*arguments, there), daemon=True)
    child.start()
    there.close()
    try:
        yield child, here
    finally:
        child.kill()
        child.join()
        child.close()
        here.close()


def reports_of(reports: Connection) -> Iterator[Any]:
    """What the process reports until it ends or is killed; blocks."""
    while True:
        try:
            yield reports.recv()
        except (EOFError, OSError):  # OSError: it was killed in the middle of a report
            return


def write(path: Path, name: str, packages: int | None, reports: Connection) -> None:
    """Write this many separate packages (None: without end), and files into packages that all writers share.

    Every command is the same for the same name, so that a second run repeats the first. Reports each command with its
    acknowledgement.
    """
    asyncio.run(_write(path, name, packages, reports))


async def _write(path: Path, name: str, packages: int | None, reports: Connection) -> None:
    writer = SqliteWriter(path, limits=Limits(), put_manifest=no_manifest)
    await writer.start()
    numbers = iter(range(packages)) if packages is not None else count()

    async def task() -> None:
        for number in numbers:
            for command in _script(name, number):
                reports.send((command, await settled(writer, command)))

    await asyncio.gather(*(task() for _ in range(_TASKS)))
    await writer.close()


def _script(name: str, number: int) -> list[Command]:
    shared, own = create(f"shared {number}"), create(f"{name} {number}")
    return [
        shared,
        ingest(shared.package_id, f"{name}/a", f"{name}/b", name=f"{name} {number}"),
        own,
        ingest(own.package_id, "a", "b", "c"),
        finalize(own.package_id),
    ]


def write_with_little_room(path: Path, room_bytes: int, reports: Connection) -> None:
    """Write until no file may grow any more, then, with room again, repeat the command that failed.

    The limit of the system on the size of files (setrlimit(2)) stands in for a full disk. Reports each command with its
    acknowledgement, the error in between.
    """
    asyncio.run(_write_with_little_room(path, room_bytes, reports))


async def _write_with_little_room(path: Path, room_bytes: int, reports: Connection) -> None:
    writer = SqliteWriter(path, limits=Limits(), put_manifest=no_manifest)
    await writer.start()
    plenty = resource.getrlimit(resource.RLIMIT_FSIZE)
    made = create()
    reports.send((made, await writer.submit(made)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, plenty[1]))
    for number in count():
        command = ingest(made.package_id, f"{number}/{'x' * 900}", name=number)
        try:
            reports.send((command, await writer.submit(command)))
        except UnavailableError as error:
            reports.send(error.detail)
            resource.setrlimit(resource.RLIMIT_FSIZE, plenty)
            reports.send((command, await writer.submit(command)))
            break
    await writer.close()


def hold_projection(path: Path, projection: str, reports: Connection) -> None:
    """Be the member that holds the projection's partition until killed; reports when it is."""
    asyncio.run(_hold_projection(path, projection, reports))


async def _hold_projection(path: Path, projection: str, reports: Connection) -> None:
    async def from_start(partitions: Sequence[int]) -> Mapping[int, int]:
        return dict.fromkeys(partitions, 0)

    subscription = await SqliteLog(path).subscribe(projection, from_start)
    while not subscription.assigned:
        await subscription.poll(1, 0.1)
    reports.send("assigned")
    while True:
        await subscription.poll(1, 1.0)
