"""`parked` and `log`: repairs for packages that a view cannot follow, and for records that stop a partition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import click

from services.cli.command import (
    ACTOR,
    LOG_AND_VIEWS,
    answer,
    common_options,
    invocation,
    known_projection,
    log_and_views,
    remark,
    run,
    say,
    table,
)
from services.cli.status import confirm

if TYPE_CHECKING:
    from artifact_store.models import Acknowledgement
    from services.log.port import Log
    from services.log.records import Confirmation
    from services.views.engine.apply import Mark


max_parked_option = click.option(
    "--max-parked",
    type=click.IntRange(0),
    metavar="N",
    help="Stop before more than N packages are parked.  [default: 100]",
)
"""For every command that folds views, and may stop because of this limit."""

_COLUMNS = ("projection", "package", "partition", "offset", "events", "cause")
_HEAD_BYTES = 32


@click.group(invoke_without_command=True)
@common_options(shown=("views_url",))
@click.pass_context
def parked(context: click.Context) -> None:
    """List parked packages: those with an event that a projection cannot read or apply. Others are not affected.

    The log keeps their waiting events. `parked show` shows more about a package. `parked retry` folds the waiting
    events once the cause is mended.
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
    """Fold the waiting events of these packages, or of all parked ones. Exit code 1 if any is parked again."""
    if not run(_retry(packages, projection)):
        click.get_current_context().exit(1)


async def _list(projection: str | None) -> None:
    async with log_and_views() as (_, views):
        from services.views.engine.apply import list_marks

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
    from artifact_store.errors import NotFoundError

    async with log_and_views() as (log, views):
        from services.views.engine.apply import list_marks

        marks = [mark for mark in await list_marks(views) if mark.package == package]
        if not marks:
            raise NotFoundError(f"{package[:80]} is not parked; `artifact-store parked` lists what is")
        shown = [{**_shown(mark), "record": await _record(log, mark)} for mark in marks]
    for number, one in enumerate(shown):
        if number and not invocation().as_json:
            say("")
        answer(one)


async def _retry(packages: Sequence[str], projection: str | None) -> bool:
    """Retry these packages. Returns whether none of them is parked any more."""
    from artifact_store.errors import NotFoundError

    whole = True
    async with log_and_views() as (log, views):
        from services.views.engine.apply import list_marks
        from services.views.engine.apply import retry as fold_again

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
    """The description of the record at which a package stopped; None if the log does not hold it."""
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
    return None if projection is None else known_projection(projection).name


@click.group()
@common_options()
def log() -> None:
    """Repair, back up, restore and copy the log.

    `skip` and `accept-loss` confirm to the running gateway what stops a partition. The other commands open the log
    themselves.
    """


def _of_one_record(command: Callable[..., None]) -> Callable[..., None]:
    """Add the arguments and options that name the record, the actor and the reason."""
    for add in (
        common_options(shown=("log_url", "internal_secret")),
        ACTOR,
        click.option("--reason", default="", help="Why you confirm it; recorded in the log."),
        click.option("--digest", required=True, metavar="HEX", help="The record's digest, as `status` shows it."),
        click.argument("offset", type=click.IntRange(0)),
        click.argument("partition", type=click.IntRange(0)),
    ):
        command = add(command)
    return command


@log.command()
@_of_one_record
def skip(partition: int, offset: int, digest: str, reason: str, actor: str | None) -> None:
    """Skip one record that is not an event, for good.

    A record that somebody else wrote to the topic stops its partition, and cannot be deleted. First find out who wrote
    it, and make sure that it holds nothing of value. The confirmation is recorded in the same partition. Every writer,
    reader and view then skips the record, and counts it. A record that is an event cannot be skipped.
    """
    from services.log.records import SkipRecord

    _confirmed(
        SkipRecord(partition, offset, _digest(digest), _acting(actor), reason, uuid4()),
        f"partition {partition} skips the record at offset {offset}",
    )


@log.command("accept-loss")
@_of_one_record
def accept_loss(partition: int, offset: int, digest: str, reason: str, actor: str | None) -> None:
    """Accept for good that the partition lost events that it had acknowledged.

    First try to bring the records back. OFFSET and --digest name the missing record, as `status` shows it. The
    acceptance is recorded in the same partition, the state that remembers the record is deleted, and writing resumes.
    """
    from services.log.records import AcceptLoss

    _confirmed(
        AcceptLoss(partition, offset, _digest(digest), _acting(actor), reason, uuid4()),
        f"partition {partition} goes on without the record that was at offset {offset}",
    )


def _acting(actor: str | None) -> str:
    from services.identity.actors import local_actor

    return actor or local_actor()


def _digest(text: str) -> bytes:
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != 32:
        raise click.BadParameter("it must have 64 hex digits", param_hint="--digest")
    return found


def _confirmed(confirmation: Confirmation, done: str) -> None:
    recorded = run(_confirm(confirmation))
    answer(
        {
            "partition": confirmation.partition,
            "offset": confirmation.offset,
            "digest": confirmation.digest.hex(),
            "sequence": recorded.sequence,
            "event_digest": recorded.event_digest.hex(),
        },
        done,
    )


async def _confirm(confirmation: Confirmation) -> Acknowledgement:
    from services.wiring import open_log

    settings = invocation().settings()
    opened = open_log(settings)
    try:
        return await confirm(opened, settings, confirmation)
    finally:
        await opened.close()
