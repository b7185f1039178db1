"""Bringing a view up to the log's end in the caller's own process: for the embedded parts and for replays.

Any number of processes may do it at once, beside projectors: the checkpoint's guard lets one fold of a batch through,
the others find that the view has moved and go on from there.
"""

from __future__ import annotations

from collections.abc import Callable

from schemas.events import Event, PackageFinalized
from services.errors import CorruptError
from services.log.port import Log
from services.log.position import Position
from services.views.checkpoints import Checkpoint, StaleCheckpointError, apply, load_checkpoint
from services.views.engine import Views
from services.views.projections import Projection

BATCH_EVENTS = 2000
BATCH_MANIFEST_BYTES = 8 << 20
"""A batch ends early when the manifests in it reach this size, so that memory is bounded."""

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
        CorruptError: the view stands beyond the log's end, or an event does not follow what was folded before.
        UnavailableError: the log or the database cannot be reached; nothing is lost, call again.
    """
    identity = await log.identity()
    folded = 0
    async with views.folding[projection.name]:
        while True:
            checkpoint = await load_checkpoint(views, projection, identity)
            end = await log.end()  # after the checkpoint, which others may move on meanwhile
            until = until or end
            check_within(checkpoint.position, end, projection.name)
            if checkpoint.position.covers(until):
                return folded
            fold = _Fold(views, projection, checkpoint, batch_events, progress)
            try:
                await fold.run(log, end)
            except StaleCheckpointError:
                continue  # another folds as well: go on from where it has come to
            finally:
                folded += fold.folded


def check_within(position: Position, end: Position, name: str) -> None:
    """Raise CorruptError when a view stands beyond the log's end: the log has lost what the view has seen."""
    for partition, offset in position.offsets.items():
        if offset > end.offsets.get(partition, 0):
            raise CorruptError(
                f"the view {name} stands at offset {offset} of partition {partition}, beyond the log's end at "
                f"{end.offsets.get(partition, 0)}: the log was truncated or restored from an older copy. Bring the "
                f"whole log back, or accept the loss and fold again with `artifact-store replay {name}`"
            )


class _Fold:
    """One pass over the log, batch by batch."""

    def __init__(
        self, views: Views, projection: Projection, since: Checkpoint, batch_events: int, progress: Progress | None
    ) -> None:
        self.folded = 0
        self._views = views
        self._projection = projection
        self._at = since
        self._batch_events = batch_events
        self._progress = progress

    async def run(self, log: Log, end: Position) -> None:
        """Fold what lies between the checkpoint and the end as it is when reading begins, which is not before `end`."""
        batch: list[Event] = []
        manifest_bytes = 0
        behind = self._at.position
        async for event in log.read(self._at.position):
            batch.append(event)
            behind = event.position
            if isinstance(event.payload, PackageFinalized) and event.payload.manifest is not None:
                manifest_bytes += len(event.payload.manifest)
            if len(batch) >= self._batch_events or manifest_bytes >= BATCH_MANIFEST_BYTES:
                await self._apply(batch, behind)
                batch, manifest_bytes = [], 0
        # Offsets without events (transaction markers) lie before the end as well.
        offsets = {p: max(behind.offsets.get(p, 0), end.offsets.get(p, 0)) for p in {*behind.offsets, *end.offsets}}
        await self._apply(batch, Position(end.log, offsets))

    async def _apply(self, events: list[Event], behind: Position) -> None:
        before = self._at.position.offsets
        moved = {p: offset for p, offset in behind.offsets.items() if offset != before.get(p, 0)}
        if not moved:
            return
        self._at = await apply(self._views, self._projection, events, since=self._at, next_offsets=moved)
        self.folded += len(events)
        if self._progress is not None:
            self._progress(self.folded, self._at.position)
