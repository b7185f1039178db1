"""`doctor`: what is wrong with an installation, and what mends it. Starts nothing and changes nothing.

It looks at log, blobs and views from this machine, and asks all gateways what they see.
"""

from __future__ import annotations

import asyncio
import importlib
import shutil
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from services.cli.command import answer, common_options, invocation, run, say, say_wrapped
from services.cli.status import (
    build_note,
    certificate_notes,
    deliveries,
    endpoint,
    irregular,
    kafka_log,
    processes,
    projections,
    room_needed,
    troubles_of,
    writers,
)

if TYPE_CHECKING:
    from services.config import Settings
    from services.log.kafka import KafkaLog

_PYTHON = (3, 11)
_PATIENCE_SECONDS = 20.0
_ADDRESSES = {
    "log": "ARTIFACT_STORE_LOG_URL",
    "blobs": "ARTIFACT_STORE_BLOBS_URL",
    "views": "ARTIFACT_STORE_VIEWS_URL",
    "groups": "ARTIFACT_STORE_LOG_URL",
    "projections": "ARTIFACT_STORE_LOG_URL",
    "webhooks": "ARTIFACT_STORE_VIEWS_URL",
    "gateways": "ARTIFACT_STORE_LOG_URL",
    "partitions": "ARTIFACT_STORE_LOG_URL",
    "identity": "ARTIFACT_STORE_POLICY",
    "gateway": "ARTIFACT_STORE_URL",
}


@dataclass(slots=True)
class Finding:
    """The findings about one part of the installation: what is wrong and what mends it, and other remarks."""

    part: str
    wrong: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    away: bool = False
    """Whether the part did not answer."""

    def shown(self) -> dict[str, Any]:
        """The finding for `--json`: `cause` has everything that is wrong, or else the remarks."""
        return {"part": self.part, "ok": not self.wrong, "cause": "; ".join(self.wrong or self.remarks) or None}

    def say(self) -> None:
        """Print the finding for people: one or more lines for each thing."""
        for text in self.wrong:
            say_wrapped(text, first=f"WRONG  {self.part}: ", indent=7)
        for text in self.remarks:
            say_wrapped(text, first=f"{'       ' if self.wrong else 'ok     '}{self.part}: ", indent=7)
        if not (self.wrong or self.remarks):
            say(f"ok     {self.part}")


Look = Callable[["Settings", Finding], Awaitable[None]]
"""Examines a part and adds to the finding. An ArtifactStoreError that it raises counts as something wrong too."""


@click.command()
@common_options(shown=("log_url", "blobs_url", "views_url", "url", "internal_secret"))
def doctor() -> None:
    """Say what is wrong with the installation and what mends it.

    Looks at settings, certificates, disk, log, blobs, views, projections and their groups, and asks all gateways about
    themselves and their partitions. That needs their ARTIFACT_STORE_INTERNAL_SECRET, or a certificate like theirs. Exit
    code 1 if anything is wrong.
    """
    findings = run(_examine())
    ok = not any(finding.wrong for finding in findings)
    if invocation().as_json:
        answer({"ok": ok, "findings": [finding.shown() for finding in findings]})
    else:
        for finding in findings:
            finding.say()
    if not ok:
        click.get_current_context().exit(1)


async def _examine() -> list[Finding]:
    from artifact_store.errors import ConfigurationError
    from services.wiring import is_embedded

    findings = [_python()]
    try:
        settings = invocation().settings()
    except ConfigurationError as error:
        return [*findings, Finding("settings", [error.detail])]
    findings.append(Finding("settings"))
    _import_what_looks_need(embedded=is_embedded(settings))
    looks = (("log", _log), ("blobs", _blobs), ("views", _views), ("identity", _identity))
    parts = await asyncio.gather(*(_looked(part, look, settings) for part, look in looks))
    findings += parts
    log, views_work = parts[0], not parts[2].wrong
    further: list[Finding] = []
    if not (log.away or is_embedded(settings)):
        further += await asyncio.gather(
            _looked("partitions", _partitions, settings), _looked("gateways", _gateways, settings)
        )
    if not log.away and views_work:
        further += [await _looked("projections", _projections, settings), await _looked("groups", _groups, settings)]
    findings += [found for found in further if not found.wrong or found.wrong != log.wrong]  # said once
    if views_work and not is_embedded(settings):
        findings.append(await _looked("webhooks", _webhooks, settings))
    if settings.url is not None:
        findings.append(await _looked("gateway", _gateway, settings))
    if files := settings.certificates():
        from services.runtime.tls import all_ends

        findings.append(Finding("certificates", certificate_notes(all_ends(files)), [f"{len(files)} files"]))
    return [*findings, _disk(settings)]


