"""HTTP requests to one gateway: connections, retries, and the errors in answers.

Retries pause exponentially with jitter, honour `Retry-After`, and are bounded in time by a `RetryPolicy`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import aiohttp
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception
from tenacity.wait import wait_random_exponential
from yarl import URL

from artifact_store.byte_streams import CHUNK_BYTES
from artifact_store.client.credentials import Credentials, check_secure, trust
from artifact_store.errors import ArtifactStoreError, ConfigurationError, CorruptError, PushBackError, UnavailableError
from artifact_store.rules import check_host

if TYPE_CHECKING:
    from pydantic import BaseModel

_READ_AHEAD_BYTES = 256 * 1024
_AT_ONCE = 128
_AT_STORE = 2
_STORE_AWAY_SECONDS = 300.0

QUIET_SECONDS = 120.0
"""Request an endless answer again after this much silence, because a frozen gateway keeps its connections open (s)."""

Shape = TypeVar("Shape", bound="BaseModel")

Outcome = TypeVar("Outcome")

Notify = Callable[[ArtifactStoreError, float], None]
"""Called before each pause with its reason and its length in seconds."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer that is not an error. Header names are not case-sensitive."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def read_answer(shape: type[Shape], answer: Answer) -> Shape:
    """The answer's JSON body in this shape. Raises CorruptError if it has another shape."""
    from pydantic import ValidationError

    try:
        return shape.model_validate_json(answer.body)
    except ValidationError:
        raise CorruptError(
            f"the gateway's answer is not a valid {shape.__name__}: is this the URL of a gateway?"
        ) from None


