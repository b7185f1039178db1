"""A gateway on the parts of a test, which listens on loopback in the test's process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from ingest_gateway.admission import Bounds
from ingest_gateway.app import ROUTES, App
from ingest_gateway.gateway import Authenticate, Gateway, Subscribing
from ingest_gateway.health import Check, Checks
from ingest_gateway.http_metrics import Metrics
from ingest_gateway.protocol.connections import AllowedHosts
from ingest_gateway.protocol.declaration import document
from ingest_gateway.server import create_subscriptions, listening
from services.config import Settings
from services.core.access import Principal, local_user
from services.identity.audit import Audit
from services.registry.direct import DirectRegistry
from services.views.engine.apply import catch_up
from services.views.projections import PROJECTIONS
from services.views.queries import Queries
from services.webhooks.subscriptions import Subscriptions
from services.webhooks.targets import Targets
from services.wiring import Parts, is_embedded, limits_of, parts


@dataclass(frozen=True)
class RunningGateway:
    """Where it listens, what it stands on, and a client session whose base is its URL."""

    url: str
    parts: Parts
    session: aiohttp.ClientSession

    @property
    def port(self) -> int:
        """The port that it listens on, on 127.0.0.1."""
        return int(self.url.rpartition(":")[2])

    async def events(self) -> int:
        """How many events the log holds."""
        return len([event async for event in self.parts.log.read()])


async def believe(_authorization: str | None) -> Principal:
    """Take everyone for a local user with all rights, as a gateway does that only this machine reaches."""
    return local_user("anonymous")


@asynccontextmanager
async def running_gateway(
    settings: Settings,
    *,
    wait_seconds: float = 5.0,
    drain_seconds: float = 5.0,
    checks: Mapping[str, Check] | None = None,
    authenticate: Authenticate = believe,
    **bounds: Any,
) -> AsyncIterator[RunningGateway]:
    """A gateway on the parts of these settings.

    Reads wait for the view for `wait_seconds` at most; `checks` look at parts instead of the parts' own, and
    `authenticate` tells who asks.
    """
    async with parts(settings) as opened:
        if is_embedded(settings):
            await create_subscriptions(opened.views)

        async def freshen(view: str) -> None:
            await catch_up(opened.views, opened.log, PROJECTIONS[view])

        registry = DirectRegistry(
            opened.log,
            opened.writer,
            opened.blobs,
            Queries(opened.views),
            limits=limits_of(settings),
            freshen=freshen,
            wait_seconds=wait_seconds,
        )
        own = Checks(opened.log.check, opened.blobs.check, opened.writer.ready, opened.views.check)
        looked_at = replace(own, **(checks or {}))
        limits = Bounds(settings.max_file_bytes, settings.max_metadata_bytes, **bounds)
        gateway = Gateway(
            registry,
            opened.log,
            looked_at,
            limits,
            Metrics(),
            document(ROUTES),
            authenticate,
            lambda: (),
            subscribing=Subscribing(Subscriptions(opened.views), Targets(settings.webhook_allow)),
        )
        async with (
            listening(App(gateway, AllowedHosts(), Audit(None)), drain_seconds=drain_seconds) as url,
            aiohttp.ClientSession(url) as session,
        ):
            yield RunningGateway(url, opened, session)
