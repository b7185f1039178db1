"""A receiver of webhooks that checks each signature with the specification's library, and answers as instructed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from standardwebhooks import Webhook, WebhookVerificationError

from tests.integration.conditions import until

SECONDS = 20.0

Behave = Callable[["Received"], Awaitable[web.StreamResponse | None]]
"""How to answer a message; None accepts it."""


@dataclass(frozen=True)
class Received:
    """One request."""

    headers: Mapping[str, str]
    body: bytes
    event: dict[str, Any]
    request: web.Request

    @property
    def package_id(self) -> str:
        return str(self.event["subject"])

    @property
    def sequence(self) -> int:
        return int(self.event.get("sequence", 0))


@dataclass
class Receiver:
    """What it got and what it accepted, in the order in which the requests came."""

    url: str
    secrets: list[str] = field(default_factory=list)
    """Those that a signature may be made with; without any, nothing is checked."""
    behave: Behave | None = None
    received: list[Received] = field(default_factory=list)
    accepted: list[Received] = field(default_factory=list)
    forged: list[bytes] = field(default_factory=list)

    async def take(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        event = self._verified(request, body)
        if event is None:
            return web.Response(status=401)
        got = Received(dict(request.headers), body, event, request)
        self.received.append(got)
        answer = None if self.behave is None else await self.behave(got)
        if answer is None:
            self.accepted.append(got)
            answer = web.Response(text="thank you")
        return answer

    def _verified(self, request: web.Request, body: bytes) -> dict[str, Any] | None:
        headers = {name.lower(): value for name, value in request.headers.items()}
        for secret in self.secrets:
            try:
                found: dict[str, Any] = Webhook(secret).verify(body, headers)
            except WebhookVerificationError:
                continue
            return found
        self.forged.append(body)
        return None

    def sequences(self) -> dict[str, list[int]]:
        """The numbers of the accepted events, by package, in the order in which they came."""
        found: dict[str, list[int]] = {}
        for got in self.accepted:
            found.setdefault(got.package_id, []).append(got.sequence)
        return found

    async def has(self, count: int) -> None:
        """Wait until so many events are accepted."""
        await self.until(lambda: len(self.accepted) >= count)

    async def has_tried(self, count: int) -> None:
        """Wait until so many requests came, accepted or not."""
        await self.until(lambda: len(self.received) >= count)

    async def until(self, condition: Callable[[], bool], seconds: float = SECONDS) -> None:
        """Wait until the condition holds, for so many seconds at most."""

        async def holds() -> bool:
            return condition()

        await until(holds, seconds, f"{self.url} did not get what was expected; see what was received")


@asynccontextmanager
async def receiving(port: int = 0, host: str = "127.0.0.1") -> AsyncIterator[Receiver]:
    """A receiver for the length of the block."""
    receiver = Receiver("")
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", receiver.take)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    receiver.url = f"http://{host}:{runner.addresses[0][1]}/hook"
    try:
        yield receiver
    finally:
        await runner.cleanup()
