"""A browser's `EventSource`: the page in docs/subscribing.md follows the feed in Chromium, exactly as printed."""

from __future__ import annotations

import asyncio
import re
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from uuid import UUID

import aiohttp
import pytest
from aiohttp import web

from artifact_store import Client
from artifact_store.registry import ANYONE
from services.core.access import Right
from services.identity.static_tokens import create_token
from tests.conftest import Endpoints
from tests.documents import blocks
from tests.integration.conditions import until
from tests.integration.processes import ProductProcess, output_of
from tests.integration.test_recipes import topic_settings
from tests.integration.tokens import bearer
from tests.services.install import chromium

pytestmark = [pytest.mark.services, pytest.mark.processes, pytest.mark.endurance]

FEED = "/v1/events"
FILES = 3
_SECONDS = 120.0
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding"}
_CONSOLE = re.compile(r'CONSOLE[:(]\d+\)?\] "(v\d\..*?)", source: \S*/follow\.js ')

PAGE = """<!doctype html>
<script>const newToken = async () => "{token}"</script>
<script src="/follow.js"></script>
<iframe src="http://localhost:{port}/stranger.html"></iframe>
"""
STRANGER = """<!doctype html>
<script>
setInterval(() => new EventSource("http://127.0.0.1:{port}/v1/events?stranger=1", {{withCredentials: true}}), 1000)
</script>
"""
"""A page of another site: browsers take `localhost` and `127.0.0.1` for two."""


@dataclass
class Follow:
    """One request for the feed, as the browser sent it and as it was answered."""

    last_event_id: str
    cookie: bool
    stranger: bool
    status: int = 0
    text: bytes = b""
    """How the answer began."""

    @property
    def refused(self) -> str:
        """The status for which the gateway asks to try again; empty for an answer with events."""
        return self.text.split()[1].decode() if self.text.startswith(b": ") else ""


