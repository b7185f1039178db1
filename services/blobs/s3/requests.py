"""Single requests to an S3 store: signed, timed out, tried a few times, with errors that name the cause.

The MinIO SDK signs (with a fixed region, so that signing sends no request to the store); aiohttp carries the bytes.
Every body that is put has a checksum among the signed headers, or after the body if it is relayed: the store refuses
bytes that were altered in transit. The payload itself is not signed, because that would cost another SHA-256 for large
parts. A signature is a credential for some minutes: it stays inside this file, and no error text or chained exception
shows it. Only `presign` hands one out, in an address for a client.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import SplitResult, quote, urlsplit
from weakref import WeakSet
from xml.etree import ElementTree

import aiohttp
import urllib3
from minio import Minio
from minio.credentials.credentials import Credentials
from minio.error import MinioException, S3Error
from minio.signer import sign_v4_s3
from minio.time import to_amz_date, to_signer_date
from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    retry_if_not_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential_jitter,
)
from yarl import URL

from artifact_store.errors import UnavailableError
from artifact_store.rules import parse_number
from services.blobs.memory import PartBuffer
from services.runtime import tracing
from services.runtime.clock import Clock, StoreClock, system_clock
from services.runtime.metrics import OPERATION_FAILURES, OPERATION_SECONDS

ATTEMPTS = 4
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 30.0
SLOWEST_BYTES_PER_SECOND = 256 * 1024  # a transfer below this rate is given up
CHECKSUM_SHA256 = "x-amz-checksum-sha256"
CHECKSUM_CRC32 = "x-amz-checksum-crc32"
TELL_CHECKSUM = {"x-amz-checksum-mode": "ENABLED"}
"""Header of a HEAD or GET that makes a store return the checksum that it keeps of the whole object."""
_UNSIGNED = "UNSIGNED-PAYLOAD"
_UNSIGNED_WITH_TRAILER = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
_SLICE = 256 * 1024
_ALTERED_CODES = {"BadDigest", "XAmzContentChecksumMismatch"}  # Amazon S3 and SeaweedFS, MinIO
_PASSING_CODES = {"SlowDown", "RequestTimeout", "InternalError", "OperationAborted", "ServiceUnavailable"}
_FULL_CODES = {"XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded"}  # MinIO, MinIO, Ceph (a 403)
_FULL_RETRY_SECONDS = 10.0  # nobody makes room within a second

_T = TypeVar("_T")


class StoreTroubleError(UnavailableError):
    """A temporary failure: another attempt makes sense."""


class StoreSilentError(StoreTroubleError):
    """The store gave no answer before the request timed out: another attempt would take the caller as long again."""


class AccessRefusedError(UnavailableError):
    """The store does not accept the credentials, or they do not permit the request."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the store is and how to sign for it."""

    host: str
    bucket: str
    secure: bool
    access_key: str
    secret_key: str
    region: str

    def __post_init__(self) -> None:
        if not self.region:
            raise ValueError("without a region the SDK would ask the store for it while it signs")

    def __repr__(self) -> str:
        return f"Endpoint({self.host}/{self.bucket})"

    def sdk(self, seconds: float = ANSWER_SECONDS) -> Minio:
        """The synchronous SDK for this store; its own requests have few attempts, each answered within `seconds`."""
        pool = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=seconds),
            retries=urllib3.Retry(total=2, backoff_factor=0.2, status_forcelist=[500, 502, 503, 504]),
            cert_reqs="CERT_REQUIRED",
        )
        return Minio(
            self.host,
            access_key=self.access_key,
            secret_key=self.secret_key,
            secure=self.secure,
            region=self.region,
            http_client=pool,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """The store's answer. `body` is read whole, so this is only for requests with small answers."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def code(self) -> str:
        """The S3 error code; empty if the body is not an S3 error."""
        root = parse_xml(self.body)
        return (root.findtext("Code") or "") if root is not None and root.tag == "Error" else ""


@dataclass(slots=True)
class Relay:
    """A request body of known length that can be read only once, so such a request has a single attempt.

    Its checksum is known only at its end and follows it: the body is sent in chunks (`aws-chunked`) with a trailer.
    """

    pieces: AsyncIterator[bytes]
    """Each has `piece_bytes`, except the last."""
    length: int
    piece_bytes: int
    crc32: int = 0
    """The CRC-32 of the pieces that were sent."""

    @property
    def framed_length(self) -> int:
        """Bytes that are sent, framing and trailer included."""
        full, rest = divmod(self.length, self.piece_bytes)
        framing = full * len(_framing(self.piece_bytes)) + (len(_framing(rest)) if rest else 0)
        return self.length + framing + len(_trailer(0))

    async def framed(self) -> AsyncIterator[bytes]:
        """The chunks."""
        async for piece in self.pieces:
            self.crc32 = zlib.crc32(piece, self.crc32)
            yield b"%x\r\n%b\r\n" % (len(piece), piece)
        yield _trailer(self.crc32)


def _framing(size: int) -> bytes:
    return b"%x\r\n\r\n" % size


def _trailer(crc32: int) -> bytes:
    return f"0\r\n{CHECKSUM_CRC32}:{crc32_text(crc32)}\r\n\r\n".encode()


def crc32_text(crc32: int) -> str:
    """A CRC-32 as S3 writes it: its four bytes in base64."""
    return base64.b64encode(crc32.to_bytes(4, "big")).decode()


def patience(length: int, seconds: float = ANSWER_SECONDS) -> float:
    """How long a request with a body of `length` bytes may take, in seconds; `seconds` of them for the answer."""
    return seconds + length / SLOWEST_BYTES_PER_SECOND


def _length(body: bytes | PartBuffer | Relay | None) -> int:
    return 0 if body is None else body.length if isinstance(body, Relay) else len(body)


def parse_xml(body: bytes) -> ElementTree.Element | None:
    """The root of an S3 answer without its namespace, or None if the body is not XML."""
    if not body:
        return None
    try:
        root = ElementTree.fromstring(body.strip())  # noqa: S314 - the configured store's answers; expat bounds entities
    except (ElementTree.ParseError, LookupError, ValueError):  # the last two: an unknown encoding
        return None
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


class S3Requests:
    """Sends requests for objects of one bucket. Belongs to one event loop, in which its session opens at first use."""

    def __init__(
        self, endpoint: Endpoint, *, connections: int = 256, attempts: int = ATTEMPTS, own_clock: Clock = system_clock
    ) -> None:
        self.endpoint = endpoint
        self.clock = StoreClock(own_clock)
        self._sdk = endpoint.sdk()
        self._connections = connections
        self._attempts = attempts
        self._session: aiohttp.ClientSession | None = None
        self._wrote_at: float | None = None
        self._transports: WeakSet[asyncio.Transport] = WeakSet()

    async def send(
        self,
        method: str,
        key: str,
        expect: frozenset[int],
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | PartBuffer | Relay | None = None,
        attempts: int | None = None,
        seconds: float = ANSWER_SECONDS,
    ) -> Answer:
        """Send a request until it is answered with one of the statuses in `expect`, and return that answer.

        `seconds` bounds the wait for an answer; a body adds time for its transfer. No further attempt begins after that
        time or after an attempt without an answer, so that a hanging store costs this wait only once. A body is sent
        with its CRC-32 unless the headers already contain a checksum.

        Raises:
            UnavailableError: the store cannot be reached, is full, or answers with another status.
        """

        async def once() -> Answer:
            return await self._once(method, key, expect, query or {}, headers or {}, body, seconds)

        limit = patience(_length(body), seconds)
        writes, began = method in ("PUT", "POST"), asyncio.get_running_loop().time()
        try:
            kind = "blobs", method.lower()
            with OPERATION_SECONDS.labels(*kind).time(), OPERATION_FAILURES.labels(*kind).count_exceptions():
                sending = self.retry(once, attempts=1 if isinstance(body, Relay) else attempts, seconds=limit)
                tracer = tracing.tracer
                answer = await (sending if tracer is None else self._traced(tracer, method, key, sending))
        except UnavailableError:
            self._wrote_at = None if writes else self._wrote_at
            raise
        self._wrote_at = began if writes else self._wrote_at
        return answer

    async def _traced(self, tracer: tracing.Tracer, method: str, key: str, sending: Awaitable[Answer]) -> Answer:
        url = self._url(key, {})  # without the query, which may hold a signature
        attributes = {"http.request.method": method, "url.full": url, **tracing.server_of(url)}
        with tracer.step(method, "client", attributes):
            return await sending

    def wrote_within(self, seconds: float) -> bool:
        """Whether the last write request succeeded, and began within the last `seconds`."""
        return self._wrote_at is not None and asyncio.get_running_loop().time() < self._wrote_at + seconds

    async def retry(
        self, act: Callable[[], Awaitable[_T]], *, attempts: int | None = None, seconds: float = ANSWER_SECONDS
    ) -> _T:
        """Repeat an idempotent request, after a short pause, while it raises StoreTroubleError within `seconds`.

        StoreSilentError ends it. Retrying is set up only when needed: that costs as much as a small request, and
        hardly any request is sent twice.
        """
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            return await act()
        except StoreSilentError:
            raise
        except StoreTroubleError as error:
            failed: StoreTroubleError | None = error

        async def again() -> _T:
            nonlocal failed
            if failed is not None:  # the first attempt was made already
                first, failed = failed, None
                raise first
            return await act()

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(StoreTroubleError) & retry_if_not_exception_type(StoreSilentError),
            stop=stop_after_attempt(attempts or self._attempts) | stop_after_delay(seconds - (clock() - began)),
            wait=wait_exponential_jitter(multiplier=0.1, max=2.0, jitter=0.1),
            reraise=True,
        )
        return await retrying(again)

    @asynccontextmanager
    async def get(self, key: str, first: int, last: int) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask once for the bytes `first` to `last` (inclusive); the caller reads the content of the response.

        Failures while the caller reads are raised from this context as well.

        Raises:
            StoreTroubleError, UnavailableError: as `send`. The caller handles the statuses 206, 404 and 416.
        """
        with _Explained(self, ANSWER_SECONDS):
            url, headers = self._signed("GET", key, {}, {"Range": f"bytes={first}-{last}"})
            async with self._opened().request("GET", url, headers=headers, allow_redirects=False) as response:
                if response.status != 206:
                    answer = Answer(response.status, response.headers, await response.read())
                    self._judge("GET", key, answer, frozenset({404, 416}))
                yield response

    def presign(
        self, key: str, query: Mapping[str, str], headers: Mapping[str, str], seconds: int, now: datetime
    ) -> str:
        """The URL of a PUT that anyone may send with exactly these headers for `seconds` from `now` on."""
        scope = f"{to_signer_date(now)}/{self.endpoint.region}/s3/aws4_request"
        named = ("host", *(name.lower() for name in headers))
        asked = {
            **query,
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
            "X-Amz-Credential": f"{self.endpoint.access_key}/{scope}",
            "X-Amz-Date": to_amz_date(now),
            "X-Amz-Expires": str(seconds),
            "X-Amz-SignedHeaders": ";".join(sorted(named)),
        }
        url = self._url(key, asked)
        split = urlsplit(url)
        # The signed text differs from that of a signature in headers only by these parameters.
        signed = self._signature("PUT", split, {**headers, "Host": split.netloc}, _UNSIGNED, now)
        return f"{url}&X-Amz-Signature={signed['Authorization'].rpartition('=')[2]}"

    async def put_presigned(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Send a PUT to such a URL, once, as a client would. Raises UnavailableError without an answer."""
        with _Explained(self, ANSWER_SECONDS):
            async with (
                asyncio.timeout(ANSWER_SECONDS),
                self._opened().put(URL(url, encoded=True), headers=headers, data=body, allow_redirects=False) as found,
            ):
                return Answer(found.status, found.headers, await found.read())

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None
            for transport in list(self._transports):
                socket = transport.get_extra_info("socket")
                if socket is not None and socket.fileno() >= 0:  # aborting a closed transport fails inside asyncio
                    transport.abort()
            await asyncio.sleep(0)  # lets the loop drop the aborted transports

    def unavailable(self, reason: str) -> UnavailableError:
        """An error that names the store and the reason."""
        return UnavailableError(f"the blob store at {self.endpoint.host} {reason}")

    def no_bucket(self) -> UnavailableError:
        """The error for a bucket that does not exist."""
        return self.unavailable(
            f"has no bucket {self.endpoint.bucket}: `artifact-store migrate` creates it; if it was deleted, restore it "
            "from a copy first"
        )

    def refused(self, code: str) -> AccessRefusedError:
        """The error for refused credentials, or for a wrong clock."""
        if code == "RequestTimeTooSkewed":
            return AccessRefusedError(
                f"the blob store at {self.endpoint.host} refuses requests of this machine's time: set the clock that "
                "is wrong, best by NTP on both"
            )
        return AccessRefusedError(
            f"the blob store at {self.endpoint.host} refuses access ({code or 'no reason given'}): check "
            "ARTIFACT_STORE_S3_ACCESS_KEY, ARTIFACT_STORE_S3_SECRET_KEY, ARTIFACT_STORE_S3_REGION and the clock"
        )

    @contextmanager
    def sdk_errors(self) -> Iterator[None]:
        """Turn what the SDK raises within the block into UnavailableError."""
        try:
            yield
        except S3Error as error:
            if error.response.status in {401, 403}:
                raise self.refused(error.code or "") from None
            if error.code == "NoSuchBucket":
                raise self.no_bucket() from None
            raise self.unavailable(f"answered {error.code}") from None
        except (MinioException, urllib3.exceptions.HTTPError) as error:
            raise self.unavailable(f"cannot be reached ({type(error).__name__})") from None

    async def _once(
        self,
        method: str,
        key: str,
        expect: frozenset[int],
        query: Mapping[str, str],
        headers: Mapping[str, str],
        body: bytes | PartBuffer | Relay | None,
        seconds: float,
    ) -> Answer:
        length = _length(body)
        sent = dict(headers)
        payload = _UNSIGNED
        data: object = None
        if isinstance(body, Relay):
            data = body.framed()
            payload = _UNSIGNED_WITH_TRAILER
            sent["Content-Encoding"] = "aws-chunked"
            sent["Content-Length"] = str(body.framed_length)
            sent["x-amz-decoded-content-length"] = str(length)
            sent["x-amz-trailer"] = CHECKSUM_CRC32
        elif isinstance(body, bytes | PartBuffer) and length > _SLICE:
            data = _slices(body)
            sent["Content-Length"] = str(length)
        elif isinstance(body, PartBuffer):
            data = body.read(0, length)
        else:
            data = body
        if isinstance(body, bytes) and method != "PUT":
            payload = hashlib.sha256(body).hexdigest()  # a checksum here would be that of the object
        elif isinstance(body, bytes | PartBuffer) and CHECKSUM_SHA256 not in sent:
            sent[CHECKSUM_CRC32] = crc32_text(body.crc32 if isinstance(body, PartBuffer) else zlib.crc32(body))
        url, sent = self._signed(method, key, query, sent, payload)
        limit = patience(length, seconds)
        began = time.monotonic()
        with _Explained(self, limit):
            async with (
                asyncio.timeout(limit),
                self._opened().request(
                    method,
                    url,
                    headers=sent,
                    data=data,
                    allow_redirects=False,
                    timeout=_bounds(max(ANSWER_SECONDS, seconds)),
                ) as response,
            ):
                self._note_time(response.headers.get("Date"), began)
                answer = Answer(response.status, response.headers, await response.read())
        self._judge(method, key, answer, expect)
        return answer

    def _note_time(self, date: str | None, sent: float) -> None:
        """Learn the store's time from the answer's `Date` (RFC 9110 §6.6.1), also from refusals."""
        with suppress(ValueError, OverflowError):
            if date is not None:
                self.clock.heard(int(parsedate_to_datetime(date).timestamp()), sent)

    def _judge(self, method: str, key: str, answer: Answer, expect: frozenset[int]) -> None:
        code = answer.code
        if code == "NoSuchBucket":
            raise self.no_bucket()
        if answer.status in expect:
            return
        if answer.status == 507 or code in _FULL_CODES:
            full = self.unavailable("is full: make room in it, or raise the bucket's quota; uploads then go on")
            full.retry_after = _FULL_RETRY_SECONDS
            raise full
        if answer.status in {401, 403}:
            raise self.refused(code)
        if code in _ALTERED_CODES:
            raise StoreTroubleError(str(self.unavailable(f"received other bytes than were sent to {method} {key}")))
        reason = f"answered {answer.status} {code}".rstrip() + f" to {method} {key}"
        if answer.status >= 500 or answer.status == 429 or code in _PASSING_CODES:
            raise StoreTroubleError(str(self.unavailable(reason)))
        raise self.unavailable(reason)

    @cached_property
    def _bucket_url(self) -> str:
        """The SDK's URL of the bucket, below which its keys lie: the bucket may be part of the path or of the host."""
        return self._sdk.get_presigned_url("GET", self.endpoint.bucket, "k").partition("?")[0].removesuffix("k")

    def _signed(
        self,
        method: str,
        key: str,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        payload: str = _UNSIGNED,
    ) -> tuple[URL, dict[str, str]]:
        """The URL, and the headers with a signature over all of them except the length."""
        url = self._url(key, query)
        split = urlsplit(url)
        now = datetime.now(UTC)
        named = {**headers, "Host": split.netloc, "x-amz-date": to_amz_date(now), "x-amz-content-sha256": payload}
        # Quoting anything again would break the signature.
        return URL(url, encoded=True), self._signature(method, split, named, payload, now)

    def _url(self, key: str, query: Mapping[str, str]) -> str:
        asked = "&".join(f"{name}={quote(value, safe='')}" for name, value in query.items())
        return f"{self._bucket_url}{quote(key)}{'?' if asked else ''}{asked}"

    def _signature(
        self, method: str, url: SplitResult, headers: Mapping[str, str], payload: str, now: datetime
    ) -> dict[str, str]:
        """The headers with `Authorization`."""
        signed = sign_v4_s3(
            method=method,
            url=url,
            region=self.endpoint.region,
            headers=dict(headers),
            credentials=Credentials(self.endpoint.access_key, self.endpoint.secret_key),
            content_sha256=payload,
            date=now,
        )
        return {name: str(value) for name, value in signed.items()}

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=_Connector(self._transports, limit=self._connections),
                timeout=_bounds(ANSWER_SECONDS),
                headers={"Accept-Encoding": "identity"},
                auto_decompress=False,
                read_bufsize=_SLICE,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session


def _bounds(silence: float) -> aiohttp.ClientTimeout:
    """The time-outs of one request: for connecting, and for how long the store may be silent."""
    return aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=silence)


class _Connector(aiohttp.TCPConnector):
    """Remembers its transports: after a cancelled request one lingers, unseen by the session, to flush its buffer."""

    def __init__(self, transports: WeakSet[asyncio.Transport], *, limit: int) -> None:
        super().__init__(limit=limit)
        self._transports = transports

    async def connect(self, *args: Any, **named: Any) -> aiohttp.connector.Connection:
        connection = await super().connect(*args, **named)
        if connection.transport is not None:
            self._transports.add(connection.transport)
        return connection


class _Explained:
    """Turns errors of aiohttp, whose texts may contain the URL, into an error without the URL and without a cause."""

    def __init__(self, requests: S3Requests, limit: float) -> None:
        self._requests = requests
        self._limit = limit

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        kind_of_trouble = StoreTroubleError
        if isinstance(error, TimeoutError):
            reason = f"gave no answer in time (at most {self._limit:.0f} s, {CONNECT_SECONDS:.0f} s to connect)"
            if not isinstance(error, aiohttp.ConnectionTimeoutError):
                kind_of_trouble = StoreSilentError
        elif isinstance(error, aiohttp.ClientSSLError):
            # This trouble does not pass by itself. The number in the error is OpenSSL's, not the system's.
            raise self._requests.unavailable(_insecure(error)) from None
        elif isinstance(error, aiohttp.ClientConnectorError):
            cause = error.os_error
            reason = f"cannot be reached ({os.strerror(cause.errno) if cause.errno else type(cause).__name__})"
        elif isinstance(error, aiohttp.ClientError | OSError):
            reason = f"was lost in the middle of a request ({type(error).__name__})"
        else:
            return
        raise kind_of_trouble(str(self._requests.unavailable(reason))) from None


def _insecure(error: aiohttp.ClientSSLError) -> str:
    if not isinstance(error, aiohttp.ClientConnectorCertificateError):
        reason = getattr(error.os_error, "reason", None) or type(error).__name__
        return f"makes no TLS connection ({reason}): without TLS, ARTIFACT_STORE_BLOBS_URL must begin with s3+http:"
    reason = getattr(error.certificate_error, "verify_message", "") or type(error).__name__
    return (
        f"has a certificate that is not trusted ({reason}): the file in SSL_CERT_FILE must hold its authority's "
        "certificate, and ARTIFACT_STORE_BLOBS_URL the name that it was made for"
    )


async def _slices(body: bytes | PartBuffer) -> AsyncIterator[bytes]:
    """The body in pieces: aiohttp would write one of several MiB to the socket at once, and warn."""
    for start in range(0, len(body), _SLICE):
        end = start + _SLICE
        yield body[start:end] if isinstance(body, bytes) else body.read(start, end)


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A store's description of an object: bytes, ETag, and the checksums of the whole in base64 if it keeps them."""

    length: int
    etag: str
    crc32: str | None
    sha256: str | None


async def find_object(requests: S3Requests, key: str, attempts: int | None = None) -> StoredObject | None:
    """The store's description of an object; None if there is no such object. Raises UnavailableError."""
    found = await requests.send("HEAD", key, frozenset({200, 404}), headers=TELL_CHECKSUM, attempts=attempts)
    if found.status == 404:
        return None

    length = parse_number(found.headers.get("Content-Length", ""))
    if length is None:
        raise UnavailableError(f"the blob store names no length of {key}")

    def checksum(name: str) -> str | None:
        told = found.headers.get(name)
        return None if told is None or "-" in told else told  # one that ends in -3 covers the checksums of three parts

    return StoredObject(
        length,
        found.headers.get("ETag", ""),
        checksum(CHECKSUM_CRC32),
        checksum(CHECKSUM_SHA256),
    )
