"""The state that all requests of one gateway share: registry, tail, readiness, metrics, limits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from ingest_gateway.admission import Admission, Bounds, Followers, OpenUploads, Quota, Quotas
from ingest_gateway.event_tail import Tail
from ingest_gateway.health import Checks, ReadyAnswers
from ingest_gateway.http_metrics import Metrics
from ingest_gateway.siblings import Siblings
from services.core.access import Principal
from services.identity.authenticator import LoginChoice
from services.log.port import Log
from services.registry.direct import DirectRegistry
from services.webhooks.subscriptions import Subscriptions
from services.webhooks.targets import Targets

Authenticate = Callable[[str | None], Awaitable[Principal]]
"""Finds out who sends a request, from the value of its `Authorization` header (None if it has none).

Raises UnauthenticatedError: the request does not prove who sends it; UnavailableError: this cannot be checked now.
"""

Logins = Callable[[], Sequence[LoginChoice]]
"""The issuers at which people can log in."""


@dataclass(frozen=True, slots=True)
class Subscribing:
    """Where subscriptions are stored, and which targets they may have."""

    store: Subscriptions
    targets: Targets


class Gateway:
    """The registry, and everything else that the handlers of one gateway share. Belongs to one event loop."""

    def __init__(
        self,
        registry: DirectRegistry,
        log: Log,
        checks: Checks,
        bounds: Bounds,
        metrics: Metrics,
        openapi: bytes,
        authenticate: Authenticate,
        logins: Logins,
        *,
        siblings: Siblings | None = None,
        subscribing: Subscribing | None = None,
    ) -> None:
        """`openapi` describes its routes in JSON. `siblings` are the other processes behind the same address.

        `subscribing` is None if it keeps no subscriptions.
        """
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
