"""HTTP to a gateway: one session, addresses that are sent exactly as they are encoded, failures as our own errors."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import aiohttp
from pydantic import BaseModel, ValidationError
from yarl import URL

from services.addresses import check_host
from services.client.problems import MAX_PROBLEM_BYTES, error_of
from services.client.retries import GivenUpError, Notify, RetryPolicy, no_answer, unavailable, with_retries
from services.errors import ConfigurationError, CorruptError
from services.streams import CHUNK_BYTES

_READ_AHEAD_BYTES = 256 * 1024
_AT_ONCE = 128

QUIET_SECONDS = 120.0
"""After so long an answer without end is asked for anew: a gateway that is frozen keeps its connections open."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer that is no error. Header names are found in any case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


Shape = TypeVar("Shape", bound=BaseModel)


def read_answer(shape: type[Shape], answer: Answer) -> Shape:
    """The answer's JSON body in this shape. Raises CorruptError: it is another one."""
    try:
        return shape.model_validate_json(answer.body)
    except ValidationError:
        raise CorruptError(f"the gateway's answer is no {shape.__name__}: is the URL that of a gateway?") from None


class Transport:
    """Requests to one gateway. Opened and closed with `async with`; used by many tasks of one event loop at a time."""

    def __init__(self, url: str, policy: RetryPolicy, notify: Notify | None = None) -> None:
        """Raises ConfigurationError when `url` is no plain `http(s)://host[:port][/prefix]`."""
        form = ConfigurationError("the gateway's URL (ARTIFACT_STORE_URL) must have the form http(s)://host[:port]")
        try:
            parts = urlsplit(url)
            _ = parts.port  # which is read only now
            check_host(parts.hostname or "")
        except ValueError:
            raise form from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise form
        if not url.isprintable() or " " in url:
            raise form
        if parts.username is not None or parts.password is not None:
            raise ConfigurationError("the gateway's URL (ARTIFACT_STORE_URL) must not hold credentials")
        self.url = url.rstrip("/")
        self.policy = policy
        self.notify = notify
        self._session: aiohttp.ClientSession | None = None
        self._bodies = asyncio.Semaphore(_AT_ONCE)
        self._calls = asyncio.Semaphore(_AT_ONCE)

    async def __aenter__(self) -> Transport:
        self._session = aiohttp.ClientSession(
            # Without a bound of its own: a request would wait for its connection while its time-out runs.
            connector=aiohttp.TCPConnector(limit=0, socket_factory=_socket),
            cookie_jar=aiohttp.DummyCookieJar(),
            # Digests and ranges are about the bytes themselves: nothing may be compressed on the way.
            auto_decompress=False,
            headers={"Accept-Encoding": "identity", "User-Agent": "artifact-store"},
            read_bufsize=_READ_AHEAD_BYTES,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def turn(self) -> asyncio.Semaphore:
        """Held while a body is sent, it bounds how many are. A body may take long, and calls do not wait for it."""
        return self._bodies

    async def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
        json: Any = None,
    ) -> Answer:
        """Send a request without a stream, with retries, and return its whole answer.

        Raises what the answer's problem document stands for; UnavailableError when the policy's time is over.
        """
        async with self._calls:
            return await with_retries(
                self.policy,
                lambda: self.attempt(method, path, query=query, headers=headers, json=json),
                notify=self.notify,
            )

    async def attempt(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
        json: Any = None,
        data: AsyncIterable[bytes] | bytes | None = None,
        expect100: bool = False,
        answer_seconds: float | None = None,
    ) -> Answer:
        """As `call`, once, and with a body in `data` when it is given.

        `answer_seconds` is how long the answer may keep still, where that is more than the policy's `idle_seconds`.
        """
        options: dict[str, Any] = {"json": json} if json is not None else {"data": data}
        options["answer_seconds"] = answer_seconds
        async with self._answer(method, path, query, headers, expect100=expect100, **options) as response:
            try:
                body = await response.read()
            except (aiohttp.ClientError, TimeoutError) as error:
                raise self._lost(error, self._idle_seconds(answer_seconds)) from error
            return Answer(response.status, response.headers, body)

    async def open(
        self,
        path: str,
        *,
        query: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
        endless: bool = False,
    ) -> aiohttp.ClientResponse:
        """GET, with retries until the answer begins; the caller reads the rest with `read_chunk` and closes it.

        An `endless` answer may keep still for QUIET_SECONDS; the kernel notices earlier when the other side is gone.
        """

        async def attempt() -> aiohttp.ClientResponse:
            return await self._begin("GET", path, query, headers, endless=endless)

        return await with_retries(self.policy, attempt, notify=self.notify)

    async def read_chunk(self, response: aiohttp.ClientResponse) -> bytes:
        """The next bytes of an open answer, at most 1 MiB, empty at its end. Raises UnavailableError if it was cut."""
        try:
            return await response.content.read(CHUNK_BYTES)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._lost(error) from error

    @asynccontextmanager
    async def _answer(
        self,
        method: str,
        path: str,
        query: Mapping[str, object] | None,
        headers: Mapping[str, str] | None,
        **options: Any,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        response = await self._begin(method, path, query, headers, **options)
        try:
            yield response
        finally:
            response.release()

    async def _begin(
        self,
        method: str,
        path: str,
        query: Mapping[str, object] | None,
        headers: Mapping[str, str] | None,
        *,
        endless: bool = False,
        answer_seconds: float | None = None,
        **options: Any,
    ) -> aiohttp.ClientResponse:
        if self._session is None:
            raise ConfigurationError("the client is closed; use it inside `async with`")
        still = QUIET_SECONDS if endless else self._idle_seconds(answer_seconds)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.policy.connect_seconds, sock_read=still)
        address = URL(self.url + path + _query_text(query), encoded=True)
        try:
            response = await self._session.request(
                method, address, headers=headers, timeout=timeout, allow_redirects=False, **options
            )
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._lost(error, still) from error
        if not 200 <= response.status < 300:
            raise error_of(response.status, response.headers, await _problem_bytes(response))
        return response

    def _idle_seconds(self, answer_seconds: float | None) -> float:
        return max(self.policy.idle_seconds, answer_seconds or 0.0)

    def _lost(self, error: Exception, idle_seconds: float | None = None) -> Exception:
        """Our own error for what went wrong below HTTP; `idle_seconds`: how long the answer could keep still."""
        match error:
            case aiohttp.InvalidURL():
                return ConfigurationError(f"{self.url} is no address that can be used")
            case aiohttp.ClientSSLError():
                return GivenUpError(f"no secure connection to {self.url}: {error}")
            case aiohttp.ClientConnectorError():
                return unavailable(f"cannot reach the gateway at {self.url}: {error.strerror or error.os_error}")
            case aiohttp.ConnectionTimeoutError():
                return unavailable(f"cannot reach the gateway at {self.url} within {self.policy.connect_seconds:g} s")
            case TimeoutError():
                return no_answer(idle_seconds or self.policy.idle_seconds)
        return unavailable(f"the connection to {self.url} was lost: {type(error).__name__}; the outcome is unknown")


async def _problem_bytes(response: aiohttp.ClientResponse) -> bytes:
    """The body of an answer that is an error, as far as it came; the status says enough without."""
    body = b""
    try:
        while len(body) < MAX_PROBLEM_BYTES and (chunk := await response.content.read(MAX_PROBLEM_BYTES)):
            body += chunk
    except (aiohttp.ClientError, TimeoutError):
        return b""
    finally:
        response.release() if response.content.at_eof() else response.close()
    return body


def _socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket whose peer is asked for a sign of life when it keeps still, so that a vanished gateway is noticed."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family=family, type=kind, proto=protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)
    return made


def _query_text(query: Mapping[str, object] | None) -> str:
    given = {name: value for name, value in (query or {}).items() if value is not None}
    return "?" + urlencode(given, quote_via=quote) if given else ""
