"""`serve`, `gateway`, `projector`, `webhooks` and `migrate`: the product's processes, and the storage they need."""

from __future__ import annotations

import asyncio
import logging
import resource
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from services.cli.command import (
    VisibleLines,
    answer,
    common_options,
    invocation,
    known_projection,
    log_and_views,
    remark,
    run,
)
from services.cli.repair import max_parked_option
from services.runtime.logs import JsonLines
from services.runtime.processes import collect_rarely
from services.runtime.tracing import exporting

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prometheus_client import CollectorRegistry

    from ingest_gateway.siblings import Member
    from services.config import Settings
    from services.log.port import Log
    from services.views.database import Views

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_LOG_LINE = "%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"
_PARTS = ("log_url", "blobs_url", "views_url")


def begin_to_run(settings: Settings) -> None:
    """Set up a long-running process: log lines with times, rare garbage collection, no core dumps.

    A core dump would hold the secrets of the settings and the tokens of requests.
    """
    collect_rarely()
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    # Do not look up for each line what our lines do not show ("Optimization" in Python's Logging HOWTO).
    logging._srcfile = None
    logging.logThreads = logging.logMultiprocessing = False
    logging.basicConfig(stream=sys.stderr, level=settings.log_level.upper())
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonLines() if settings.log_format == "json" else VisibleLines(_LOG_LINE))


def _several(command: Decorated) -> Decorated:
    """Add `--processes`, and the hidden option by which the starting process configures each of them."""
    command = click.option("--member", hidden=True)(command)
    return click.option(
        "--processes",
        type=click.IntRange(1, 64),
        default=1,
        show_default=True,
        help="How many processes to run behind one address. More than one needs a Kafka log.",
    )(command)


@click.command()
@_several
@max_parked_option
@common_options(shown=(*_PARTS, "listen"))
def serve(processes: int, member: str | None, max_parked: int | None) -> None:
    """Run gateway, projections and webhooks until SIGTERM or SIGINT, in one process or in several.

    With several processes, one of them sends the webhooks, and all share the rest of the work.
    """
    if processes > 1 and max_parked is not None:
        raise click.UsageError(
            "--max-parked is for one process: to share the work, run `gateway` and `projector --max-parked` with "
            "--processes each"
        )
    settings = invocation().settings()
    begin_to_run(settings)
    if processes > 1:
        _run_processes(settings, "serve", processes)
    else:
        with exporting("artifact-store"):
            _end(run(_serve(settings, member, max_parked), many_bytes=True))


async def _serve(settings: Settings, member: str | None, max_parked: int | None) -> Mapping[str, Exception]:
    from ingest_gateway import server
    from projector import run_projectors
    from services.runtime.metrics import new_registry
    from services.wiring import is_embedded

    if is_embedded(settings):
        await _migrate(settings)  # before gateway and projections open the same new files at the same time
    metrics = new_registry(settings.certificates())
    with server.stopped_by_signals(watched=member is not None) as stop:
        one_of = _member(member, stop)
        try:
            async with asyncio.TaskGroup() as tasks:
                projecting = tasks.create_task(
                    run_projectors(settings, [], stop, max_parked=max_parked, metrics_in=metrics)
                )
                delivering = tasks.create_task(_deliver(settings, stop, metrics))
                try:
                    await server.run(settings, stop=stop, member=one_of, metrics=metrics)
                finally:
                    stop.set()
                    await asyncio.wait([projecting, delivering])  # the running fold ends, and nothing is cut off
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # the first failure cancelled the others, so people only need that one
        return projecting.result()


@click.command()
@_several
@common_options(shown=(*_PARTS, "listen", "internal_listen", "internal_url", "max_connections", "max_uploads"))
def gateway(processes: int, member: str | None) -> None:
    """Run a gateway until SIGTERM or SIGINT.

    With --processes, each process has an internal listener of its own. If that has a fixed port, the processes take
    this port and the ones after it.
    """
    settings = invocation().settings()
    begin_to_run(settings)
    if processes > 1:
        _run_processes(settings, "gateway", processes)
    else:
        with exporting("artifact-store-gateway"):
            run(_gateway(settings, member), many_bytes=True)


async def _gateway(settings: Settings, member: str | None) -> None:
    from ingest_gateway import server

    with server.stopped_by_signals(watched=member is not None) as stop:
        await server.run(settings, stop=stop, member=_member(member, stop))


def _member(text: str | None, stop: asyncio.Event) -> Member | None:
    from ingest_gateway.siblings import Member
    from services.runtime.processes import end_with_parent

    if text is None:
        return None
    end_with_parent(stop)
    return Member.parse(text)


def _run_processes(settings: Settings, command: str, processes: int) -> None:
    if code := run(_in_processes(settings, command, processes)):
        raise click.exceptions.Exit(code)


async def _in_processes(settings: Settings, command: str, processes: int) -> int:
    from artifact_store.errors import ConfigurationError
    from ingest_gateway import server
    from ingest_gateway.siblings import run_processes
    from services.wiring import is_embedded

    if is_embedded(settings):
        raise ConfigurationError(
            "only one process can write to the embedded log: --processes needs a Kafka log in ARTIFACT_STORE_LOG_URL"
        )
    with server.stopped_by_signals() as stop, server.bound_socket(settings) as listener:
        return await run_processes(settings, command, processes, listener, stop)