class Transport:
    """Requests to one gateway. Opened and closed with `async with`; used by many tasks of one event loop at a time."""

    def __init__(
        self,
        url: str,
        policy: RetryPolicy,
        notify: Notify | None = None,
        *,
        credentials: Credentials | None = None,
        ca: Path | None = None,
    ) -> None:
        """`credentials` give the token of each request; `ca` names authorities to trust in addition to the system's.

        Raises ConfigurationError if `url` is not a plain `http(s)://host[:port][/prefix]`, or not safe for a token.
        """
        form = ConfigurationError("the gateway's URL (ARTIFACT_STORE_URL) must have the form http(s)://host[:port]")
        try:
            parts = urlsplit(url)
            _ = parts.port  # parsed only now
            check_host(parts.hostname or "")
        except ValueError:
            raise form from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise form
        if not url.isprintable() or " " in url:
            raise form
        if parts.username is not None or parts.password is not None:
            raise ConfigurationError("the gateway's URL (ARTIFACT_STORE_URL) must not hold credentials")
        if credentials is not None:
            check_secure(url)
        self.url = url.rstrip("/")
        self._credentials = credentials
        self._ca = ca
        self.policy = policy
        self.notify = notify
        self._session: aiohttp.ClientSession | None = None
        self._bodies = asyncio.Semaphore(_AT_ONCE)
        self._calls = asyncio.Semaphore(_AT_ONCE)
        self._at_store = asyncio.Semaphore(_AT_STORE)
        self._store_away_until = 0.0

    async def __aenter__(self) -> Transport:
        tls = await trust(self._ca) if self.url.startswith("https:") else True
        self._session = aiohttp.ClientSession(
            # No limit here, because a request would wait for its connection while its time-out runs.
            connector=aiohttp.TCPConnector(limit=0, socket_factory=_socket, ssl=tls),
            cookie_jar=aiohttp.DummyCookieJar(),
            # Digests and ranges refer to the bytes themselves, so nothing may be compressed on the way.
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
        """Hold this while sending a body: it limits how many are sent at a time. Other calls do not need it."""
        return self._bodies

    @property
    def may_use_store(self) -> bool:
        """Whether parts of large files may be sent straight to the blob store: not for a while after a failure."""
        return time.monotonic() >= self._store_away_until

    def store_failed(self) -> None:
        """Send nothing to the blob store for a while."""
        self._store_away_until = time.monotonic() + _STORE_AWAY_SECONDS

    def store_turn(self) -> asyncio.Semaphore:
        """Hold this while sending a file's parts to the blob store: it limits how many parts are in memory."""
        return self._at_store

    async def put_to_store(self, url: str, headers: Mapping[str, str], data: AsyncIterable[bytes]) -> str | None:
        """PUT a part to an address that the gateway has signed. Returns the answer's `ETag`; None if it was refused.

        The token is not sent. Raises UnavailableError if there is no answer.
        """
        if self._session is None:
            raise ConfigurationError("the client is closed; use it inside `async with`")
        if self.url.startswith("https:") and not url.startswith("https:"):
            return None  # bytes that are encrypted on the way to the gateway must not be sent in the clear
        policy = self.policy
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=policy.connect_seconds, sock_read=policy.idle_seconds)
        put = self._session.put
        try:
            address = URL(url, encoded=True)
            async with put(address, headers=headers, data=data, timeout=timeout, allow_redirects=False) as response:
                await response.read()
                return response.headers.get("ETag") if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:  # their texts may contain the signature
            raise unavailable(f"the blob store took no part: {type(error).__name__}") from None

    async def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
        json: Any = None,
    ) -> Answer:
        """Send a request without a stream, with retries, and return the whole answer.

        Raises the error in the answer, and UnavailableError after the policy's time.
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
        """As `call`, without retries, and with `data` as the body.

        `answer_seconds` is how long the answer may be silent, if longer than the policy's `idle_seconds`.
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
        """GET, with retries until the answer begins. The caller reads it with `read_chunk`, then closes it.

        An `endless` answer may be silent for QUIET_SECONDS; the kernel notices a vanished peer earlier.
        """

        async def attempt() -> aiohttp.ClientResponse:
            return await self._begin("GET", path, query, headers, endless=endless)

        return await with_retries(self.policy, attempt, notify=self.notify)

    async def read_chunk(self, response: aiohttp.ClientResponse) -> bytes:
        """The next bytes of an open answer, at most 1 MiB; empty at its end. Raises UnavailableError if it was cut."""
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
        if self._credentials is not None:
            headers = {**(headers or {}), "Authorization": f"Bearer {await self._credentials.token()}"}
        try:
            response = await self._session.request(
                method, address, headers=headers, timeout=timeout, allow_redirects=False, **options
            )
        except (aiohttp.ClientError, TimeoutError) as error:
            if isinstance(error, aiohttp.ClientResponseError):
                raise self._lost(error, still) from None  # the cause has the request's headers, including the token
            raise self._lost(error, still) from error
        if not 200 <= response.status < 300:
            raise await _refusal(response)
        return response

    def _idle_seconds(self, answer_seconds: float | None) -> float:
        return max(self.policy.idle_seconds, answer_seconds or 0.0)

    def _lost(self, error: Exception, idle_seconds: float | None = None) -> Exception:
        """The error for a failure below HTTP. `idle_seconds` is how long the answer may be silent."""
        match error:
            case aiohttp.InvalidURL():
                return ConfigurationError(f"{self.url} is not a usable address")
            case aiohttp.ClientSSLError():
                return GivenUpError(f"no secure connection to {self.url}: {error}")
            case aiohttp.ClientConnectorError():
                return unavailable(f"cannot reach the gateway at {self.url}: {error.strerror or error.os_error}")
            case aiohttp.ConnectionTimeoutError():
                return unavailable(f"cannot reach the gateway at {self.url} within {self.policy.connect_seconds:g} s")
            case TimeoutError():
                return no_answer(idle_seconds or self.policy.idle_seconds)
        return unavailable(f"the connection to {self.url} was lost: {type(error).__name__}; the outcome is unknown")


async def _refusal(response: aiohttp.ClientResponse) -> ArtifactStoreError:
    """The error in an answer. A body that broke off is used as far as it arrived: the status is enough without it."""
    from artifact_store.documents.problem_details import MAX_PROBLEM_BYTES, error_of_answer  # these load pydantic

    body = b""
    try:
        while len(body) < MAX_PROBLEM_BYTES and (chunk := await response.content.read(MAX_PROBLEM_BYTES)):
            body += chunk
    except (aiohttp.ClientError, TimeoutError):
        body = b""
    finally:
        response.release() if response.content.at_eof() else response.close()
    return error_of_answer(response.status, response.headers, body)