@dataclass
class Site:
    """A site as people run one: it serves the page, and passes requests to `/v1` on to a gateway."""

    gateway: str
    pages: dict[str, str] = field(default_factory=dict)
    port: int = 0
    follows: list[Follow] = field(default_factory=list)
    cookies: int = 0
    """How often the page asked for the cookie and got it."""
    _open: list[web.Request] = field(default_factory=list)

    def cut(self) -> None:
        """Break the connections on which the feed is read."""
        for request in list(self._open):
            _break(request)

    @property
    def of_page(self) -> list[Follow]:
        return [follow for follow in self.follows if not follow.stranger]

    def was_refused(self, status: str) -> bool:
        """Whether a gateway answered the page for the second time with this status for lack of room."""
        return [follow.refused for follow in self.of_page].count(status) > 1

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if (page := self.pages.get(request.path)) is not None:
            kind = "text/javascript" if request.path.endswith(".js") else "text/html"
            return web.Response(text=page, content_type=kind, charset="utf-8")
        follow = Follow(
            request.headers.get("Last-Event-ID", ""), "Cookie" in request.headers, "stranger" in request.query
        )
        if request.path == FEED:
            self.follows.append(follow)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        query = "" if follow.stranger else f"?{request.query_string}"
        try:
            async with (
                aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False) as session,
                session.request(
                    request.method, f"{self.gateway}{request.path}{query}", headers=headers, data=await request.read()
                ) as answer,
            ):
                return await self._pass_on(request, answer, follow)
        except aiohttp.ClientConnectorError:
            follow.status = 502
            return web.Response(status=502)
        except aiohttp.ClientError:  # the gateway went in the middle of its answer
            _break(request)
            return web.Response()

    async def _pass_on(
        self, request: web.Request, answer: aiohttp.ClientResponse, follow: Follow
    ) -> web.StreamResponse:
        follow.status = answer.status
        self.cookies += "Set-Cookie" in answer.headers
        response = web.StreamResponse(status=answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                response.headers.add(name, value)
        self._open.append(request)
        try:
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                follow.text = follow.text or piece
                await response.write(piece)
            await response.write_eof()
        finally:
            self._open.remove(request)
        return response


def _break(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


@asynccontextmanager
async def site(gateway: str, token: str) -> AsyncIterator[Site]:
    """The site, listening for the length of the block, with a page that holds this token."""
    found = Site(gateway)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", found.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.port = int(runner.addresses[0][1])
    found.pages = {
        "/page.html": PAGE.format(token=token, port=found.port),
        "/follow.js": blocks("docs/subscribing.md")["browser"],
        "/stranger.html": STRANGER.format(port=found.port),
    }
    try:
        yield found
    finally:
        await runner.cleanup()


@asynccontextmanager
async def console(url: str, profile: Path) -> AsyncIterator[list[str]]:
    """What the page at `url` writes to the console of a Chromium that has no window; it grows meanwhile."""
    quiet = ("gpu", "quic", "background-networking", "component-update", "sync")
    process = await asyncio.create_subprocess_exec(
        chromium(),
        *("--headless", "--no-sandbox", "--no-first-run", "--enable-logging=stderr"),
        *(f"--disable-{name}" for name in quiet),
        *(f"--user-data-dir={profile}", url),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    lines: list[str] = []
    reading = asyncio.create_task(_read_console(process, lines))
    try:
        yield lines
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        await reading


async def _read_console(process: asyncio.subprocess.Process, lines: list[str]) -> None:
    assert process.stderr is not None
    while line := await process.stderr.readline():
        if found := _CONSOLE.search(line.decode(errors="replace")):
            lines.append(found[1])


@asynccontextmanager
async def crowd(gateway: str, token: str, *addresses: str) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Followers from these addresses on all places that they can get. Yields a function that takes what became free."""
    async with AsyncExitStack() as stack:
        sessions = [
            await stack.enter_async_context(
                aiohttp.ClientSession(
                    gateway, headers=bearer(token), connector=aiohttp.TCPConnector(limit=0, local_addr=(address, 0))
                )
            )
            for address in addresses
        ]

        async def take() -> None:
            for session in sessions:
                while True:
                    answer = await session.get(FEED, params={"follow": "true", "since": "now"})
                    stack.callback(answer.close)
                    if answer.status != 200:
                        break

        await take()
        yield take


async def test_the_page_gets_each_event_once_whatever_ends_its_connection(endpoints: Endpoints, tmp_path: Path) -> None:
    tokens, secret = tmp_path / "tokens.json", tmp_path / "token"
    _, writing = create_token(tokens, "producer", [Right.READ, Right.WRITE, Right.DELEGATE], now=time.time())
    _, reading = create_token(tokens, "page", [Right.READ], now=time.time())
    secret.write_text(writing)
    secret.chmod(0o600)
    with topic_settings(endpoints, tmp_path, tokens=tokens) as settings:
        output_of(settings, "migrate")
        async with AsyncExitStack() as stack:
            gateway = stack.enter_context(ProductProcess(settings, tmp_path / "gateway", "gateway"))
            registry = await stack.enter_async_context(Client(gateway.endpoint, token_file=secret))
            front = await stack.enter_async_context(site(gateway.endpoint, reading))
            url = f"http://127.0.0.1:{front.port}/page.html"

            async def publish() -> None:
                """Two packages, one in the name of another, which makes its events version 2."""
                for actor in (ANYONE, "ada"):
                    package = await registry.create_package("n", "p", "s", "scratch", actor)
                    for number in range(FILES):
                        await registry.ingest_file(package, f"{number}", "text/plain", b"bytes", actor)
                    await registry.finalize_package(package, actor)
                    packages.append(package)

            packages: list[UUID] = []
            await publish()
            lines = await stack.enter_async_context(console(url, tmp_path / "profile"))

            async def all_came() -> None:
                await _until(lambda: len(lines) >= len(packages) * (FILES + 2), f"of the page: {lines[-1:]}")

            await all_came()
            # The network breaks. The browser connects again by itself.
            for _ in range(2):
                front.cut()
                await publish()
                await all_came()
            assert [bool(follow.last_event_id) for follow in front.of_page] == [False, True, True]

            # The gateway has no room, for the page's own address and then for anybody. The browser tries again.
            for addresses, status in ((["127.0.0.1"], "429"), (["127.0.0.2", "127.0.0.3"], "503")):
                async with crowd(gateway.endpoint, reading, *addresses) as take:
                    front.cut()
                    await take()
                    await publish()
                    await _until(partial(front.was_refused, status), f"not refused twice with {status}")
                await all_came()
            assert all(follow.last_event_id for follow in front.of_page[1:])
            assert front.cookies == 1

            # The gateway is killed, and meanwhile the site says so: the browser gives up, and the page begins again.
            gateway.kill()
            await _until(lambda: front.of_page[-1].status == 502, "the browser did not come back")
            await asyncio.to_thread(gateway.start)
            await publish()
            await all_came()
            assert front.cookies == 2

            said = [event async for event in registry.read_events()]
            assert sorted(lines) == sorted(f"{one.event_type} {one.package_id} {one.sequence}" for one in said)
            numbers = defaultdict(list)
            for line in lines:
                _, package, sequence = line.split()
                numbers[package].append(int(sequence))
            assert numbers == {str(package): list(range(1, FILES + 3)) for package in packages}
            strangers = {(follow.cookie, follow.status) for follow in front.follows if follow.stranger}
            assert strangers - {(False, 502)} == {(False, 403)}


async def _until(condition: Callable[[], bool], otherwise: str) -> None:
    async def holds() -> bool:
        return condition()

    await until(holds, _SECONDS, otherwise)
