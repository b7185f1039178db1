"""`log`: what an operator has to confirm about the log of record before anybody passes over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING
from uuid import uuid4

import click

from services.cli.output import answer
from services.cli.root import run
from services.cli.settings import common_options, invocation
from services.cli.writers import confirm

if TYPE_CHECKING:
    from services.core.commands import Acknowledgement
    from services.log.records import Confirmation


@click.group()
@common_options()
def log() -> None:
    """Confirm what stops a partition of the log, through the running gateway that writes to it."""


def _of_one_record(command: Callable[..., None]) -> Callable[..., None]:
    """What names the record, and who says so why."""
    for add in (
        common_options(shown=("log_url", "internal_secret")),
        click.option("--actor", default="anonymous", show_default=True, help="Who does it."),
        click.option("--reason", default="", help="Why; recorded with it."),
        click.option("--digest", required=True, metavar="HEX", help="The record's digest, as `status` shows it."),
        click.argument("offset", type=click.IntRange(0)),
        click.argument("partition", type=click.IntRange(0)),
    ):
        command = add(command)
    return command


@log.command()
@_of_one_record
def skip(partition: int, offset: int, digest: str, reason: str, actor: str) -> None:
    """Pass over one record that is no event, for good.

    A record that somebody else wrote to the topic, and that cannot be deleted, stops its partition. Find out who wrote
    it, and that nothing of value is in it. The confirmation is recorded in the same partition; every writer, reader and
    view then passes over the record and counts it. A record that is an event is refused.
    """
    from services.log.records import SkipRecord

    _record(
        SkipRecord(partition, offset, _digest(digest), actor, reason, uuid4()),
        f"partition {partition} passes over the record at offset {offset}",
    )


@log.command("accept-loss")
@_of_one_record
def accept_loss(partition: int, offset: int, digest: str, reason: str, actor: str) -> None:
    """Go on without events that the partition lost after it had acknowledged them, for good.

    OFFSET and --digest name the record that is missing, as `status` shows it. First try to bring the records back. The
    acceptance is recorded in the same partition, the state that remembers the record is deleted, and writing goes on.
    """
    from services.log.records import AcceptLoss

    _record(
        AcceptLoss(partition, offset, _digest(digest), actor, reason, uuid4()),
        f"partition {partition} goes on without the record that was at offset {offset}",
    )


def _digest(text: str) -> bytes:
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != 32:
        raise click.BadParameter("it has 64 hex digits", param_hint="--digest")
    return found


def _record(confirmation: Confirmation, done: str) -> None:
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
        return await confirm(opened, settings.internal_secret, confirmation)
    finally:
        await opened.close()
