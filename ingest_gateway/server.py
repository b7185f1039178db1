"""The gateway as a process: listening, being told to stop, and finishing what it took on."""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from datetime import datetime
from typing import Protocol

from aiohttp import web

from artifact_store.errors import ArtifactStoreError, ConfigurationError
from ingest_gateway.app import App
from ingest_gateway.health import Checks
from ingest_gateway.http_metrics import Metrics
from ingest_gateway.limits.admission import Bounds, connections_within
from ingest_gateway.peers.forwarding import MAX_FORWARDED
from ingest_gateway.peers.internal_listener import MAX_TAKEN
from ingest_gateway.protocol.connections import Server
from ingest_gateway.siblings import Member, Siblings
from services.addresses import ListenAddress
from services.config import Settings
from services.direct import DirectRegistry
from services.log.port import Log
from services.wiring import Parts, is_embedded, parts

_log = logging.getLogger(__name__)

DRAIN_SECONDS = 30.0
"""How long requests that are under way may go on once the gateway was told to stop."""

_BACKLOG = 1024

_TAKEN_AT_ONCE = 1
"""How many connections one of several processes takes in one turn of its event loop; the others are to get some too."""


async def run(
    settings: Settings,
    *,
    stop: asyncio.Event | None = None,
    ready: Callable[[str], None] | None = None,
    member: Member | None = None,
) -> None:
    """Open the parts of these settings and run a gateway on them until `stop` is set.

    Without `stop`, SIGTERM and SIGINT end it. `ready` is called with the URL once the gateway listens. `member` says
    which process of a gateway of several this is.

    Raises ConfigurationError: the interface may not be listened on, or the address cannot be had; UnavailableError.
    """
    listen_address(settings)
    if stop is None:
        with stopped_by_signals() as stopped:
            async with parts(settings) as opened:
                await serve(opened, stopped, ready=ready, member=member)
    else:
        async with parts(settings) as opened:
            await serve(opened, stop, ready=ready, member=member)


async def serve(
    opened: Parts,
    stop: asyncio.Event,
    *,
    ready: Callable[[str], None] | None = None,
    member: Member | None = None,
) -> None:
    """Run a gateway on parts that are open already until `stop` is set; returns when what it took on is done.

    Raises ConfigurationError: the interface may not be listened on, or the address cannot be had.
    """
    settings = opened.settings
    checks = Checks(opened.log.check, opened.blobs.check, opened.writer.ready, opened.views.check)
    address = listen_address(settings)
    async with listening(
        opened.registry,
        opened.log,
        checks,
        _bounds(settings),
        address.host,
        address.port,
        metrics=Metrics(opened.metrics),
        member=member,
    ) as url:
        print(f"listening on {url}", file=sys.stderr, flush=True)  # noqa: T201 - the line that people wait for
        if ready is not None:
            ready(url)
        async with swept_regularly(opened.blobs):
            await stop.wait()
        _log.info("stopping: no new connections, finishing what is under way")


def _bounds(settings: Settings) -> Bounds:
    forwarded = 0 if is_embedded(settings) else MAX_FORWARDED + MAX_TAKEN
    return Bounds(
        settings.max_file_bytes,
        settings.max_metadata_bytes,
        max_connections=connections_within(settings.max_connections, forwarded),
        max_uploads=settings.max_uploads,
    )


@asynccontextmanager
async def listening(
    registry: DirectRegistry,
    log: Log,
    checks: Checks,
    bounds: Bounds,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    metrics: Metrics | None = None,
    drain_seconds: float = DRAIN_SECONDS,
    member: Member | None = None,
) -> AsyncIterator[str]:
    """A gateway that listens for the length of the block; gives its URL. Port 0 takes a free one.

    One process of several takes connections from the socket that was handed to it instead.

    On the way out it takes no new connection, lets followers go, finishes what is under way, for `drain_seconds` at
    most, and closes. Raises ConfigurationError when the address cannot be had.
    """
    metrics = metrics or Metrics()
    siblings = None if member is None else Siblings(member, metrics.exposition)
    app = App(registry, log, checks, bounds, metrics, siblings)
    runner = web.ServerRunner(
        Server(app.handle, app.refuse, app.gateway.admission.connections, app.gateway.admission.heads),
        shutdown_timeout=1.0,
    )
    await runner.setup()
    lag = asyncio.create_task(metrics.watch_loop())
    try:
        async with siblings.telling() if siblings is not None else nullcontext():
            site = await _site(runner, host, port) if member is None else await _shared_site(runner, member)
            yield f"http://{ListenAddress(*runner.addresses[0][:2])}"
            await site.stop()
            await app.gateway.drain(drain_seconds)
    finally:
        lag.cancel()
        await runner.cleanup()


