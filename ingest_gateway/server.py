"""The gateway as a process: it listens until it is stopped, then finishes the requests in progress.

Meanwhile it sweeps the blob store, about once an hour: uploads that made no progress for a day are aborted, so that a
killed process leaves nothing behind. Sweeps of several gateways do not harm each other; random pauses keep them apart.
Only bytes that never became a blob are removed.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from datetime import datetime
from typing import Protocol

from aiohttp import web
from prometheus_client import CollectorRegistry

from artifact_store.errors import ArtifactStoreError, ConfigurationError, UnavailableError
from ingest_gateway.admission import Bounds, Places, Quota, connections_within
from ingest_gateway.app import ROUTES, App
from ingest_gateway.gateway import Gateway, Subscribing
from ingest_gateway.health import Checks, Deliveries
from ingest_gateway.http_metrics import Metrics
from ingest_gateway.peers.forwarding import MAX_FORWARDED
from ingest_gateway.peers.internal_listener import MAX_TAKEN
from ingest_gateway.protocol.connections import AllowedHosts, Server
from ingest_gateway.protocol.declaration import document
from ingest_gateway.siblings import Member, Siblings
from services.blobs.open import bucket_of
from services.config import Settings
from services.identity.authenticator import Authenticator
from services.runtime import tls
from services.runtime.addresses import ListenAddress
from services.views.database import Views
from services.webhooks.subscriptions import Subscriptions, create_tables
from services.webhooks.targets import Targets
from services.wiring import Parts, is_embedded, parts

_log = logging.getLogger(__name__)

DRAIN_SECONDS = 30.0
"""How long requests in progress may continue after the gateway was told to stop."""

_METRICS_CONNECTIONS = 64

_BACKLOG = 1024

_TAKEN_AT_ONCE = 1
"""Connections that one of several processes accepts per turn of its event loop, so that the others get their share."""


async def run(
    settings: Settings,
    *,
    stop: asyncio.Event | None = None,
    ready: Callable[[str], None] | None = None,
    member: Member | None = None,
    metrics: CollectorRegistry | None = None,
) -> None:
    """Open the parts that the settings name and run a gateway on them until `stop` is set.

    Without `stop`, SIGTERM and SIGINT end it. `ready` is called with the URL once the gateway listens. `member`: this
    is one of several processes of a gateway. `metrics` may hold those of others in this process; all are shown.

    The addresses are tried before the parts are opened: a gateway that nobody could reach takes no partitions.

    Raises ConfigurationError: the settings forbid the interface, or the address is taken; UnavailableError.
    """
    address = listen_address(settings)
    if member is None:
        _try_address(address, "ARTIFACT_STORE_LISTEN")
        if settings.metrics_listen is not None:
            _try_address(settings.metrics_listen, "ARTIFACT_STORE_METRICS_LISTEN")
    if stop is None:
        with stopped_by_signals() as stopped:
            async with parts(settings, metrics=metrics) as opened:
                await serve(opened, stopped, ready=ready, member=member)
    else:
        async with parts(settings, metrics=metrics) as opened:
            await serve(opened, stop, ready=ready, member=member)


async def serve(
    opened: Parts,
    stop: asyncio.Event,
    *,
    ready: Callable[[str], None] | None = None,
    member: Member | None = None,
) -> None:
    """Run a gateway on open parts until `stop` is set; returns when its requests are answered.

    Raises ConfigurationError: the settings forbid the interface, or the address is taken.
    """
    settings = opened.settings
    checks = Checks(opened.log.check, opened.blobs.check, opened.writer.ready, opened.views.check)
    address = listen_address(settings)
    metrics = Metrics(opened.metrics)
    metrics.show_bucket(bucket_of(settings))
    metrics.watch_database(lambda: opened.views.connections_in_use)
    metrics.watch_memory(lambda: opened.blobs.parts.memory.limit - opened.blobs.parts.memory.free)
    if is_embedded(settings):
        await create_subscriptions(opened.views)
    async with Authenticator.open(settings, opened.metrics) as authenticator:
        gateway = Gateway(
            opened.registry,
            opened.log,
            checks,
            _bounds(settings),
            metrics,
            document(ROUTES),
            authenticator.authenticate,
            lambda: authenticator.logins,
            siblings=None if member is None else Siblings(member, metrics.exposition),
            subscribing=Subscribing(Subscriptions(opened.views), Targets(settings.webhook_allow)),
        )
        async with listening(
            App(gateway, AllowedHosts(settings.allowed_hosts, loopback=address.is_loopback), opened.audit),
            address.host,
            address.port,
            member=member,
            context=_server_context(settings),
            metrics_at=settings.metrics_listen,
        ) as url:
            print(f"listening on {url}", file=sys.stderr, flush=True)  # noqa: T201 - the line that people wait for
            if ready is not None:
                ready(url)
            async with swept_regularly(opened.blobs):
                await stop.wait()
            _log.info("stopping: no new connections, finishing what is under way")


async def create_subscriptions(views: Views) -> None:
    """Create the tables of subscriptions. Only for embedded parts; otherwise `migrate` creates them."""
    try:
        await create_tables(views)
    except UnavailableError:
        if views.dialect == "sqlite":
            raise
        # A separate database may be down, which was logged when the parts were opened.


def _bounds(settings: Settings) -> Bounds:
    forwarded = 0 if is_embedded(settings) else MAX_FORWARDED + MAX_TAKEN
    quotas = {
        Quota.PACKAGES: settings.quota_packages,
        Quota.BYTES: settings.quota_bytes,
        Quota.METADATA_BYTES: settings.quota_metadata_bytes,
        Quota.RESUMABLE_UPLOADS: settings.quota_resumable_uploads,
        Quota.OPEN_UPLOADS: settings.quota_open_uploads,
    }
    return Bounds(
        settings.max_file_bytes,
        settings.max_metadata_bytes,
        max_connections=connections_within(settings.max_connections, forwarded),
        max_uploads=settings.max_uploads,
        quotas={quota: most for quota, most in quotas.items() if most is not None},
    )


@asynccontextmanager
async def listening(
    app: App,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    drain_seconds: float = DRAIN_SECONDS,
    member: Member | None = None,
    context: ssl.SSLContext | None = None,
    metrics_at: ListenAddress | None = None,
) -> AsyncIterator[str]:
    """Listen within the block; yields the URL. Port 0 takes a free port.

    With `member`, accepts connections from the member's socket instead of `host` and `port`. With `context`, it speaks
    TLS. With `metrics_at`, metrics are served only there, and health also there.

    At the end of the block it accepts no new connection, dismisses followers, waits up to `drain_seconds` for requests
    under way and for clients that may be sending another one, and closes.

    Raises ConfigurationError: the address is taken or does not exist.
    """
    gateway, admission = app.gateway, app.gateway.admission
    if metrics_at is not None:
        app.serve_metrics_apart(AllowedHosts(loopback=metrics_at.is_loopback))
    server = Server(app.handle, app.refuse, admission.connections, admission.heads)
    runner = web.ServerRunner(server, shutdown_timeout=1.0)
    await runner.setup()
    apart = web.ServerRunner(
        Server(app.handle_apart, app.refuse, Places("connections for metrics", _METRICS_CONNECTIONS), admission.heads),
        shutdown_timeout=1.0,
    )
    await apart.setup()
    metrics, stopped = gateway.metrics, asyncio.Event()
    lag = asyncio.create_task(metrics.watch_loop())
    watching = [asyncio.create_task(gateway.ready.watch(metrics.component, stopped))]
    if gateway.subscribing is not None:
        watching.append(asyncio.create_task(Deliveries(gateway.subscribing.store).watch(metrics.unserved, stopped)))
    try:
        async with gateway.siblings.telling() if gateway.siblings is not None else nullcontext():
            if metrics_at is not None and (member is None or member.number == 1):  # serves the metrics of all members
                await _site(apart, metrics_at.host, metrics_at.port, None, "ARTIFACT_STORE_METRICS_LISTEN")
            if member is None:
                site = await _site(runner, host, port, context)
            else:
                site = await _shared_site(runner, member, context)
            scheme = "http" if context is None else "https"
            yield f"{scheme}://{ListenAddress(*runner.addresses[0][:2])}"
            await site.stop()
            deadline = asyncio.get_running_loop().time() + drain_seconds
            await gateway.drain(drain_seconds)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await server.let_go()
    finally:
        lag.cancel()
        stopped.set()
        await runner.cleanup()
        await apart.cleanup()
        await asyncio.gather(*watching)


def _server_context(settings: Settings) -> ssl.SSLContext | None:
    """The gateway's TLS context, None without a certificate. Blocks on files. Raises ConfigurationError."""
    cert, key, clients = settings.tls_cert, settings.tls_key, settings.tls_client_ca
    if cert is None or key is None:
        if cert or key or clients:
            raise ConfigurationError("ARTIFACT_STORE_TLS_CERT and ARTIFACT_STORE_TLS_KEY go together")
        return None
    files = "ARTIFACT_STORE_TLS_CERT, ARTIFACT_STORE_TLS_KEY or ARTIFACT_STORE_TLS_CLIENT_CA"
    return tls.serving(cert, key, clients=clients, setting=files)


