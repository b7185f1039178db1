"""`status`: the progress of the views, the running processes, and the writer of each partition with its troubles.

The groups know who owns a partition and who runs a projection; each gateway reports its own health.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from artifact_store.errors import ArtifactStoreError, ConfigurationError, PushBackError, UnavailableError
from services.cli.command import (
    LOG_AND_VIEWS,
    answer,
    common_options,
    invocation,
    log_and_views,
    run,
    say,
    say_wrapped,
    table,
)

if TYPE_CHECKING:
    from artifact_store.models import Acknowledgement
    from artifact_store.position import Position
    from ingest_gateway.peers.forwarding import ProcessStatus
    from services.config import Settings
    from services.log.kafka import KafkaLog
    from services.log.kafka.cluster import Member
    from services.log.port import Log, PartitionStatus
    from services.log.records import Confirmation
    from services.views.database import Views
    from services.views.projections import Projection

_Told = TypeVar("_Told")


@click.command()
@common_options(shown=(*LOG_AND_VIEWS, "internal_secret"))
def status() -> None:
    """Show how far each projection is behind the log, which processes run, and who writes to which partition.

    Each gateway is asked at its internal listener for its health and, for each partition that it owns, since when, how
    long the take-over took, and whether the writer's state came from the `file`, a `snapshot` or the `log`. This needs
    the gateways' ARTIFACT_STORE_INTERNAL_SECRET, or a certificate like theirs.
    """
    found = run(_status())
    if invocation().as_json:
        answer(found)
        return
    where = found["endpoints"]
    say(f"log    {where['log']}\n       {found['partitions']} partitions, id {found['log']}")
    say(f"blobs  {where['blobs']}\nviews  {where['views']}\n")
    if found["views_trouble"] is None:
        _say_projections(found["projections"])
    else:
        say_wrapped(found["views_trouble"], first="views: ", indent=2)
    if found["writers"] is None:
        say("\nthe log is a file: a writer holds its lock")
        return
    if (delivered := found["webhooks"]) is not None and (delivered["active"] or delivered["trouble"]):
        say("")
        say_wrapped(delivered["trouble"] or f"{delivered['active']} active subscriptions", first="webhooks: ", indent=2)
    say("")
    table(("gateway", "release", "clock skew", "disk"), map(_process_row, found["processes"]), headed=True)
    for process in found["processes"]:
        for trouble in troubles_of(process):
            say_wrapped(trouble, first=f"{process['url']}: ", indent=2)
    say("")
    table(COLUMNS, [row(writer) for writer in found["writers"]], headed=True)
    for writer in found["writers"]:
        _say_writer(writer)


def _say_projections(projections: Sequence[Mapping[str, Any]]) -> None:
    columns = ("projection", "behind", "parked")
    rows = [[*(p[c] for c in columns), _counted(p["projectors"])] for p in projections]
    table(("projection", "events behind", "packages parked", "projectors"), rows, headed=True)
    for p in projections:
        build = p["building"]
        for note in (p["trouble"], p["group"], None if build is None else build_note(p["projection"], build)):
            if note is not None:
                say_wrapped(note, first=f"{p['projection']}: ", indent=2)


def _counted(releases: Sequence[str] | None) -> str | None:
    """The number of processes of each release."""
    if releases is None:
        return None
    return ", ".join(f"{number} of {release}" for release, number in sorted(Counter(releases).items())) or "none"


def _process_row(process: Mapping[str, Any]) -> tuple[object, ...]:
    skew, free = process["clock_skew_seconds"], process["state_free_bytes"]
    return (
        process["url"],
        process["release"],
        None if skew is None else f"{skew:+.0f} s",
        None if free is None else f"{free / 2**30:,.1f} GiB free",
    )


def _say_writer(writer: Mapping[str, Any]) -> None:
    for note in (writer["trouble"], writer["memory_only"], irregular(writer)):
        if note is not None:
            say_wrapped(note, first=f"partition {writer['partition']}: ", indent=2)


async def _status() -> dict[str, Any]:
    settings = invocation().settings()
    async with log_and_views() as (log, views):
        end, trouble = await log.end(), None
        try:
            found = await projections(log, views, end)
        except (UnavailableError, ConfigurationError) as error:  # the writers are known without the views
            found, trouble = [], error.detail
        told = await asyncio.gather(processes(log, settings), writers(log, settings))
        delivered = None if told[1] is None or trouble is not None else await deliveries(views)
        return {
            "endpoints": endpoints(settings),
            "log": str(end.log),
            "partitions": await log.partitions(),
            "end": str(end),
            "projections": found,
            "views_trouble": trouble,
            "webhooks": delivered,
            "processes": told[0],
            "writers": told[1],
        }


def endpoints(settings: Settings) -> dict[str, str]:
    """Where log, blobs and views are, without users and passwords."""
    return {name: endpoint(getattr(settings, f"{name}_url")) for name in ("log", "blobs", "views")}


def endpoint(url: str) -> str:
    """The URL without user, password and options."""
    scheme, mark, rest = url.partition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2].partition('?')[0]}"


async def projections(log: Log, views: Views, end: Position) -> list[dict[str, Any]]:
    """One object for each projection: how far it is behind `end`, who runs it, and what is wrong with it."""
    from artifact_store.position import Position
    from services.views.engine.apply import list_marks
    from services.views.projections import PROJECTIONS
    from services.views.queries import Queries

    found, kafka = [], kafka_log(log)
    for name, projection in PROJECTIONS.items():
        position = await Queries(views).checkpoint(name)
        found.append(
            {
                "projection": name,
                "position": None if position is None else str(position),
                "behind": sum(end.left_behind(position).values()),
                # Readers of a log in a file commit nothing: only the view's checkpoint says how far it is.
                "committed_behind": None if kafka is None else sum((await log.lag(name)).values()),
                "parked": len(await list_marks(views, name)),
                # The releases of the processes that run it.
                "projectors": None if kafka is None else await _projectors(kafka, name),
                "trouble": await _trouble(log, views, projection),
                "group": await _group(log, name, position or Position(end.log, {})),
                "building": await _building(views, projection, end),
            }
        )
    return found


async def deliveries(views: Views) -> dict[str, Any]:
    """How many subscriptions are active, and what is wrong if nobody delivers to them.

    Waits for a heartbeat of the delivering process: normally 2 s, and at most 10 s, after which it counts as gone.
    """
    from services.webhooks.subscriptions import Heartbeat, Subscriptions

    store, heartbeat = Subscriptions(views), Heartbeat()
    try:
        active, first = await store.active(), await store.beat()
        found = first
        while active and not (lapsed := heartbeat.has_lapsed(found)) and found == first:
            await asyncio.sleep(_AGAIN_SECONDS)
            found = await store.beat()
    except ConfigurationError as error:  # the database user may not read them
        return {"active": None, "trouble": error.detail}
    nobody = f"no process delivers to {active} active subscriptions: start `artifact-store webhooks`"
    return {"active": active, "trouble": nobody if active and lapsed else None}


async def _projectors(log: KafkaLog, name: str) -> list[str]:
    """The releases of the processes that run the projection; `unknown` for a process that does not report it."""
    from services.log.kafka.connection import release_of

    return [release_of(m.client_id) or "unknown" for m in await _members(log, log.kafka.projector_group(name))]


async def _trouble(log: Log, views: Views, projection: Projection) -> str | None:
    """Why the view cannot continue from this log; None if it can."""
    from artifact_store.errors import CorruptError
    from services.views.engine.checkpoints import check_follows

    try:
        await check_follows(log, views, projection)
    except (ConfigurationError, CorruptError) as error:
        return error.detail
    return None


async def _group(log: Log, name: str, stands: Position) -> str | None:
    """As `group_note`, but returns the text of the CorruptError instead of raising it."""
    from artifact_store.errors import CorruptError

    try:
        return await group_note(log, name, stands)
    except CorruptError as error:
        return error.detail


async def group_note(log: Log, name: str, stands: Position) -> str | None:
    """What the next projector does if other tools have reset its group to the log's start; None if they have not.

    Raises CorruptError: they have set it to another offset, which stops the projector.
    """
    from services.views.engine.checkpoints import folds_again

    if folds_again(name, await log.committed(name), stands, range(await log.partitions())):
        return "the group was reset to the log's start: a projector empties the view and folds it again"
    return None


async def _building(views: Views, projection: Projection, end: Position) -> dict[str, Any] | None:
    """The build beside the live generation, which a replay is working on, or has left by ending early."""
    from services.views.engine.generations import is_being_built, read_build

    async with views.reading(snapshot=True) as connection:
        build = await read_build(connection, projection)
    if build is None:
        return None
    return {
        "builder": build.builder,
        "position": str(build.position),
        "behind": sum(end.left_behind(build.position).values()),
        "running": await is_being_built(views, projection),
    }


def build_note(name: str, build: Mapping[str, Any]) -> str:
    """The description of a build, for people."""
    if build["running"]:
        return f"a replay by {build['builder']} is running, {build['behind']} events behind"
    return (
        f"a replay by {build['builder']} ended early, {build['behind']} events behind: `artifact-store replay {name}` "
        f"continues it, `artifact-store replay {name} --drop` removes what it has built"
    )


COLUMNS = ("partition", "writer", "since", "taken over in s", "state from", "waiting")

_ANSWER_SECONDS = 5.0
"""How long a gateway may take to answer: it gives each of its components 3 s."""

_SETTLED_SECONDS = 5.0
_AGAIN_SECONDS = 0.2
_CONFIRM_SECONDS = 15.0


def kafka_log(log: Log) -> KafkaLog | None:
    """The log as that of Kafka; None if it is a file."""
    if type(log).__name__ != "KafkaLog":  # importing it to ask would load librdkafka for a file
        return None
    from services.log.kafka import KafkaLog

    return log if isinstance(log, KafkaLog) else None


async def writers(log: Log, settings: Settings) -> list[dict[str, Any]] | None:
    """One object for each partition; None if the log is a file. Asks the owners with the credentials of `settings`.

    If an owner does not answer, `trouble` says why. Raises UnavailableError: Kafka cannot be asked.
    """
    if (kafka := kafka_log(log)) is None:
        return None
    owners = {p: member.client_id for member in await _gateways(kafka) for p in member.partitions}
    told = await _told(owners.values(), settings, lambda forwarder, url: forwarder.status(url))
    return [_shown(_asked_owner(p, owners.get(p), told)) for p in range(await log.partitions())]


async def processes(log: Log, settings: Settings) -> list[dict[str, Any]] | None:
    """One object for each gateway process: its release, and what it reports about itself. Otherwise as `writers`."""
    if (kafka := kafka_log(log)) is None:
        return None
    members = [*await _gateways(kafka), *await _members(kafka, kafka.kafka.aside_group)]
    urls = sorted({member.client_id for member in members})
    told = await _told(urls, settings, lambda forwarder, url: forwarder.process(url))
    return [_process_shown(url, told.get(url, "its address is not known")) for url in urls]


def _process_shown(url: str, told: ProcessStatus | str | None) -> dict[str, Any]:
    from dataclasses import asdict

    from ingest_gateway.peers.forwarding import ProcessStatus

    if isinstance(told, ProcessStatus):
        return {"url": url, **asdict(told), "trouble": None}
    nothing = ProcessStatus("unknown", {}, None, None, {})
    return {"url": url, **asdict(nothing), "trouble": told or "its release does not report its health: upgrade it"}


_SKEW_SECONDS = 5.0
_LEAST_FREE_BYTES = 1 << 30
_CERTIFICATE_DAYS = 14


def troubles_of(process: Mapping[str, Any]) -> list[str]:
    """What is wrong with one of `processes`, according to its report."""
    found = [] if process["trouble"] is None else [process["trouble"]]
    found += [f"{name}: {cause}" for name, cause in process["components"].items() if cause is not None]
    if abs(skew := process["clock_skew_seconds"] or 0.0) > _SKEW_SECONDS:
        found.append(
            f"its clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the blob store's: set the one that "
            "is wrong, best by NTP on both"
        )
    if (room := room_needed(process["state_free_bytes"])) is not None:
        found.append(f"the disk of ARTIFACT_STORE_STATE_DIR {room}")
    return [*found, *certificate_notes(process["certificates"])]


def room_needed(free_bytes: int | None) -> str | None:
    """What is wrong with a disk that has this much free space; None if it is enough."""
    if free_bytes is None or free_bytes >= _LEAST_FREE_BYTES:
        return None
    return f"has {free_bytes >> 20} MiB free: make room for at least 1 GiB"


def certificate_notes(ends: Mapping[str, float]) -> list[str]:
    """Notes on certificates that have expired or soon will; `ends` are expiry times by setting, in s since 1970."""
    from artifact_store.documents.times import to_text

    found = []
    for setting, end in ends.items():
        left = (end - time.time()) / 86_400
        if not end:
            found.append(f"the file of {setting} cannot be read or holds no certificate")
        elif left < _CERTIFICATE_DAYS:
            when = f"ended at {to_text(int(end * 1e6))}" if left <= 0 else f"ends in {left:.0f} days"
            found.append(f"the certificate in {setting} {when}: put a new one into the file, no restart is needed")
    return found


async def confirm(log: Log, settings: Settings, confirmation: Confirmation) -> Acknowledgement:
    """Ask the gateway that writes to the partition to record an operator's confirmation; blocks until it is recorded.

    Raises ConfigurationError: the log is a file. UnavailableError: no gateway writes to the partition, or it does not
    answer; the confirmation may be recorded then, and repeating it is safe. Otherwise as `KafkaWriter.confirm_here`.
    """
    from ingest_gateway.peers.authentication import PeerCredentials
    from ingest_gateway.peers.forwarding import HttpForwarder
    from services.log.port import PartitionNotOwnedError

    if (kafka := kafka_log(log)) is None:
        raise ConfigurationError("the embedded log is a file that nobody else writes to: restore it from a copy")
    deadline = asyncio.get_running_loop().time() + _CONFIRM_SECONDS
    async with HttpForwarder(PeerCredentials.of(settings)) as forwarder:
        while True:
            owners = {p: member.client_id for member in await _gateways(kafka) for p in member.partitions}
            owner = owners.get(confirmation.partition, "")
            trouble: ArtifactStoreError = UnavailableError(
                f"no reachable gateway writes to partition {confirmation.partition}: start one, then try again"
            )
            if owner.startswith("http"):
                try:
                    return await forwarder.confirm(owner, confirmation)
                except (PartitionNotOwnedError, PushBackError) as error:
                    trouble = error
            if asyncio.get_running_loop().time() > deadline:
                raise trouble
            await asyncio.sleep(_AGAIN_SECONDS)


def irregular(writer: Mapping[str, Any]) -> str | None:
    """How many records of this partition are passed over, and packages quarantined; None if there are none."""
    if not any(writer[name] for name in ("skipped", "repeated", "quarantined")):
        return None
    return "{skipped} records skipped, {repeated} repeated, {quarantined} packages quarantined".format(**writer)


def row(writer: Mapping[str, Any]) -> tuple[object, ...]:
    """One of `writers` under COLUMNS."""
    since = None if writer["since"] is None else f"{writer['since'][:19]}Z"
    names = ("takeover_seconds", "restored_from", "waiting")
    return (writer["partition"], writer["owner"], since, *(writer[name] for name in names))


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


async def _gateways(log: KafkaLog) -> list[Member]:
    return await _members(log, log.kafka.writers_group)


async def _members(log: KafkaLog, group: str) -> list[Member]:
    """The members of a group, after waiting for a rebalance to end; empty if it does not."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _SETTLED_SECONDS
    while True:
        members = await log.blocking(lambda: log.cluster.members(group))
        if members is not None or loop.time() > deadline:
            return members or []
        await asyncio.sleep(_AGAIN_SECONDS)


