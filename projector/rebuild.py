"""Replay: fold a projection again from the log's start, beside the live view or in place of it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from projector.progress import Meter, Progress
from projector.rebuild_beside import RebuildOptions, rebuild
from services.config import Settings
from services.core.content_address import ContentAddress
from services.log.port import Log
from services.log.position import Position
from services.views.catch_up import catch_up
from services.views.checkpoints import reset
from services.views.digest import digest_view
from services.views.engine import Views
from services.views.generations import building, drop_build
from services.views.projections import Projection, projection_named
from services.wiring import open_log, open_views

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What a replay has built. `events` were folded here; another that ran beside may have folded more.

    `seconds` are those until the view was whole; the digest is made after that, of the view as it is by then.
    `matches` is what a comparison with the view that was there before has found, None without one.
    """

    projection: str
    events: int
    rows: int
    digest: ContentAddress
    position: Position
    seconds: float
    matches: bool | None = None


async def replay(
    settings: Settings,
    projection: str,
    *,
    in_place: bool = False,
    options: RebuildOptions | None = None,
    max_parked: int | None = None,
    progress: Progress | None = None,
) -> ReplayResult:
    """Fold the projection again from the log's start; return when the view covers the log's end as of the call.

    By default a new generation is built beside the live view, which is read and folded on meanwhile; when the new one
    is nowhere behind, it takes the live one's place. A crash costs nothing: the next call goes on. `in_place` empties
    the view first: until it is folded again it shows less than the log has. `max_parked` is how many packages it may
    park.

    Either works beside running projectors: what they were folding is refused by the view, and they go on from there.

    Raises:
        InvalidRequestError: there is no such projection (the text lists the known ones), or nothing to compare with.
        PushBackError: another builds this projection; the text says who.
        DigestMismatchError: the view that was there differs from the log's; nothing was switched, both are kept.
        CorruptError: too many packages would be parked; a view in place holds what came before.
        UnavailableError: the log or the database cannot be reached; call again.
        ConfigurationError: the settings cannot work.
    """
    known = projection_named(projection)
    log, views = open_log(settings), open_views(settings)
    if max_parked is not None:
        views.max_parked = max_parked
    try:
        return await replay_view(
            views, log, known, in_place=in_place, options=options, progress=progress, settings=settings
        )
    finally:
        await views.close()
        await log.close()


async def replay_view(
    views: Views,
    log: Log,
    projection: Projection,
    *,
    in_place: bool = False,
    options: RebuildOptions | None = None,
    progress: Progress | None = None,
    settings: Settings | None = None,
) -> ReplayResult:
    """As `replay`, on parts that are open; without `settings` in this process alone."""
    began = time.monotonic()
    meter = Meter(progress)
    matches = None
    await _take_group_over(log, projection)
    if in_place:
        await _fold_in_place(views, log, projection, meter)
    else:
        matches = await rebuild(views, log, projection, options or RebuildOptions(), meter, settings)
    seconds = time.monotonic() - began
    meter.begin("digest")
    digest = await digest_view(views, projection)
    logger.info("%s: folded again in %.1f s, %d rows, %s", projection.name, seconds, digest.rows, digest.digest)
    position = digest.position or await log.end()
    return ReplayResult(projection.name, meter.events, digest.rows, digest.digest, position, seconds, matches)


async def abandon(settings: Settings, projection: str) -> bool:
    """Remove what an unfinished replay has built; whether there was anything. The live view is not touched.

    Raises InvalidRequestError: there is no such projection. PushBackError: another is building it. UnavailableError.
    """
    known = projection_named(projection)
    views = open_views(settings)
    try:
        async with building(views, known):
            return await drop_build(views, known)
    finally:
        await views.close()


async def _take_group_over(log: Log, projection: Projection) -> None:
    """Make offsets that other tools have set for the group ours: projectors stop at them, and go on after a replay."""
    name = projection.name
    foreign = {p: offset for p, (offset, metadata) in (await log.committed(name)).items() if not metadata}
    if foreign and await log.show(name, foreign, "replay"):
        logger.info("%s: the offsets that other tools have set for the group decide nothing any more", name)


async def _fold_in_place(views: Views, log: Log, projection: Projection, meter: Meter) -> None:
    end = await log.end()  # a log that cannot be reached must not cost the view its rows
    await views.create_missing()
    generation = await reset(views, projection)
    logger.info("%s: generation %s begins at the log's start", projection.name, generation)
    meter.begin("load", {}, end.offsets)

    def note(folded: int, position: Position) -> None:
        meter.note(folded - meter.events, position.offsets)

    await catch_up(views, log, projection, until=end, progress=note)
