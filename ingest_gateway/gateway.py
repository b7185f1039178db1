"""The state that all requests of one gateway share: registry, tail, readiness, metrics, limits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from ingest_gateway.event_tail import Tail
from ingest_gateway.health import Checks, ReadyAnswers
from ingest_gateway.http_metrics import Metrics
from ingest_gateway.limits.admission import Admission, Bounds, OpenUploads, Quota, Quotas
from ingest_gateway.limits.followers import Followers
from ingest_gateway.siblings import Siblings
from services.core.access import Principal, local_user
from services.identity.authenticator import LoginChoice
from services.log.port import Log
from services.registry.direct import DirectRegistry
from services.webhooks.subscriptions import Subscriptions
from services.webhooks.targets import Targets

Authenticate = Callable[[str | None], Awaitable[Principal]]
"""Tells who sends a request, from the value of its `Authorization`, None without one.

Raises UnauthenticatedError: the request does not prove who sends it; UnavailableError: that cannot be told now.
"""

_LOCAL = local_user("anonymous")


async def believe(_authorization: str | None) -> Principal:
    """Ask nobody who they are: for a gateway that only this machine reaches."""
    return _LOCAL


Logins = Callable[[], Sequence[LoginChoice]]
"""Tells at which issuers people can log in."""


def nowhere() -> Sequence[LoginChoice]:
    """Nobody can log in."""
    return ()


@dataclass(frozen=True, slots=True)
class Subscribing:
    """What subscriptions are kept in, and where their targets may lie."""

    store: Subscriptions
    targets: Targets


class Gateway:
    """The registry, and what else the handlers of one gateway use. Belongs to one event loop."""

    def __init__(
        self,
        registry: DirectRegistry,
        log: Log,
        checks: Checks,
        bounds: Bounds,
        metrics: Metrics,
        openapi: bytes,
        siblings: Siblings | None = None,
        authenticate: Authenticate = believe,
        logins: Logins = nowhere,
        subscribing: Subscribing | None = None,
    ) -> None:
        """`siblings` are the other processes of a gateway of several. `subscribing`: None keeps no subscriptions."""
        self.subscribing = subscribing
        self.registry = registry
        self.authenticate = authenticate
        self.logins = logins
        self.tail = Tail(log, extent=registry.package_extent, origins=registry.origins)
        self.ready = ReadyAnswers(checks)
        self.bounds = bounds
        self.metrics = metrics
        self.openapi = openapi
        self.siblings = siblings
        self.admission = Admission(bounds, metrics.refused)
        self.quotas = Quotas({Quota(name): most for name, most in bounds.quotas.items()}, metrics.refused)
        self.open_uploads = OpenUploads(bounds.quotas.get(Quota.OPEN_UPLOADS), metrics.refused)
        self.followers = Followers(bounds.max_followers, metrics.refused)
        transfers = self.admission.transfers
        metrics.watch(
            in_flight=lambda: self.admission.in_flight,
            followers=lambda: len(self.followers),
            connections=lambda: len(self.admission.connections),
            uploads=lambda: len(transfers["uploads"]),
            downloads=lambda: len(transfers["downloads"]),
        )

    async def drain(self, seconds: float) -> None:
        """Dismiss followers, then wait up to `seconds` until every request is answered."""
        self.followers.dismiss()
        await self.admission.drain(seconds)