async def _told(
    urls: Iterable[str], settings: Settings, question: Callable[[Any, str], Awaitable[_Told]]
) -> dict[str, _Told | str]:
    """The answers of gateways to a forwarder's question, by URL; for a gateway without an answer, the reason."""
    from ingest_gateway.peers.authentication import PeerCredentials
    from ingest_gateway.peers.forwarding import HttpForwarder

    async with HttpForwarder(PeerCredentials.of(settings)) as forwarder:

        async def ask(url: str) -> _Told | str:
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    return await question(forwarder, url)
            except TimeoutError:
                return f"the gateway gave no answer within {_ANSWER_SECONDS:g} s"
            except UnavailableError as error:
                return error.detail

        asked = sorted({url for url in urls if url.startswith("http")})
        return dict(zip(asked, await asyncio.gather(*map(ask, asked)), strict=True))


def _asked_owner(
    partition: int, owner: str | None, told: Mapping[str, Sequence[PartitionStatus] | str]
) -> PartitionStatus:
    from services.log.port import PartitionStatus

    if owner is None:
        return PartitionStatus(partition, None, trouble="no process writes to it")
    said = told.get(owner, "the address of its owner is not known")
    if isinstance(said, str):
        return PartitionStatus(partition, owner, trouble=said)
    known = next((found for found in said if found.partition == partition), None)
    return known or PartitionStatus(partition, owner, trouble="its owner has not begun to write to it")
