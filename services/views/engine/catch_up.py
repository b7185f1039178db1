"""Folding on: one batch into the live view, a range of the log into one generation, and all that the log holds.

`catch_up` brings a view up to the log's end in the caller's own process, for the embedded parts and for replays. Any
number of processes may do it at once, beside projectors: the checkpoint's guard lets one fold of a batch through, and
the others find that the view has moved and go on from there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any

from artifact_store.position import Position
from services.log.port import Log
from services.views.database import Views
from services.views.engine.apply import apply
from services.views.engine.checkpoints import (
    Checkpoint,
    StaleCheckpointError,
    check_continues,
    check_within,
    load_checkpoint,
    require_same_log,
)
from services.views.engine.parking import retry_confirmed
from services.views.engine.source import DecodedBatch, read_range
from services.views.projections import Projection

BATCH_EVENTS = 2000

Progress = Callable[[int, Position], None]
"""Called after each batch with how many events were folded so far, and where the view stands."""

Put = Callable[[DecodedBatch, Checkpoint], Coroutine[Any, Any, Checkpoint]]
"""Applies a batch that was read from this checkpoint; returns the checkpoint after it."""


async def fold(views: Views, log: Log, projection: Projection, batch: DecodedBatch, *, since: Checkpoint) -> Checkpoint:
    """Apply a batch to the live view, then retry the packages that its confirmations let go on.

    Raises as `apply` and `retry_confirmed`.
    """
    at = await apply(views, projection, batch, since=since)
    if batch.confirmed:
        await retry_confirmed(views, log, projection, batch.confirmed)
    return at


async def fold_range(
    log: Log,
    since: Checkpoint,
    ends: Mapping[int, int],
    put: Put,
    *,
    batch_events: int = BATCH_EVENTS,
    read_ahead: bool = False,
) -> Checkpoint:
    """Read what lies between a checkpoint and `ends`, exactly that, and `put` it batch by batch.

    Returns the checkpoint after the last batch. With `read_ahead` the next batch is read and decoded while one is being
    put. A failure to read it waits for that: the checkpoint tells how far the view has come.

    Raises as `put` and `Log.scan`.
    """
    at = since
    putting: asyncio.Task[Checkpoint] | None = None
    try:
        async with aclosing(read_range(log, since.position, ends, batch_events=batch_events)) as batches:
            async for batch in batches:
                if putting is not None:
                    at = await putting
                if read_ahead:
                    putting = asyncio.create_task(put(batch, at))
                else:
                    at = await put(batch, at)
        return at if putting is None else await putting
    finally:
        if putting is not None and not putting.done():
            await asyncio.wait([putting])


async def catch_up(
    views: Views,
    log: Log,
    projection: Projection,
    *,
    until: Position | None = None,
    batch_events: int = BATCH_EVENTS,
    progress: Progress | None = None,
) -> int:
    """Return when the view covers `until` (None: the log's end as of the call); how many events were folded here.

    Raises:
        LogIdentityError: the view was folded from another log.
        CorruptError: the log does not go on from what the view has folded, or too many packages would be parked.
        UnavailableError: the log or the database cannot be reached; nothing is lost, call again.
    """
    identity = await log.identity()
    total = 0

    async def put(batch: DecodedBatch, at: Checkpoint) -> Checkpoint:
        nonlocal total
        after = await fold(views, log, projection, batch, since=at)
        total += len(batch.records)
        if progress is not None:
            progress(total, after.position)
        return after

    async with views.folding[projection.name]:
        while True:
            checkpoint = await load_checkpoint(views, projection, identity)
            end = await log.end(checkpoint.position)  # after the checkpoint, which others may move on meanwhile
            require_same_log(projection, identity, end.log)
            until = until or end
            check_within(checkpoint.position, end, projection.name)
            if checkpoint.position.covers(until):
                return total
            await check_continues(log, projection.name, checkpoint, end.offsets, end=end)
            try:
                await fold_range(log, checkpoint, end.offsets, put, batch_events=batch_events)
            except StaleCheckpointError:
                continue  # another folds as well: go on from where it has come to