async def _site(runner: web.ServerRunner, host: str, port: int) -> web.BaseSite:
    site = web.TCPSite(runner, host, port, backlog=_BACKLOG)
    try:
        await site.start()
    except OSError as error:
        raise _no_address(host, port, error) from error
    return site


async def _shared_site(runner: web.ServerRunner, member: Member) -> web.BaseSite:
    listener = socket.socket(fileno=member.descriptor)
    site = web.SockSite(runner, listener, backlog=_TAKEN_AT_ONCE)
    await site.start()
    listener.listen(_BACKLOG)  # the length of the queue too was set to what the site was given
    return site


def bound_socket(settings: Settings) -> socket.socket:
    """A listening socket at `settings.listen`, for several processes. Raises ConfigurationError."""
    address = listen_address(settings)
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise _no_address(address.host, address.port, error) from error


def _no_address(host: str, port: int, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"cannot listen on {host}, port {port}: {error.strerror}; ARTIFACT_STORE_LISTEN says where"
    )


def listen_address(settings: Settings) -> ListenAddress:
    """`settings.listen`, read.

    Raises ConfigurationError: it is not HOST:PORT, or not loopback although nothing says that this is meant.
    """
    try:
        address = ListenAddress.parse(settings.listen)
    except ValueError:
        raise ConfigurationError("ARTIFACT_STORE_LISTEN must be HOST:PORT, as 127.0.0.1:8080 or [::1]:8080") from None
    if not settings.insecure and not address.is_loopback:
        raise ConfigurationError(
            "ARTIFACT_STORE_LISTEN names an interface that others reach, and nothing asks them who they are: "
            "listen on 127.0.0.1, or set ARTIFACT_STORE_INSECURE=1 where the network itself keeps strangers out"
        )
    return address


@contextmanager
def stopped_by_signals(*, watched: bool = False) -> Iterator[asyncio.Event]:
    """An event that SIGTERM or SIGINT sets, for the length of the block; a second signal ends the process at once.

    Not one that is `watched` over by another process: a service manager tells both, and then the other one tells this
    one again. Further signals change nothing there, behind the block neither; the other one knows how to end it.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def told() -> None:
        stop.set()
        if not watched:
            let_go()

    def let_go() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            if watched:
                signal.signal(number, signal.SIG_IGN)

    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT is caught by Python anyway: SIGTERM then tells of both
        loop.add_signal_handler(number, told)
    try:
        yield stop
    finally:
        let_go()


SWEEP_SECONDS = 3600.0


class Sweepable(Protocol):
    """What there is to know of a blob store here."""

    async def now(self) -> datetime:
        """See `BlobStore`."""

    async def sweep(self, *, now: datetime) -> int:
        """See `BlobStore`."""


@asynccontextmanager
async def swept_regularly(
    blobs: Sweepable,
    *,
    seconds: float = SWEEP_SECONDS,
    draw: Callable[[float, float], float] = random.uniform,
) -> AsyncIterator[None]:
    """Sweep for the length of the block, after pauses of half to one and a half times `seconds`."""

    async def sweep() -> None:
        while True:
            await asyncio.sleep(draw(0.5 * seconds, 1.5 * seconds))
            try:
                swept = await blobs.sweep(now=await blobs.now())
            except ArtifactStoreError as error:
                _log.warning("uploads could not be swept and are left to the next time: %s", error.detail)
            except Exception:  # noqa: BLE001 - nobody waits for this task: it is logged, and the next sweep comes
                _log.exception("sweeping uploads failed")
            else:
                if swept:
                    _log.info("swept %d uploads that stood still", swept)

    sweeping = asyncio.create_task(sweep())
    try:
        yield
    finally:
        sweeping.cancel()
        with suppress(asyncio.CancelledError):
            await sweeping
