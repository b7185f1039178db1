"""Replay: fold a projection again from the log's start."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from services.config import Settings
from services.core.content_address import ContentAddress
from services.log.port import Log
from services.log.position import Position
from services.views.catch_up import Progress, catch_up
from services.views.checkpoints import reset
from services.views.digest import digest_view
from services.views.engine import Views
from services.views.projections import Projection, projection_named
from services.wiring import open_log, open_views

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What a replay has built. `events` were folded here; a projector that ran beside may have folded more."""

    projection: str
    events: int
    rows: int
    digest: ContentAddress
    position: Position
    seconds: float


async def replay(
    settings: Settings, projection: str, *, in_place: bool = False, progress: Progress | None = None
) -> ReplayResult:
    """Fold the projection again from the log's start; return when the view covers the log's end as of the call.

    Works beside running projectors: what they were folding is refused by the view, and from then on either folds.
    While it is folded again the view shows less than the log has; the digest is of the view as it is on return.

    Raises:
        InvalidRequestError: there is no such projection; the text lists the known ones.
        CorruptError: an event cannot be read or does not follow; the view holds what came before it.
        UnavailableError: the log or the database cannot be reached; call again.
        ConfigurationError: the settings cannot work.
    """
    known = projection_named(projection)
    log, views = open_log(settings), open_views(settings)
    try:
        return await replay_view(views, log, known, in_place=in_place, progress=progress)
    finally:
        await views.close()
        await log.close()


async def replay_view(
    views: Views, log: Log, projection: Projection, *, in_place: bool = False, progress: Progress | None = None
) -> ReplayResult:
    """As `replay`, on parts that are open."""
    # Building beside the live view, the default to come, keeps readers whole; until then both ways are in place.
    del in_place
    began = time.monotonic()
    end = await log.end()  # a log that cannot be reached must not cost the view its rows
    await views.create_missing()
    generation = await reset(views, projection)
    logger.info("%s: generation %s begins at the log's start", projection.name, generation)
    events = await catch_up(views, log, projection, until=end, progress=progress)
    digest = await digest_view(views, projection)
    seconds = time.monotonic() - began
    logger.info("%s: folded again in %.1f s, %d rows, %s", projection.name, seconds, digest.rows, digest.digest)
    return ReplayResult(projection.name, events, digest.rows, digest.digest, digest.position or end, seconds)
