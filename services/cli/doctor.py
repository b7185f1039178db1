"""`doctor`: what is wrong with this set-up, and what mends it. Starts nothing and changes nothing."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from services.cli.command import answer, common_options, invocation, run, say

if TYPE_CHECKING:
    from services.config import Settings
    from services.views.database import Views

_PYTHON = (3, 11)
_PATIENCE_SECONDS = 20.0
_LEAST_FREE_BYTES = 1 << 30
_ADDRESSES = {
    "log": "ARTIFACT_STORE_LOG_URL",
    "blobs": "ARTIFACT_STORE_BLOBS_URL",
    "views": "ARTIFACT_STORE_VIEWS_URL",
    "groups": "ARTIFACT_STORE_LOG_URL",
    "identity": "ARTIFACT_STORE_POLICY",
    "gateway": "ARTIFACT_STORE_URL",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `cause` says what is wrong and what mends it."""

    part: str
    ok: bool
    cause: str | None = None


@click.command()
@common_options(shown=("log_url", "blobs_url", "views_url", "url"))
def doctor() -> None:
    """Look at settings, log, blobs, views, groups and disk; say what is wrong and what mends it.

    Exit code 1 if anything is wrong.
    """
    findings = run(_examine())
    if invocation().as_json:
        answer({"ok": all(f.ok for f in findings), "findings": [asdict(f) for f in findings]})
    else:
        for finding in findings:
            say(f"{'ok   ' if finding.ok else 'WRONG'}  {finding.part}{_said(finding)}")
    if not all(finding.ok for finding in findings):
        click.get_current_context().exit(1)


def _said(finding: Finding) -> str:
    return "" if finding.cause is None else f": {finding.cause}"


async def _examine() -> list[Finding]:
    from artifact_store.errors import ConfigurationError

    findings = [_python()]
    try:
        settings = invocation().settings()
    except ConfigurationError as error:
        return [*findings, Finding("settings", ok=False, cause=error.detail)]
    findings.append(Finding("settings", ok=True))
    findings += await asyncio.gather(
        _looked("log", lambda: _log(settings)),
        _looked("blobs", lambda: _blobs(settings)),
        _looked("views", lambda: _views(settings)),
        _looked("identity", lambda: _identity(settings)),
    )
    if all(finding.ok for finding in findings):  # without log or views there is nothing to compare
        findings.append(await _looked("groups", lambda: _groups(settings)))
    if settings.url is not None:
        findings.append(await _looked("gateway", lambda: _gateway(settings)))
    return [*findings, _disk(settings)]


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < _PYTHON:
        return Finding("python", ok=False, cause=f"{found} is too old; 3.11 or newer is needed")
    return Finding("python", ok=True, cause=found)


async def _looked(part: str, look: Callable[[], Awaitable[str | None]]) -> Finding:
    """What `look` finds: an error of the tree is what is wrong, a text a remark."""
    from artifact_store.errors import ArtifactStoreError, UnavailableError

    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            return Finding(part, ok=True, cause=await look())
    except TimeoutError:
        return Finding(
            part, ok=False, cause=f"no answer within {_PATIENCE_SECONDS:g} s; is it running, is it reachable?"
        )
    except UnavailableError as error:
        # A gateway that gives its causes runs, and a message that names a setting says what to look at.
        explained = "ARTIFACT_STORE_" in error.detail or error.detail.startswith("the gateway is ")
        hint = "" if explained else f"; is it running, and is {_ADDRESSES[part]} right?"
        return Finding(part, ok=False, cause=error.detail + hint)
    except ArtifactStoreError as error:
        return Finding(part, ok=False, cause=error.detail)


async def _log(settings: Settings) -> str | None:
    from artifact_store.errors import CorruptError
    from services.cli.status import passed_over, writers
    from services.wiring import is_embedded, open_log

    log = open_log(settings)
    try:
        if is_embedded(settings) and not _sqlite_file(settings.log_url).exists():
            return "not there yet; the first command that writes makes it"
        await log.check()
        remarks = [f"{await log.partitions()} partitions, id {await log.identity()}"]
        for writer in await writers(log, settings) or ():
            if writer["trouble"] is not None:
                raise CorruptError(f"partition {writer['partition']} takes no writes: {writer['trouble']}")
            if (irregular := passed_over(writer)) is not None:
                remarks.append(irregular)
        return "; ".join(remarks)
    finally:
        await log.close()


