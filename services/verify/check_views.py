"""Checking a view: its digest must equal that of a fresh fold of the log up to the view's position."""

from __future__ import annotations

import sys
from contextlib import aclosing

from sqlalchemy.exc import DBAPIError

from artifact_store.errors import CorruptError
from artifact_store.position import Position
from services.log.port import Log
from services.verify.report import Report
from services.views.database import Views
from services.views.digest import digest_view
from services.views.engine.apply import apply, list_marks
from services.views.engine.checkpoints import load_checkpoint
from services.views.engine.source import read_range
from services.views.projections import Projection

_BATCH_EVENTS = 1000

_UNREADABLE = (ValueError, TypeError, AttributeError, DBAPIError)
"""Raised by SQLAlchemy and the driver for values that can only come from manual edits or disk errors in SQLite."""


async def check_view(log: Log, views: Views, fresh: Views, projection: Projection, report: Report) -> None:
    """Compare `projection` in `views` with a fold into `fresh`, another views database, where it is still empty.

    Raises UnavailableError, ConfigurationError: the log or a database cannot be used.
    """
    place = f"view {projection.name}"
    try:
        found = await digest_view(views, projection)
        marks = await list_marks(views, projection.name)
    except CorruptError as error:
        report.add("view-position", place, f"cannot be compared: {error.detail}")
        return
    except _UNREADABLE as error:  # caught so that the rest of the report is not lost
        report.add("view", place, f"cannot be read: a value does not fit its column ({type(error).__name__})")
        return
    if found.position is None:  # it has folded nothing yet, or claims so
        if found.rows:
            report.add("view", place, f"has {found.rows:,} rows but was not folded from any log")
        return
    for mark in marks:
        where = f"{place} package {mark.package}"
        at = f"stopped at offset {mark.offset} of partition {mark.partition}, {mark.events} events wait"
        report.add("parked", where, f"{at}: {mark.cause}")
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
    fresh.max_parked = sys.maxsize  # unlimited, because the compared view may have had any limit
    checkpoint = await load_checkpoint(fresh, projection, until.log)
    async with aclosing(read_range(log, checkpoint, until.offsets, batch_events=_BATCH_EVENTS)) as batches:
        async for batch in batches:
            await apply(fresh, projection, batch)
