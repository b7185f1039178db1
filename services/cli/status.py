"""`status`: how far the views are, and who writes to the log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from services.cli.opening import LOG_AND_VIEWS, log_and_views
from services.cli.output import answer, raw, table
from services.cli.root import run
from services.cli.settings import common_options, invocation
from services.cli.writers import COLUMNS, row, writers

if TYPE_CHECKING:
    from services.log.port import Log
    from services.log.position import Position
    from services.views.engine import Views
    from services.views.projections import Projection


@click.command()
@common_options(shown=(*LOG_AND_VIEWS, "internal_secret"))
def status() -> None:
    """How far each projection is behind the log, and which gateway writes to which partition.

    Each owner is asked at its internal listener since when, how long it took to take over, and from what it restored
    the writer's state: `file`, `snapshot` or `log`. ARTIFACT_STORE_INTERNAL_SECRET must be theirs.
    """
    found = run(_status())
    if invocation().as_json:
        answer(found)
        return
    raw(f"log {found['log']}, {found['partitions']} partitions".encode())
    columns = ("projection", "behind", "parked")
    table(("projection", "events behind", "packages parked"), [[p[c] for c in columns] for p in found["projections"]])
    for p in found["projections"]:
        if p["group"] is not None:
            raw(f"{p['projection']}: {p['group']}".encode())
        if (build := p["building"]) is not None:
            raw(f"{p['projection']} is built anew by {build['builder']}, {build['behind']} events behind".encode())
    if found["writers"] is None:
        raw(b"the log is a file: whoever writes holds its lock")
    else:
        table(COLUMNS, [row(writer) for writer in found["writers"]])
        for writer in found["writers"]:
            if any(writer[name] for name in ("skipped", "repeated", "quarantined")):
                text = "partition {partition}: {skipped} records skipped, {repeated} repeated, {quarantined} packages"
                raw(f"{text} quarantined".format(**writer).encode())


async def _status() -> dict[str, Any]:
    from services.log.position import Position
    from services.views.parked import list_marks
    from services.views.projections import PROJECTIONS
    from services.views.queries import Queries
    from services.wiring import is_embedded

    settings = invocation().settings()
    async with log_and_views() as (log, views):
        end, embedded = await log.end(), is_embedded(settings)
        queries = Queries(views)
        projections = []
        for name, projection in PROJECTIONS.items():
            position = await queries.checkpoint(name)
            projections.append(
                {
                    "projection": name,
                    "position": None if position is None else str(position),
                    "behind": sum(end.left_behind(position).values()),
                    # Who reads a file commits nothing: what a view stands on is its checkpoint.
                    "committed_behind": None if embedded else sum((await log.lag(name)).values()),
                    "parked": len(await list_marks(views, name)),
                    "group": await _group(log, name, position or Position(end.log, {})),
                    "building": await _building(views, projection, end),
                }
            )
        return {
            "log": str(end.log),
            "partitions": await log.partitions(),
            "end": str(end),
            "projections": projections,
            "writers": await writers(log, settings.internal_secret),
        }


async def _group(log: Log, name: str, stands: Position) -> str | None:
    """What the next projector does because of offsets that other tools have set for its group; None: nothing."""
    from services.errors import CorruptError
    from services.views.guard import folds_again

    try:
        if folds_again(name, await log.committed(name), stands, range(await log.partitions())):
            return "the group was reset to the log's start: a projector empties the view and folds it again"
    except CorruptError as error:
        return error.detail
    return None


async def _building(views: Views, projection: Projection, end: Position) -> dict[str, Any] | None:
    """The generation that is built beside the live one, or was left by a replay that ended early."""
    from services.views.generations import read_build

    async with views.reading(snapshot=True) as connection:
        build = await read_build(connection, projection)
    if build is None:
        return None
    behind = sum(end.left_behind(build.position).values())
    return {"builder": build.builder, "position": str(build.position), "behind": behind}
