"""`log`: what an operator has to confirm about the log of record before anybody passes over it."""

from __future__ import annotations

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


@log.command()
@click.argument("partition", type=click.IntRange(0))
@click.argument("offset", type=click.IntRange(0))
@click.option("--digest", required=True, metavar="HEX", help="The record's digest, as `status` and `verify` show it.")
@click.option("--reason", default="", help="Why; recorded with it.")
@click.option("--actor", default="anonymous", show_default=True, help="Who does it.")
@common_options(shown=("log_url", "internal_secret"))
def skip(partition: int, offset: int, digest: str, reason: str, actor: str) -> None:
    """Pass over one record that is no event, for good.

    A record that somebody else wrote to the topic, and that cannot be deleted, stops its partition. Find out who wrote
    it, and that nothing of value is in it. The confirmation is recorded in the same partition; every writer, reader and
    view then passes over the record and counts it. A record that is an event is refused.
    """
    from services.log.records import SkipRecord

    try:
        found = bytes.fromhex(digest)
    except ValueError:
        found = b""
    if len(found) != 32:
        raise click.BadParameter("it has 64 hex digits", param_hint="--digest")
    recorded = run(_confirm(SkipRecord(partition, offset, found, actor, reason, uuid4())))
    answer(
        {
            "partition": partition,
            "offset": offset,
            "digest": digest.lower(),
            "sequence": recorded.sequence,
            "event_digest": recorded.event_digest.hex(),
        },
        f"partition {partition} passes over the record at offset {offset}",
    )


async def _confirm(confirmation: Confirmation) -> Acknowledgement:
    from services.wiring import open_log

    settings = invocation().settings()
    opened = open_log(settings)
    try:
        return await confirm(opened, settings.internal_secret, confirmation)
    finally:
        await opened.close()