@click.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option(
    "--processes",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="How many processes share the partitions.",
)
@max_parked_option
@click.option("--until-input-ends", is_flag=True, hidden=True)  # for the processes of `--processes`
@common_options(shown=("log_url", "views_url", "metrics_listen"))
def projector(names: tuple[str, ...], *, processes: int, until_input_ends: bool, **options: Any) -> None:
    """Run the named projections, or all of them, until SIGTERM or SIGINT."""
    for name in names:
        known_projection(name)
    settings = invocation().settings()
    begin_to_run(settings)
    options["metrics_at"] = settings.metrics_listen
    if processes > 1:
        if code := run(_project_in_processes(settings, names, processes, options)):
            raise click.exceptions.Exit(code)
    else:
        with exporting("artifact-store-projector"):
            _end(run(_project(settings, names, options, until_input_ends)))


async def _project(
    settings: Settings, names: tuple[str, ...], options: Mapping[str, Any], until_input_ends: bool
) -> Mapping[str, Exception]:
    from ingest_gateway.server import stopped_by_signals
    from projector import run_projectors
    from projector.loading import take_short_turns
    from services.runtime.processes import end_with_parent

    take_short_turns()
    with stopped_by_signals(watched=until_input_ends) as stop:
        if until_input_ends:
            end_with_parent(stop)
        return await run_projectors(settings, names, stop, **options)


async def _project_in_processes(
    settings: Settings, names: tuple[str, ...], processes: int, options: Mapping[str, Any]
) -> int:
    from ingest_gateway.server import stopped_by_signals
    from projector.runner import run_processes

    with stopped_by_signals() as stop:
        return await run_processes(settings, names, processes, stop, **options)


@click.command()
@common_options(shown=("log_url", "views_url", "policy", "tokens", "webhook_allow", "metrics_listen"))
def webhooks() -> None:
    """Send events to the URLs of subscriptions until SIGTERM or SIGINT.

    Only one process sends at a time; if it ends, another one takes its place within seconds. It needs the gateways'
    policy and tokens, because the rights of the subscriptions' owners follow from them.
    """
    settings = invocation().settings()
    begin_to_run(settings)
    run(_webhooks(settings), many_bytes=True)


async def _webhooks(settings: Settings) -> None:
    from ingest_gateway.server import stopped_by_signals
    from services.runtime.metrics import new_registry, served

    with stopped_by_signals() as stop:
        registry = new_registry(settings.certificates())
        async with served(registry, settings.metrics_listen):
            await _deliver(settings, stop, registry)


async def _deliver(settings: Settings, stop: asyncio.Event, registry: CollectorRegistry) -> None:
    from ingest_gateway.server import listen_address
    from services.identity.authenticator import Authenticator
    from services.webhooks.deliverer import Deliverer, DeliveryMetrics
    from services.webhooks.targets import Targets

    listen_address(settings)  # refuses, as a gateway does, to listen beyond loopback without authentication
    async with (
        log_and_views() as (log, views),
        Authenticator.open(settings) as authenticator,
        Targets(settings.webhook_allow) as targets,
    ):
        deliverer = Deliverer(log, views, targets, authenticator.grants_of, metrics=DeliveryMetrics(registry))
        await deliverer.run(stop)


class _SettingsError(click.ClickException):
    """A failure that must be mended in the settings."""

    exit_code = 2


def _end(stopped: Mapping[str, Exception]) -> None:
    """End with a gateway's exit code for such failures: 1 if a projection could not continue, 2 for settings.

    Each failure was logged when it happened.
    """
    from artifact_store.errors import ConfigurationError

    if stopped:
        kind = (
            _SettingsError if any(isinstance(e, ConfigurationError) for e in stopped.values()) else click.ClickException
        )
        raise kind("; ".join(f"{name} could not go on: {error}" for name, error in stopped.items()))


@click.command()
@common_options(shown=_PARTS)
def migrate() -> None:
    """Create or check topic, bucket, tables and seeds. Safe to repeat.

    It also succeeds when a view has tables of another layout, or was folded from another log, and then says that the
    view must be replayed: an upgrade migrates first.
    """
    answer(run(_migrate(invocation().settings())))


async def _of_another_log(log: Log, views: Views) -> dict[str, str]:
    """The views that were folded from another log, by name: why they cannot be used, and what mends it."""
    from artifact_store.errors import LogIdentityError
    from services.views.engine.checkpoints import read_position, require_same_log
    from services.views.projections import PROJECTIONS

    found, now = {}, await log.identity()
    for name, projection in PROJECTIONS.items():
        try:
            async with views.reading() as connection:
                position = await read_position(connection, projection)
            if position is not None:
                require_same_log(projection, position.log, now)
        except LogIdentityError as error:
            found[name] = error.detail
    return found


async def _migrate(settings: Settings) -> dict[str, Any]:
    from contextlib import AsyncExitStack

    from services.views.projections import PROJECTIONS
    from services.webhooks.subscriptions import create_tables
    from services.wiring import open_blobs, open_log, open_views

    async with AsyncExitStack() as stack:
        log, blobs, views = open_log(settings), open_blobs(settings), open_views(settings)
        for part in (log, blobs, views):
            stack.push_async_callback(part.close)
        await log.migrate()
        await blobs.migrate()
        outdated = await views.create_missing()
        outdated = {**await _of_another_log(log, views), **outdated}
        await create_tables(views)
        for why in outdated.values():
            remark(f"warning: {why}")
        return {
            "log": str(await log.identity()),
            "partitions": await log.partitions(),
            "blobs": blobs.backend_id,
            "views": views.dialect,
            "projections": ", ".join(PROJECTIONS) if not invocation().as_json else list(PROJECTIONS),
            **({"replay": list(outdated)} if invocation().as_json else {}),
        }
