"""Bringing a view up to the log's end in the caller's own process: for the embedded parts and for replays.

Any number of processes may do it at once, beside projectors: the checkpoint's guard lets one fold of a batch through,
the others find that the view has moved and go on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import aclosing

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
from services.views.engine.source import ReadBatch, read_stretches
from services.views.projections import Projection

BATCH_EVENTS = 2000

Progress = Callable[[int, Position], None]
"""Called after each batch with how many events were folded so far, and where the view stands."""


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
    folded = 0
    async with views.folding[projection.name]:
        while True:
            checkpoint = await load_checkpoint(views, projection, identity)
            end = await log.end(checkpoint.position)  # after the checkpoint, which others may move on meanwhile
            require_same_log(projection, identity, end.log)
            until = until or end
            check_within(checkpoint.position, end, projection.name)
            if checkpoint.position.covers(until):
                return folded
            await check_continues(log, projection.name, checkpoint, end.offsets, end=end)
            fold = _Fold(views, log, projection, checkpoint, batch_events, progress)
            try:
                await fold.run(end)
            except StaleCheckpointError:
                continue  # another folds as well: go on from where it has come to
            finally:
                folded += fold.folded


class _Fold:
    """One pass over the log, batch by batch."""

    def __init__(
        self,
        views: Views,
        log: Log,
        projection: Projection,
        since: Checkpoint,
        batch_events: int,
        progress: Progress | None,
    ) -> None:
        self.folded = 0
        self._views = views
        self._log = log
        self._projection = projection
        self._at = since
        self._batch_events = batch_events
        self._progress = progress

    async def run(self, end: Position) -> None:
        """Fold what lies between the checkpoint and the end; offsets without events (transaction markers) lie there
        as well."""
        stretches = read_stretches(self._log, self._at.position, end.offsets, batch_events=self._batch_events)
        async with aclosing(stretches):
            async for stretch in stretches:
                await self._apply(stretch.batch, stretch.next_offsets)

    async def _apply(self, batch: ReadBatch, behind: Mapping[int, int]) -> None:
        self._at = await apply(self._views, self._projection, batch, since=self._at, next_offsets=behind)
        if batch.confirmed:
            await retry_confirmed(self._views, self._log, self._projection, batch.confirmed)
        self.folded += len(batch.records)
        if self._progress is not None:
            self._progress(self.folded, self._at.position)
