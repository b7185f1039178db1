"""`parked`: packages that a projection could not follow; which, why, and bringing them back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from services.cli.opening import LOG_AND_VIEWS, log_and_views
from services.cli.output import answer, raw, remark, table
from services.cli.root import run
from services.cli.settings import common_options, invocation

if TYPE_CHECKING:
    from services.log.port import Log
    from services.views.parked import Mark

max_parked_option = click.option(
    "--max-parked",
    type=click.IntRange(0),
    metavar="N",
    help="Stop when more packages than this would be parked.  [default: 100]",
)
"""For every command that folds views and may stop by it."""

_COLUMNS = ("projection", "package", "partition", "offset", "events", "cause")
_HEAD_BYTES = 32


@click.group(invoke_without_command=True)
@common_options(shown=("views_url",))
@click.pass_context
def parked(context: click.Context) -> None:
    """List parked packages: those with an event that a projection cannot read or apply. The others go on.

    The log keeps what waits. `parked show` tells more of a package, `parked retry` folds what waits once the cause is
    mended.
    """
    if context.invoked_subcommand is None:
        run(_list(None))


@parked.command(name="list")
@click.argument("projection", required=False)
@common_options(shown=("views_url",))
def list_(projection: str | None) -> None:
    """List parked packages, of one projection or of all."""
    run(_list(projection))


@parked.command()
@click.argument("package")
@common_options(shown=LOG_AND_VIEWS)
def show(package: str) -> None:
    """Show where a package is parked, and the record that it stopped at."""
    run(_show(package))


@parked.command()
@click.argument("packages", metavar="[PACKAGE]...", nargs=-1)
@click.option("--projection", help="Only in this projection.")
@common_options(shown=LOG_AND_VIEWS)
def retry(packages: Sequence[str], projection: str | None) -> None:
    """Fold what waits of these packages (of all without one). Exit code 1 if any is parked again."""
    if not run(_retry(packages, projection)):
        click.get_current_context().exit(1)


async def _list(projection: str | None) -> None:
    async with log_and_views() as (_, views):
        from services.views.parked import list_marks

        await views.check()
        marks = await list_marks(views, _known(projection))
    if invocation().as_json:
        for mark in marks:
            answer(_shown(mark))
    elif marks:
        table(_COLUMNS, [[getattr(mark, column) for column in _COLUMNS] for mark in marks])
    else:
        remark("no package is parked")


async def _show(package: str) -> None:
    from services.errors import NotFoundError

    async with log_and_views() as (log, views):
        from services.views.parked import list_marks

        marks = [mark for mark in await list_marks(views) if mark.package == package]
        if not marks:
            raise NotFoundError(f"{package[:80]} is not parked; `artifact-store parked` lists what is")
        shown = [{**_shown(mark), "record": await _record(log, mark)} for mark in marks]
    for number, one in enumerate(shown):
        if number and not invocation().as_json:
            raw(b"")
        answer(one)


async def _retry(packages: Sequence[str], projection: str | None) -> bool:
    """Whether nothing is parked any more of what was meant."""
    from services.errors import NotFoundError

    whole = True
    async with log_and_views() as (log, views):
        from services.views.parked import list_marks
        from services.views.retry import retry as fold_again

        marks = await list_marks(views, _known(projection))
        if unknown := set(packages) - {mark.package for mark in marks}:
            raise NotFoundError(f"{min(unknown)[:80]} is not parked; `artifact-store parked` lists what is")
        wanted = [mark for mark in marks if not packages or mark.package in packages]
        if not wanted:
            remark("no package is parked")
        for mark in wanted:
            done = await fold_again(views, log, mark)
            whole = whole and done.mark is None
            answer(
                {
                    "projection": done.projection,
                    "package": done.package,
                    "events": done.events,
                    "parked": None if done.mark is None else _shown(done.mark),
                }
            )
    return whole


async def _record(log: Log, mark: Mark) -> dict[str, Any] | None:
    """What is to be told of the record that a package stopped at; None when the log does not hold it."""
    from schemas.codec import UndecodableEventError, decode

    async for batch in log.scan({mark.partition: mark.offset}, {mark.partition: mark.offset + 1}):
        for record in batch.records:
            found: dict[str, Any] = {
                "key": record.key[:_HEAD_BYTES].decode("ascii", "backslashreplace"),
                "bytes": len(record.value),
                "begins": record.value[:_HEAD_BYTES].hex(),
            }
            try:
                event = decode(record.value)
            except UndecodableEventError:
                return {**found, "type": None, "sequence": None}
            return {**found, "type": event.event_type, "sequence": event.sequence}
    return None


def _shown(mark: Mark) -> dict[str, Any]:
    found = {column: getattr(mark, column) for column in (*_COLUMNS[:2], "package_id", *_COLUMNS[2:])}
    return {**found, "package_id": None if mark.package_id is None else str(mark.package_id)}


def _known(projection: str | None) -> str | None:
    from services.cli.addressing import known_projection

    return None if projection is None else known_projection(projection).name
