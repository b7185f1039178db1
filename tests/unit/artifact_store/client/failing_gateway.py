"""A gateway that fails on purpose, for tests of the client: it records each request and answers as told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import UUID

from aiohttp import web
from blake3 import blake3

from artifact_store import Client, RetryPolicy
from artifact_store.documents.problem_details import problem

PACKAGE = UUID("11111111-1111-4111-8111-111111111111")
FILE = UUID("22222222-2222-4222-8222-222222222222")
QUICK = RetryPolicy(total_seconds=5.0, first_pause_seconds=0.001, longest_pause_seconds=0.01)


@dataclass(frozen=True)
class Seen:
    """One request as it arrived. `body` is what came of it before it ended or broke off."""

    method: str
    raw_path: str
    headers: dict[str, str]
    body: bytes


Answering = Callable[[web.Request, bytes], Awaitable[web.StreamResponse]]


@dataclass
class FailingGateway:
    """Answers requests one after the other from `script`; its last entry answers all that follow."""

    script: list[Answering]
    seen: list[Seen] = field(default_factory=list)
    url: str = ""
    continues: bool = True
    """Whether it knows `100 Continue`."""

    refused_early: int = 0
    """So many requests are answered before their bodies are asked for."""

    transports: list[asyncio.BaseTransport] = field(default_factory=list)

    def drop(self) -> None:
        """Cut every connection, whatever it is about."""
        for transport in self.transports:
            transport.abort()  # type: ignore[attr-defined]  # a TCP connection's

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.transport is not None:
            self.transports.append(request.transport)
        if self.refused_early:
            self.refused_early -= 1
            self.seen.append(Seen(request.method, request.raw_path, dict(request.headers), b""))
            return await refuses(503, "unavailable")(request, b"")  # type: ignore[arg-type]  # as below
        if self.continues and "Expect" in request.headers and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = b"".join([chunk async for chunk in request.content.iter_any()])
        self.seen.append(Seen(request.method, request.raw_path, dict(request.headers), body))
        answering = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        return await answering(request, body)  # type: ignore[arg-type]  # a plain server gives plain requests

    def sent(self, header: str) -> list[str | None]:
        """The value of a header in each request."""
        return [seen.headers.get(header) for seen in self.seen]


@asynccontextmanager
async def failing_gateway(*script: Answering) -> AsyncIterator[FailingGateway]:
    """A server on a free loopback port for the length of the block."""
    gateway = FailingGateway(list(script))
    runner = web.ServerRunner(web.Server(gateway.handle), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    gateway.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield gateway
    finally:
        await runner.cleanup()


@asynccontextmanager
async def client_of(gateway: FailingGateway, policy: RetryPolicy = QUICK) -> AsyncIterator[Client]:
    """A client that tries again quickly."""
    async with Client(gateway.url, policy) as registry:
        yield registry


def answers(status: int, body: object, headers: dict[str, str] | None = None) -> Answering:
    """Answer with JSON."""

    async def answer(_request: web.Request, _body: bytes) -> web.StreamResponse:
        return web.Response(status=status, text=json.dumps(body), content_type="application/json", headers=headers)

    return answer


def refuses(status: int, name: str, headers: dict[str, str] | None = None) -> Answering:
    """Answer with a problem document."""
    document = problem(status, name, f"this is {name}").model_dump(mode="json", exclude_none=True)
    return answers(status, document, headers)


async def cuts(request: web.Request, _body: bytes) -> web.StreamResponse:
    """Take the request, whatever its effect, and close the connection instead of answering."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


def created(sequence: int = 1) -> Answering:
    """A package was created."""
    body = {"package_id": str(PACKAGE), "status": "created", "sequence": sequence, "event_digest": "ab" * 32}
    return answers(201, body)


async def ingested(_request: web.Request, body: bytes) -> web.StreamResponse:
    """The body was stored."""
    return web.json_response(
        {
            "package_id": str(PACKAGE),
            "file_id": str(FILE),
            "relative_path": "a",
            "content_address": f"blake3:{blake3(body).hexdigest()}",
            "sha256": "00" * 32,
            "size_bytes": len(body),
            "sequence": 2,
            "event_digest": "ab" * 32,
        },
        status=201,
    )