async def _blobs(settings: Settings) -> str | None:
    from artifact_store.errors import ConfigurationError
    from services.wiring import open_blobs

    blobs = open_blobs(settings)
    try:
        if blobs.backend_id == "local" and not _local_folder(settings).exists():
            return "not there yet; the first command that writes makes it"
        await blobs.now()  # a clock that is wrong makes the store refuse what follows
        if (trouble := blobs.clock.trouble()) is not None:
            raise ConfigurationError(trouble)
        await blobs.check()
        return blobs.backend_id
    finally:
        await blobs.close()


async def _views(settings: Settings) -> str | None:
    from services.wiring import open_views

    if settings.views_url.startswith("sqlite") and not _sqlite_file(settings.views_url).exists():
        return "not there yet; the first command that writes makes it"
    views = open_views(settings)
    try:
        await views.check()
        return ", ".join([views.dialect, *await _builds(views)])
    finally:
        await views.close()


async def _groups(settings: Settings) -> str | None:
    """Offsets that other tools have set for projectors' groups. Raises CorruptError when a projector stops for them."""
    from artifact_store.position import Position
    from services.cli.command import log_and_views
    from services.cli.status import group_note
    from services.views.projections import PROJECTIONS
    from services.views.queries import Queries

    files = [url for url in (settings.log_url, settings.views_url) if url.startswith("sqlite")]
    if not all(_sqlite_file(url).exists() for url in files):
        return "not there yet"
    notes = []
    async with log_and_views() as (log, views):
        stands = Position(await log.identity(), {})
        for name in PROJECTIONS:
            position = await Queries(views).checkpoint(name)
            if (note := await group_note(log, name, position or stands)) is not None:
                notes.append(f"{name}: {note}")
    return "; ".join(notes) or None


async def _builds(views: Views) -> list[str]:
    """What is being built beside the live views, or was left by a replay that ended early."""
    from services.views.engine.generations import read_build
    from services.views.projections import PROJECTIONS

    async with views.reading(snapshot=True) as connection:
        found = [await read_build(connection, projection) for projection in PROJECTIONS.values()]
    return [
        f"{build.projection} is built anew by {build.builder} (`artifact-store replay {build.projection}` goes on with "
        "it if that has ended, --drop removes it)"
        for build in found
        if build is not None
    ]


async def _identity(settings: Settings) -> str | None:
    """Policy and tokens as a gateway reads them, and whether the keys of the policy's issuers can be had."""
    from artifact_store.errors import ConfigurationError
    from services.identity.oidc import Issuer
    from services.identity.policy import Policy, read_policy
    from services.identity.static_tokens import read_tokens

    if settings.policy is None and settings.tokens is None:
        return "no policy and no tokens: whoever reaches the gateway may do everything"
    policy = Policy() if settings.policy is None else read_policy(settings.policy)
    tokens = [] if settings.tokens is None else list(read_tokens(settings.tokens))
    if settings.tokens is not None and settings.tokens.exists() and settings.tokens.stat().st_mode & 0o077:
        raise ConfigurationError(f"others may read or write {settings.tokens}: chmod 600 {settings.tokens}")
    if not policy.issuer and not tokens:
        raise ConfigurationError(
            "nobody can prove who they are: add an [[issuer]] to the policy, or `artifact-store tokens create`"
        )
    for table in policy.issuer:
        async with Issuer(table) as issuer:
            await issuer.current_keys()
    return f"{len(policy.issuer)} issuers, {len(policy.rule)} rules, {len(tokens)} static tokens"


async def _gateway(settings: Settings) -> str | None:
    from services.cli.login import open_transport, who_is

    async with open_transport(settings, seconds=5.0) as transport:
        await transport.call("GET", "/readyz")
        return f"ready to take writes; you are {(await who_is(transport)).actor}"


def _disk(settings: Settings) -> Finding:
    """Whether what is written here has room: embedded files and the writers' state."""
    folders = [settings.state_dir]
    if settings.log_url.startswith("sqlite"):
        folders.append(_sqlite_file(settings.log_url))
    if settings.blobs_url.startswith("file:"):
        with suppress(ValueError):  # an address that cannot be read was found before
            folders.append(_local_folder(settings))
    free = {folder: shutil.disk_usage(_nearest(folder)).free for folder in folders}
    tight = [f"{folder}: {left >> 20} MiB" for folder, left in free.items() if left < _LEAST_FREE_BYTES]
    if tight:
        return Finding("disk", ok=False, cause=f"less than 1 GiB is free at {', '.join(tight)}; make room")
    return Finding("disk", ok=True, cause=f"{min(free.values()) >> 30} GiB free")


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
