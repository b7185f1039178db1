"""Checking a view: its digest must be that of a fresh fold of the log up to where the view stands."""

from __future__ import annotations

from schemas.events import Event, PackageFinalized
from services.errors import CorruptError
from services.log.port import Log
from services.log.position import Position
from services.verify.report import Report
from services.views.checkpoints import apply, load_checkpoint
from services.views.digest import digest_view
from services.views.engine import Views
from services.views.projections import Projection

_BATCH_EVENTS = 1000
_BATCH_BYTES = 16 << 20


async def check_view(log: Log, views: Views, fresh: Views, projection: Projection, report: Report) -> None:
    """Compare `projection` in `views` with a fold into `fresh`, an empty views database of its own.

    Raises UnavailableError, ConfigurationError: the log or a database cannot be used.
    """
    place = f"view {projection.name}"
    found = await digest_view(views, projection)
    if found.position is None:
        return  # it has folded nothing yet, which is what it says
    try:
        found.position.require(await log.identity())
        await _fold_up_to(log, fresh, projection, found.position)
        expected = await digest_view(fresh, projection)
    except CorruptError as error:
        report.add("view-position", place, f"cannot be compared: {error.detail}")
        return
    report.views[projection.name] = str(found.digest)
    if expected.digest != found.digest:
        report.add("view", place, f"has digest {found.digest} over {found.rows:,} rows, not {expected.digest}")


async def _fold_up_to(log: Log, fresh: Views, projection: Projection, until: Position) -> None:
    """Fold exactly the events before `until`, in batches."""
    checkpoint = await load_checkpoint(fresh, projection, until.log)
    batch: list[Event] = []
    moved: dict[int, int] = {}
    manifest_bytes = 0
    async for event in log.read():
        partition = log.partition_of(event.package_id)
        behind = event.position.offsets[partition]
        if behind > until.offsets.get(partition, 0):
            continue
        batch.append(event)
        moved[partition] = behind
        if isinstance(event.payload, PackageFinalized):
            manifest_bytes += len(event.payload.manifest or b"")
        if len(batch) >= _BATCH_EVENTS or manifest_bytes >= _BATCH_BYTES:
            checkpoint = await apply(fresh, projection, batch, since=checkpoint, next_offsets=moved)
            batch, moved, manifest_bytes = [], {}, 0
    if batch:
        await apply(fresh, projection, batch, since=checkpoint, next_offsets=moved)