async def _site(
    runner: web.ServerRunner,
    host: str,
    port: int,
    context: ssl.SSLContext | None,
    setting: str = "ARTIFACT_STORE_LISTEN",
) -> web.BaseSite:
    site = web.TCPSite(runner, host, port, backlog=_BACKLOG, ssl_context=context)
    try:
        await site.start()
    except OSError as error:
        raise _no_address(host, port, error, setting) from error
    return site


async def _shared_site(runner: web.ServerRunner, member: Member, context: ssl.SSLContext | None) -> web.BaseSite:
    listener = socket.socket(fileno=member.descriptor)
    site = web.SockSite(runner, listener, backlog=_TAKEN_AT_ONCE, ssl_context=context)
    await site.start()
    listener.listen(_BACKLOG)  # again, because SockSite has set the queue's length to its backlog
    return site


def bound_socket(settings: Settings) -> socket.socket:
    """A listening socket at `settings.listen`, for several processes. Raises ConfigurationError."""
    address = listen_address(settings)
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise _no_address(address.host, address.port, error) from error


def _try_address(address: ListenAddress, setting: str) -> None:
    """Raise ConfigurationError if nothing can listen there. Blocks on a resolver, unless the host is an address."""
    failed = []
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise _no_address(address.host, address.port, error, setting) from error
    for family, kind, protocol, _, where in found:
        try:
            with socket.socket(family, kind, protocol) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    tried.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                tried.bind(where)
        except OSError as error:
            failed.append(error)
    taken = [error for error in failed if error.errno == errno.EADDRINUSE]
    if taken or len(failed) == len(found):  # a machine may lack one of the protocols that a name stands for
        raise _no_address(address.host, address.port, (taken or failed)[0], setting)