def _import_what_looks_need(*, embedded: bool) -> None:
    """Import modules before the time limit of a look begins: that takes a second, or a minute on a busy machine."""
    names = ["artifact_store.documents.times", "services.identity.oidc", "services.identity.static_tokens"]
    names += ["services.blobs.open", "services.views.engine.apply", "services.views.queries"]
    names += ["services.webhooks.subscriptions"]
    names += ["services.log.sqlite"] if embedded else ["services.log.kafka", "ingest_gateway.peers.forwarding"]
    for name in names:
        importlib.import_module(name)


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < _PYTHON:
        return Finding("python", [f"{found} is too old; 3.11 or newer is needed"])
    return Finding("python", remarks=[found])


async def _looked(part: str, look: Look, settings: Settings) -> Finding:
    from artifact_store.errors import ArtifactStoreError, UnavailableError

    finding = Finding(part)
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            await look(settings, finding)
    except TimeoutError:
        finding.away = True
        finding.wrong.append(f"no answer within {_PATIENCE_SECONDS:g} s; is it running, is it reachable?")
    except UnavailableError as error:
        finding.away = True
        # A hint is not needed if a gateway names its causes, or if the message names a setting or command.
        said = error.detail
        explained = "ARTIFACT_STORE_" in said or "`artifact-store " in said or said.startswith("the gateway is ")
        hint = "" if explained else f"; is it running, and is {_ADDRESSES[part]} right?"
        finding.wrong.append(error.detail + hint)
    except ArtifactStoreError as error:
        finding.wrong.append(error.detail)
    return finding


_NOT_THERE = "not there yet; the first write creates it"


async def _log(settings: Settings, finding: Finding) -> None:
    from services.wiring import is_embedded, open_log

    finding.remarks.append(endpoint(settings.log_url))
    log = open_log(settings)
    try:
        if is_embedded(settings) and not _sqlite_file(settings.log_url).exists():
            finding.remarks.append(_NOT_THERE)
            return
        await log.check()
        finding.remarks.append(f"{await log.partitions()} partitions, id {await log.identity()}")
        if (kafka := kafka_log(log)) is not None:
            finding.remarks += await _under_replicated(kafka)
        if settings.schema_registry_url is not None:
            finding.remarks.append(await _framing(kafka))
    finally:
        await log.close()


async def _under_replicated(log: KafkaLog) -> list[str]:
    """Partitions that are served but lack a replica. Nothing fails yet, so only `doctor` reports it."""
    topic = await log.blocking(log.cluster.topic)
    if not (short := topic.under_replicated):
        return []
    which = f"partition{'' if len(short) == 1 else 's'} {', '.join(map(str, short))}"
    return [
        f"{which}: a replica is not in sync. Writes stop when fewer than min.insync.replicas are: are all brokers up?"
    ]


async def _framing(log: KafkaLog | None) -> str:
    """How the log uses the schema registry, which has passed the log's check."""
    if log is None:
        return "the schema registry is not used: it is for a Kafka log"
    if await log.blocking(log.cluster.framing) is None:
        return (
            "the schemas are registered; values stay in single-object encoding, because the topic was made without a "
            "registry"
        )
    return "the schemas are registered, and values carry their ids"


