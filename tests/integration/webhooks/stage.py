"""A gateway with a deliverer on the parts of a test, and packages whose events it delivers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from services.config import Settings
from services.core.access import EVERYTHING
from services.registry.direct import DirectRegistry
from services.webhooks.deliverer import Deliverer, DeliveryMetrics, GrantsOf
from services.webhooks.outbox import Policy
from services.webhooks.targets import Lookup, Targets
from services.wiring import is_embedded
from tests.integration.conditions import until
from tests.integration.http_gateway import RunningGateway, running_gateway
from tests.integration.processes import output_of
from tests.integration.webhooks.receiver import SECONDS, Receiver

LOOPBACK = ("127.0.0.0/8",)
QUICK = Policy(first_pause_seconds=0.05, longest_pause_seconds=0.2)
"""Tries again at once, so that a test need not wait."""


@dataclass
class Stage:
    """The gateway, and what tests ask of it."""

    gateway: RunningGateway
    settings: Settings

    @property
    def registry(self) -> DirectRegistry:
        return self.gateway.parts.registry

    async def call(self, method: str, path: str, status: int, token: str | None = None, **body: Any) -> Any:
        """What a request below `/v1/subscriptions` is answered with; the status must be this."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        async with self.gateway.session.request(
            method, f"/v1/subscriptions{path}", json=body or None, headers=headers
        ) as answer:
            assert answer.status == status, await answer.text()
            return None if status == 204 else await answer.json()

    async def subscribe(self, receiver: Receiver, **body: Any) -> str:
        """A subscription that goes to the receiver, which learns the secret; returns the id."""
        made = await self.call("POST", "", 201, url=receiver.url, **body)
        receiver.secrets.append(made["secret"])
        return str(made["subscription_id"])

    async def deliveries(self, subscription: str) -> list[dict[str, Any]]:
        """The attempts that were saved, the newest first."""
        found: list[dict[str, Any]] = (await self.call("GET", f"/{subscription}/deliveries", 200))["items"]
        return found

    async def until_held(self, subscription: str, *, parked: bool) -> dict[str, Any]:
        """The first package that the subscription holds back, once there is one that is parked, or not."""
        found: list[dict[str, Any]] = []

        async def held() -> bool:
            shown = await self.call("GET", f"/{subscription}", 200)
            found[:] = [one for one in shown["held"] if one["parked"] == parked]
            return bool(found)

        await until(held, SECONDS, "nothing is held back")
        return found[0]

    async def until_shown(self, subscription: str, **wanted: str | None) -> None:
        """Wait until the subscription shows these values."""

        async def shown() -> bool:
            found = await self.call("GET", f"/{subscription}", 200)
            return all(found[name] == value for name, value in wanted.items())

        await until(shown, SECONDS, f"the subscription does not show {wanted}")

    async def publish(self, files: int = 1, producer: str = "ci") -> UUID:
        """A finalized package, which takes two events more than it has files."""
        package = await self.registry.create_package("package", producer, "main", "scratch")
        for number in range(files):
            await self.registry.ingest_file(package, f"{number}.txt", "text/plain", b"%d" % number)
        await self.registry.finalize_package(package)
        return package


@asynccontextmanager
async def stage(settings: Settings, **options: Any) -> AsyncIterator[Stage]:
    """A gateway whose subscriptions may go to loopback."""
    allowing = replace(settings, webhook_allow=LOOPBACK)
    if not is_embedded(settings):
        await asyncio.to_thread(output_of, settings, "migrate")
    async with running_gateway(allowing, **options) as gateway:
        yield Stage(gateway, allowing)


@asynccontextmanager
async def delivering(
    stage: Stage,
    *,
    policy: Policy = QUICK,
    grants_of: GrantsOf = lambda _: EVERYTHING,
    allowed: tuple[str, ...] = LOOPBACK,
    timeout_seconds: float = 5.0,
    look_up: Lookup | None = None,
    metrics: DeliveryMetrics | None = None,
) -> AsyncIterator[None]:
    """A deliverer for the length of the block, which ends as the process does when it is told to."""
    parts, stop = stage.gateway.parts, asyncio.Event()
    async with Targets(allowed, timeout_seconds=timeout_seconds, look_up=look_up) as targets:
        deliverer = Deliverer(parts.log, parts.views, targets, grants_of, policy=policy, metrics=metrics)
        running = asyncio.create_task(deliverer.run(stop))
        try:
            yield
        finally:
            stop.set()
            await running