def _no_address(host: str, port: int, error: OSError, setting: str = "ARTIFACT_STORE_LISTEN") -> ConfigurationError:
    return ConfigurationError(f"cannot listen on {host}, port {port}: {error.strerror}; {setting} says where")


def listen_address(settings: Settings) -> ListenAddress:
    """`settings.listen` as an address.

    Raises ConfigurationError: it is not HOST:PORT, or not loopback although the settings do not allow that.
    """
    try:
        address = ListenAddress.parse(settings.listen)
    except ValueError:
        raise ConfigurationError(
            "ARTIFACT_STORE_LISTEN must be HOST:PORT, such as 127.0.0.1:8080 or [::1]:8080"
        ) from None
    if not (address.is_loopback or settings.insecure or settings.policy or settings.tokens):
        raise ConfigurationError(
            "ARTIFACT_STORE_LISTEN names an interface that other machines reach, but nothing checks who sends "
            "requests: set ARTIFACT_STORE_POLICY or ARTIFACT_STORE_TOKENS, listen on 127.0.0.1, or set "
            "ARTIFACT_STORE_INSECURE=1 where the network itself keeps strangers out"
        )
    return address


@contextmanager
def stopped_by_signals(*, watched: bool = False) -> Iterator[asyncio.Event]:
    """An event that SIGTERM or SIGINT sets during the block; a second signal ends the process at once.

    A process `watched` by a parent ignores further signals instead, also after the block: a service manager signals
    both, and then the parent signals this one again. The parent knows how to end it.
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

    for number in (signal.SIGINT, signal.SIGTERM):  # Python catches SIGINT itself: once SIGTERM is caught, both are
        loop.add_signal_handler(number, told)
    try:
        yield stop
    finally:
        let_go()


SWEEP_SECONDS = 3600.0


class Sweepable(Protocol):
    """The part of a blob store that sweeping uses."""

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
    """Sweep during the block, with pauses of half to one and a half times `seconds`."""

    async def sweep() -> None:
        while True:
            await asyncio.sleep(draw(0.5 * seconds, 1.5 * seconds))
            try:
                swept = await blobs.sweep(now=await blobs.now())
            except ArtifactStoreError as error:
                _log.warning("abandoned uploads could not be removed; the next sweep tries again: %s", error.detail)
            except Exception:  # noqa: BLE001 - nobody waits for this task: it is logged, and the next sweep comes
                _log.exception("removing abandoned uploads failed")
            else:
                if swept:
                    _log.info("removed %d abandoned uploads", swept)

    sweeping = asyncio.create_task(sweep())
    try:
        yield
    finally:
        sweeping.cancel()
        with suppress(asyncio.CancelledError):
            await sweeping