def _socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket with TCP keep-alive, so that a vanished gateway is noticed."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family=family, type=kind, proto=protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)
    return made


def _query_text(query: Mapping[str, object] | None) -> str:
    given = {name: value for name, value in (query or {}).items() if value is not None}
    return "?" + urlencode(given, doseq=True, quote_via=quote) if given else ""


def log_retry(error: ArtifactStoreError, seconds: float) -> None:
    """Log that another attempt follows."""
    _logger.warning("%s; trying again in %.1f s", error.detail, seconds)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long and how often to try, in seconds.

    `total_seconds` limits a request together with its retries. A transfer of file bytes may take longer: its time
    counts from the first failure. `idle_seconds` is how long an answer may be silent before the attempt counts as lost.
    Pauses are random, up to a limit that grows from `first_pause_seconds` to `longest_pause_seconds`.
    """

    total_seconds: float = 60.0
    idle_seconds: float = 30.0
    connect_seconds: float = 10.0
    first_pause_seconds: float = 0.1
    longest_pause_seconds: float = 5.0


class GivenUpError(UnavailableError):
    """A failure after which another attempt cannot help or could do harm."""


async def with_retries(
    policy: RetryPolicy,
    attempt: Callable[[], Awaitable[Outcome]],
    *,
    transfer: bool = False,
    notify: Notify | None = None,
    repeatable: Callable[[], bool] = lambda: True,
) -> Outcome:
    """Call `attempt` until it succeeds, is finally refused, or the policy's time is over. Then raise its last error.

    UnavailableError and PushBackError are retried while `repeatable` is true, GivenUpError is not.
    """
    budget = _Budget(policy.total_seconds, counts_from_start=not transfer)
    jitter = wait_random_exponential(multiplier=policy.first_pause_seconds, max=policy.longest_pause_seconds)

    def pause(state: RetryCallState) -> float:
        asked = getattr(_failure(state), "retry_after", 0.0)
        return float(asked) + jitter(state)

    def stop(state: RetryCallState) -> bool:
        return state.upcoming_sleep >= budget.left()

    def announce(state: RetryCallState) -> None:
        failure = _failure(state)
        if notify is not None and failure is not None:
            notify(failure, state.upcoming_sleep)

    def worth_a_retry(error: BaseException) -> bool:
        may_pass = isinstance(error, UnavailableError | PushBackError) and not isinstance(error, GivenUpError)
        return may_pass and repeatable()

    last: UnavailableError | None = None

    async def once() -> Outcome:
        nonlocal last
        try:
            if transfer:
                return await attempt()
            async with asyncio.timeout(budget.left()):
                return await attempt()
        except UnavailableError as error:
            last = error
            raise
        except TimeoutError:
            # The earlier failure is more useful than the message that the time for another attempt ran out.
            raise last or no_answer(policy.total_seconds) from None
        finally:
            budget.attempted()

    retrying = AsyncRetrying(
        stop=stop, wait=pause, retry=retry_if_exception(worth_a_retry), before_sleep=announce, reraise=True
    )
    try:
        return await retrying(once)
    except PushBackError:
        if last is None:
            raise
        raise last from None  # an earlier attempt may have succeeded, which this refusal would hide


def no_answer(seconds: float) -> UnavailableError:
    """The error for an attempt without an answer in time. The outcome is unknown."""
    return unavailable(f"the gateway did not answer within {seconds:g} s; the outcome is unknown")


def unavailable(detail: str) -> UnavailableError:
    """An UnavailableError that does not ask for a pause."""
    error = UnavailableError(detail)
    error.retry_after = 0.0
    return error


class _Budget:
    """The seconds left, counted from the start or from the end of the first attempt."""

    def __init__(self, seconds: float, *, counts_from_start: bool) -> None:
        self._seconds = seconds
        self._since = time.monotonic() if counts_from_start else None

    def attempted(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    def left(self) -> float:
        spent = 0.0 if self._since is None else time.monotonic() - self._since
        return max(0.0, self._seconds - spent)


def _failure(state: RetryCallState) -> ArtifactStoreError | None:
    failure = state.outcome.exception() if state.outcome is not None else None
    return failure if isinstance(failure, ArtifactStoreError) else None
