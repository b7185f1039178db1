"""`status`: how far the views are, who writes to each partition, and what holds it up.

The group of writers says who owns a partition; each owner says itself since when and how it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from artifact_store.errors import ArtifactStoreError, ConfigurationError, PushBackError, UnavailableError
from services.cli.command import LOG_AND_VIEWS, answer, common_options, invocation, log_and_views, run, say, table

if TYPE_CHECKING:
    from artifact_store.models import Acknowledgement
    from artifact_store.position import Position
    from services.config import Settings
    from services.log.kafka.cluster import Member
    from services.log.port import Log, PartitionStatus
    from services.log.records import Confirmation
    from services.views.database import Views
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
    say(f"log {found['log']}, {found['partitions']} partitions")
    columns = ("projection", "behind", "parked")
    table(("projection", "events behind", "packages parked"), [[p[c] for c in columns] for p in found["projections"]])
    for p in found["projections"]:
        if p["group"] is not None:
            say(f"{p['projection']}: {p['group']}")
        if (build := p["building"]) is not None:
            say(f"{p['projection']} is built anew by {build['builder']}, {build['behind']} events behind")
    if found["writers"] is None:
        say("the log is a file: whoever writes holds its lock")
    else:
        table(COLUMNS, [row(writer) for writer in found["writers"]])
        for writer in found["writers"]:
            if (irregular := passed_over(writer)) is not None:
                say(irregular)


async def _status() -> dict[str, Any]:
    from artifact_store.position import Position
    from services.views.engine.parking import list_marks
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
            "writers": await writers(log, settings),
        }


async def _group(log: Log, name: str, stands: Position) -> str | None:
    """As `group_note`, with what stops the projector as a text like any other."""
    from artifact_store.errors import CorruptError

    try:
        return await group_note(log, name, stands)
    except CorruptError as error:
        return error.detail


async def group_note(log: Log, name: str, stands: Position) -> str | None:
    """What the next projector does because other tools have reset its group to the log's start; None: nothing.

    Raises CorruptError: they have set it to another offset, which stops the projector.
    """
    from services.views.engine.checkpoints import folds_again

    if folds_again(name, await log.committed(name), stands, range(await log.partitions())):
        return "the group was reset to the log's start: a projector empties the view and folds it again"
    return None


async def _building(views: Views, projection: Projection, end: Position) -> dict[str, Any] | None:
    """The generation that is built beside the live one, or was left by a replay that ended early."""
    from services.views.engine.generations import read_build

    async with views.reading(snapshot=True) as connection:
        build = await read_build(connection, projection)
    if build is None:
        return None
    behind = sum(end.left_behind(build.position).values())
    return {"builder": build.builder, "position": str(build.position), "behind": behind}


COLUMNS = ("partition", "writer", "since", "taken over in s", "state from", "waiting", "trouble")

_ANSWER_SECONDS = 3.0
_SETTLED_SECONDS = 5.0
_AGAIN_SECONDS = 0.2
_CONFIRM_SECONDS = 15.0


async def writers(log: Log, settings: Settings) -> list[dict[str, Any]] | None:
    """One object a partition; None for a log that is a file. The owners are asked with the credentials of `settings`.

    Of a partition whose owner does not answer `trouble` says why. Raises UnavailableError: Kafka cannot be asked.
    """
    if type(log).__name__ != "KafkaLog":  # importing it to ask would load librdkafka for a file
        return None
    from services.log.kafka import KafkaLog

    if not isinstance(log, KafkaLog):
        return None
    owners = {partition: member.client_id for member in await _members(log) for partition in member.partitions}
    told = await _told({url for url in owners.values() if url.startswith("http")}, settings)
    return [_shown(_asked_owner(p, owners.get(p), told)) for p in range(await log.partitions())]


async def confirm(log: Log, settings: Settings, confirmation: Confirmation) -> Acknowledgement:
    """Have the gateway that writes to the partition record what an operator confirmed; blocks until it is recorded.

    Raises ConfigurationError: the log is a file. UnavailableError: no gateway writes to the partition, or it gives no
    answer; whether it was recorded is unknown then, and confirming it again is safe. Otherwise as
    `KafkaWriter.confirm_here`.
    """
    from ingest_gateway.peers.authentication import PeerCredentials
    from ingest_gateway.peers.forwarding import HttpForwarder
    from services.log.port import PartitionNotOwnedError

    if type(log).__name__ != "KafkaLog":
        raise ConfigurationError("the embedded log is a file that nobody else writes to: restore it from a copy")
    deadline = asyncio.get_running_loop().time() + _CONFIRM_SECONDS
    async with HttpForwarder(PeerCredentials.of(settings)) as forwarder:
        while True:
            owners = {p: member.client_id for member in await _members(log) for p in member.partitions}
            owner = owners.get(confirmation.partition, "")
            trouble: ArtifactStoreError = UnavailableError(
                f"no gateway that can be asked writes to partition {confirmation.partition}: start one, then try again"
            )
            if owner.startswith("http"):
                try:
                    return await forwarder.confirm(owner, confirmation)
                except (PartitionNotOwnedError, PushBackError) as error:
                    trouble = error
            if asyncio.get_running_loop().time() > deadline:
                raise trouble
            await asyncio.sleep(_AGAIN_SECONDS)


def passed_over(writer: Mapping[str, Any]) -> str | None:
    """What the partition holds that is passed over, of one of `writers`; None when there is no such record."""
    if not any(writer[name] for name in ("skipped", "repeated", "quarantined")):
        return None
    text = "partition {partition}: {skipped} records skipped, {repeated} repeated, {quarantined} packages quarantined"
    return text.format(**writer)


def row(writer: Mapping[str, Any]) -> tuple[object, ...]:
    """One of `writers` under COLUMNS."""
    names = ("partition", "owner", "since", "takeover_seconds", "restored_from", "waiting")
    return (*(writer[name] for name in names), writer["trouble"] or writer["memory_only"])


def _shown(status: PartitionStatus) -> dict[str, Any]:
    from artifact_store.documents.times import to_text

    took = status.takeover_seconds
    return {
        "partition": status.partition,
        "owner": status.owner,
        "since": None if status.since is None else to_text(status.since),
        "takeover_seconds": None if took is None else round(took, 3),
        "restored_from": status.restored_from,
        "waiting": status.waiting,
        "trouble": status.trouble,
        "memory_only": status.memory_only,
        "bad_record": None if status.bad_offset is None else {"offset": status.bad_offset, "digest": status.bad_digest},
        "lost_record": None
        if status.lost_offset is None
        else {"offset": status.lost_offset, "digest": status.lost_digest},
        "skipped": status.skipped,
        "repeated": status.repeated,
        "quarantined": status.quarantined,
    }


async def _members(log: Any) -> list[Member]:
    """The members of the group of writers, once it is not between two assignments; none if it stays so."""
    kafka, cluster = log.kafka, log.cluster
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _SETTLED_SECONDS
    while True:
        members: list[Member] | None = await log.blocking(lambda: cluster.members(kafka.writers_group))
        if members is not None or loop.time() > deadline:
            return members or []
        await asyncio.sleep(_AGAIN_SECONDS)


async def _told(urls: set[str], settings: Settings) -> dict[str, Sequence[PartitionStatus] | str]:
    """By owner, what it says of its partitions, or why it says nothing."""
    from ingest_gateway.peers.authentication import PeerCredentials
    from ingest_gateway.peers.forwarding import HttpForwarder

    async with HttpForwarder(PeerCredentials.of(settings)) as forwarder:

        async def ask(url: str) -> Sequence[PartitionStatus] | str:
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    return await forwarder.status(url)
            except TimeoutError:
                return f"its owner gave no answer within {_ANSWER_SECONDS:g} s"
            except UnavailableError as error:
                return error.detail

        return dict(zip(urls, await asyncio.gather(*(ask(url) for url in urls)), strict=True))


def _asked_owner(
    partition: int, owner: str | None, told: Mapping[str, Sequence[PartitionStatus] | str]
) -> PartitionStatus:
    from services.log.port import PartitionStatus

    if owner is None:
        return PartitionStatus(partition, None, trouble="no process writes to it")
    said = told.get(owner, "its owner has no address to ask")
    if isinstance(said, str):
        return PartitionStatus(partition, owner, trouble=said)
    known = next((found for found in said if found.partition == partition), None)
    return known or PartitionStatus(partition, owner, trouble="its owner has not begun to write to it")
