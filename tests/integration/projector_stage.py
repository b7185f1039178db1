"""Shared by the tests of the projector: views on either database, and waiting for a projector's effects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from artifact_store.position import Position
from projector import run_projection
from services.log.port import Log
from services.views.database import Views
from services.views.digest import digest_view
from services.views.engine.apply import catch_up
from services.views.engine.checkpoints import read_position
from services.views.projections import Projection
from tests.integration.conditions import until

WAIT_SECONDS = 60.0


async def eventually(condition: Callable[[], Awaitable[bool]], what: str, seconds: float = WAIT_SECONDS) -> None:
    """As `until`, with a name for what is waited for."""
    await until(condition, seconds, f"waited in vain: {what}")


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Views]:
    """The views of this database, migrated."""
    found = Views(url)
    await found.migrate()
    try:
        yield found
    finally:
        await found.close()


async def position_of(views: Views, projection: Projection) -> Position | None:
    """Where the view stands."""
    async with views.reading() as connection:
        return await read_position(connection, projection)


async def covers(views: Views, projection: Projection, end: Position, seconds: float = WAIT_SECONDS) -> None:
    """Wait until the view has everything up to `end`."""

    async def reached() -> bool:
        position = await position_of(views, projection)
        return position is not None and position.covers(end)

    await eventually(reached, f"{projection.name} reaches {dict(end.offsets)}", seconds)


@asynccontextmanager
async def projecting(
    views: Views, log: Log, projection: Projection, times: int = 1
) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Projectors that run inside the block; leaving it stops them and raises what one of them could not go on from."""
    stop = asyncio.Event()
    tasks = [asyncio.create_task(run_projection(views, log, projection, stop)) for _ in range(times)]
    try:
        yield tasks
    finally:
        stop.set()
        await asyncio.wait(tasks)
    for task in tasks:
        await task


async def same_as_a_fresh_fold(views: Views, reference: Views, log: Log, projection: Projection) -> None:
    """Wait until the view has the whole log, and hold its digest to that of another view that folds it afresh."""
    await covers(views, projection, await log.end())
    await catch_up(reference, log, projection)
    assert (await digest_view(views, projection)).digest == (await digest_view(reference, projection)).digest