async def _partitions(settings: Settings, finding: Finding) -> None:
    from services.wiring import open_log

    log = open_log(settings)
    try:
        for writer in await writers(log, settings) or ():
            name = f"partition {writer['partition']}"
            if writer["trouble"] is not None:
                finding.wrong.append(f"{name} takes no writes: {writer['trouble']}")
            if writer["memory_only"] is not None:
                finding.wrong.append(f"{name}: {writer['memory_only']}")
            if writer["quarantined"]:
                finding.wrong.append(
                    f"{name}: {writer['quarantined']} packages take no writes, because the log contradicts their "
                    "history: `artifact-store verify` names them"
                )
            if (passed := irregular(writer)) is not None:
                finding.remarks.append(f"{name}: {passed}")
    finally:
        await log.close()


async def _gateways(settings: Settings, finding: Finding) -> None:
    from services.wiring import open_log

    log = open_log(settings)
    try:
        found = await processes(log, settings) or []
    finally:
        await log.close()
    for process in found:
        finding.wrong += [f"{process['url']}: {trouble}" for trouble in troubles_of(process)]
    if (differ := buckets_differ(found)) is not None:
        finding.wrong.append(differ)
    releases = sorted({process["release"] for process in found if process["trouble"] is None})
    finding.remarks.append(f"{len(found)} processes{', release ' if releases else ''}{' and '.join(releases)}")
    if len(releases) > 1:
        finding.remarks.append("an upgrade is not finished: until it is, adjacent releases may run together")


def buckets_differ(found: Iterable[Mapping[str, Any]]) -> str | None:
    """What is wrong if some of `processes` keep blobs in another bucket than others, and what mends it."""
    users: dict[str, list[str]] = {}
    for process in found:
        if process["bucket"] is not None:
            users.setdefault(process["bucket"], []).append(process["url"])
    if len(users) < 2:
        return None
    where = "; ".join(f"{bucket}: {', '.join(urls)}" for bucket, urls in sorted(users.items()))
    return (
        f"gateways keep blobs in {len(users)} buckets and lack each other's ({where}): give all of them the same "
        "ARTIFACT_STORE_BLOBS_URL, then copy `blobs/` and `uploads/` from the wrong bucket into the right one"
    )


async def _blobs(settings: Settings, finding: Finding) -> None:
    from artifact_store.errors import ConfigurationError
    from services.wiring import open_blobs

    finding.remarks.append(endpoint(settings.blobs_url))
    blobs = open_blobs(settings)
    try:
        if blobs.backend_id == "local" and not _local_folder(settings).exists():
            finding.remarks.append(_NOT_THERE)
            return
        await blobs.now()  # first, because the store refuses further requests if a clock is wrong
        if (trouble := blobs.clock.trouble()) is not None:
            raise ConfigurationError(trouble)
        await blobs.check()
    finally:
        await blobs.close()


async def _views(settings: Settings, finding: Finding) -> None:
    from services.wiring import open_views

    finding.remarks.append(endpoint(settings.views_url))
    if settings.views_url.startswith("sqlite") and not _sqlite_file(settings.views_url).exists():
        finding.remarks.append(_NOT_THERE)
        return
    views = open_views(settings)
    try:
        await views.check()
    finally:
        await views.close()


def _is_there(settings: Settings) -> bool:
    files = [url for url in (settings.log_url, settings.views_url) if url.startswith("sqlite")]
    return all(_sqlite_file(url).exists() for url in files)


async def _projections(settings: Settings, finding: Finding) -> None:
    """Check that the views follow this log, and that processes fold them."""
    from services.cli.command import log_and_views

    if not _is_there(settings):
        finding.remarks.append(_NOT_THERE)
        return
    async with log_and_views() as (log, views):
        found = await projections(log, views, await log.end())
    for p in found:
        name, build = p["projection"], p["building"]
        if p["trouble"] is not None:
            finding.wrong.append(f"{name}: {p['trouble']}")
        if p["parked"]:
            finding.wrong.append(f"{name}: {p['parked']} packages are parked: `artifact-store parked` says why")
        if p["projectors"] == [] and p["behind"]:
            finding.wrong.append(
                f"{name}: no process runs it, and it is {p['behind']} events behind: start "
                f"`artifact-store projector {name}`"
            )
        if build is not None:
            (finding.remarks if build["running"] else finding.wrong).append(f"{name}: {build_note(name, build)}")
        finding.remarks.append(f"{name}: {p['behind']} events behind")


async def _groups(settings: Settings, finding: Finding) -> None:
    """Check the offsets that other tools have set for projectors' groups. It is wrong if they stop a projector."""
    from artifact_store.errors import CorruptError
    from artifact_store.position import Position
    from services.cli.command import log_and_views
    from services.cli.status import group_note
    from services.views.projections import PROJECTIONS
    from services.views.queries import Queries

    if not _is_there(settings):
        finding.remarks.append("not there yet")
        return
    async with log_and_views() as (log, views):
        stands = Position(await log.identity(), {})
        for name in PROJECTIONS:
            position = await Queries(views).checkpoint(name)
            try:
                note = await group_note(log, name, position or stands)
            except CorruptError as error:
                finding.wrong.append(error.detail)
                continue
            if note is not None:
                finding.remarks.append(f"{name}: {note}")


async def _webhooks(settings: Settings, finding: Finding) -> None:
    """Check that a process delivers to subscriptions. A user without the right to read them only gets a remark."""
    from services.wiring import open_views

    views = open_views(settings)
    try:
        found = await deliveries(views)
    finally:
        await views.close()
    if found["active"] is None:
        finding.remarks.append(f"not checked: {found['trouble']}")
    elif found["trouble"] is not None:
        finding.wrong.append(found["trouble"])
    else:
        finding.remarks.append(f"{found['active']} active subscriptions")


async def _identity(settings: Settings, finding: Finding) -> None:
    """Read policy and tokens as a gateway does, and check that the keys of the policy's issuers can be fetched."""
    from artifact_store.errors import ConfigurationError
    from services.identity.oidc import Issuer
    from services.identity.policy import Policy, read_policy
    from services.identity.static_tokens import read_tokens

    if settings.policy is None and settings.tokens is None:
        finding.remarks.append("no policy and no tokens: everyone who reaches the gateway may do everything")
        return
    policy = Policy() if settings.policy is None else read_policy(settings.policy)
    tokens = [] if settings.tokens is None else list(read_tokens(settings.tokens))
    if settings.tokens is not None and settings.tokens.exists() and settings.tokens.stat().st_mode & 0o077:
        raise ConfigurationError(f"others may read or write {settings.tokens}: chmod 600 {settings.tokens}")
    if not policy.issuer and not tokens:
        raise ConfigurationError(
            "nobody can get a valid token: add an [[issuer]] to the policy, or run `artifact-store tokens create`"
        )
    for table in policy.issuer:
        async with Issuer(table) as issuer:
            await issuer.current_keys()
    finding.remarks.append(f"{len(policy.issuer)} issuers, {len(policy.rule)} rules, {len(tokens)} static tokens")


async def _gateway(settings: Settings, finding: Finding) -> None:
    from services.cli.login import open_transport, who_is

    async with open_transport(settings, seconds=5.0) as transport:
        await transport.call("GET", "/readyz")
        finding.remarks.append(f"{settings.url} takes writes; you are {(await who_is(transport)).actor}")


def _disk(settings: Settings) -> Finding:
    """Check the free space for what is written on this machine: embedded files and the writers' state."""
    folders = [settings.state_dir]
    if settings.log_url.startswith("sqlite"):
        folders.append(_sqlite_file(settings.log_url))
    if settings.blobs_url.startswith("file:"):
        with suppress(ValueError):  # an invalid address was reported before
            folders.append(_local_folder(settings))
    free = {folder: shutil.disk_usage(_nearest(folder)).free for folder in folders}
    tight = [f"the disk of {folder} {room}" for folder, left in free.items() if (room := room_needed(left)) is not None]
    return Finding("disk", tight, [f"{min(free.values()) >> 30} GiB free on this machine"])


def _sqlite_file(url: str) -> Path:
    return Path(url.partition(":///")[2].partition("?")[0])


def _local_folder(settings: Settings) -> Path:
    from urllib.parse import unquote, urlsplit

    return Path(unquote(urlsplit(settings.blobs_url).path))


def _nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
