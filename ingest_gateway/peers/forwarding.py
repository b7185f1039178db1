"""Forwarding: sends small commands to the gateway that owns their partition, and defines the messages between them.

Bytes of files are never forwarded.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from io import BytesIO
from types import TracebackType
from typing import Any, Self, TypeVar
from uuid import UUID

import aiohttp
import cbor2
from pydantic import TypeAdapter

from artifact_store.errors import InvalidRequestError, PushBackError, UnavailableError
from artifact_store.models import Acknowledgement
from artifact_store.rules import MAX_NUMBER, check_text, parse_number
from ingest_gateway.peers.authentication import PeerCredentials
from services.core.access import EVERYTHING
from services.core.decide import Command, CreatePackage, IngestCheck, may_answer, require_write
from services.core.wire import (
    LAST_TIME,
    OLDEST,
    SAYS_GRANTS,
    SAYS_PRINCIPAL,
    VERSION,
    decode_acknowledgement,
    decode_error,
    encode_check,
    encode_command,
)
from services.log.port import PackageExtent, PartitionStatus
from services.log.records import AcceptLoss, Confirmation, SkipRecord
from services.runtime import tracing
from services.runtime.tracing import TRACEPARENT

CONTENT_TYPE = "application/cbor"
COMMANDS_PATH = "/commands"
CHECKS_PATH = "/checks"
EXTENTS_PATH = "/extents"
ENDS_PATH = "/ends"
STATUS_PATH = "/status"
PROCESS_PATH = "/process"
CONFIRMATIONS_PATH = "/confirmations"
WIRE_READS = "Artifact-Store-Wire-Reads"
"""The header with the newest version that the sender can read. Acknowledgements and errors are sent in that version, or
in the newest one that the answering process knows."""

WIRE_VERSION = "Artifact-Store-Wire-Version"
"""The header with the version of a message; in answers, the newest version that the process knows. Absent means 1."""

_CONFIRMATIONS: dict[str, type[Confirmation]] = {"skip": SkipRecord, "accept-loss": AcceptLoss}


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """What a gateway process reports about itself; later releases add fields with defaults."""

    release: str
    components: Mapping[str, str | None]
    """By component, why it does not work; None if it does. The same as in `/readyz`."""
    clock_skew_seconds: float | None
    """How far the process's clock is ahead of the blob store's (negative: behind); None if that is not known."""
    state_free_bytes: int | None
    """Free space on the disk of the process's state; None if it has no state yet."""
    certificates: Mapping[str, float]
    """When its certificates expire, in seconds since 1970, by setting."""
    bucket: str | None = None
    """Where it keeps blobs, as `bucket_of` names it; None if its release does not say so."""


_STATUS = TypeAdapter(PartitionStatus)
_PROCESS = TypeAdapter(ProcessStatus)
_TOLD = [field.name for field in fields(PartitionStatus) if field.name != "owner"]
"""The fields that a process reports about each of its partitions, in this order."""

_Message = TypeVar("_Message")

_UNREADABLE = (cbor2.CBORDecodeError, ValueError, TypeError, RecursionError, OverflowError)

MAX_FORWARDED = 1024
"""How many commands and questions may be in flight, at most half of them to one process: each has a connection."""

DECODED_AT_ONCE_BYTES = 64 << 10
"""A longer message is decoded in a thread."""

_ANSWER_BYTES = 64 << 10
"""How much longer an answer may be than the question: for each file of a command, it has less than the command."""

_STATUS_BYTES = 4 << 20
"""The same for a process's report about its partitions: some hundred bytes for each."""

_CONNECT_SECONDS = 2.0
_TOTAL_SECONDS = 40.0


class _UnknownQuestionError(UnavailableError):
    """The other gateway's release does not know this question."""


class HttpForwarder:
    """See `Forwarder`. Used as an asynchronous context manager, which holds the connections."""

    def __init__(self, credentials: PeerCredentials) -> None:
        self._credentials = credentials
        self._session: aiohttp.ClientSession | None = None
        self._on_their_way: Counter[str] = Counter()
        self._versions: dict[str, int] = {}
        """The newest version of messages that the process at each URL is known to read."""

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            # `_place` limits them. A limit here would let commands of a hanging partition delay those of others.
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=_TOTAL_SECONDS, sock_connect=_CONNECT_SECONDS),
            headers={"Content-Type": CONTENT_TYPE, "Accept-Encoding": "identity"},
            auto_decompress=False,  # so that an answer cannot become longer than it was sent
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def submit(self, owner_url: str, command: Command) -> Acknowledgement:
        """See `Forwarder`. Raises PushBackError, before anything is sent, if too many are in flight."""
        with self._place(owner_url):
            version = await self._version_for(owner_url, command)
            answer = await self._post(owner_url, COMMANDS_PATH, encode_command(command, version), version)
        # Even the first answer has all fields that both releases know, although the command was in the oldest version.
        return await decoded(_acknowledgement_of, answer, command, self._versions.get(owner_url, OLDEST))

    async def check_ingest(self, owner_url: str, asked: IngestCheck) -> str | None:
        """See `Forwarder`. Raises PushBackError as `submit`."""
        with self._place(owner_url):
            version = await self._version_for(owner_url, asked)
            answer = await self._post(owner_url, CHECKS_PATH, encode_check(asked, version), version)
        return decode_class(answer)

    async def status(self, owner_url: str) -> list[PartitionStatus]:
        """The state of the partitions that the process at this URL owns. Raises UnavailableError."""
        return decode_status(await self._ask_status(owner_url), owner_url)

    async def process(self, owner_url: str) -> ProcessStatus | None:
        """The report of the process at this URL; None if its release cannot give one. Raises UnavailableError."""
        try:
            return decode_process(await self._post(owner_url, PROCESS_PATH, b""))
        except _UnknownQuestionError:
            return None

    async def confirm(self, owner_url: str, confirmation: Confirmation) -> Acknowledgement:
        """Ask the partition's owner to record an operator's confirmation. Raises as `KafkaWriter.confirm_here`."""
        answer = await self._post(owner_url, CONFIRMATIONS_PATH, encode_confirmation(confirmation))
        return _read_acknowledgement(answer, OLDEST)

    async def end(self, owner_url: str, partition: int) -> int | None:
        """See `Forwarder`. Raises PushBackError as `submit`."""
        try:
            with self._place(owner_url):
                return decode_end(await self._post(owner_url, ENDS_PATH, cbor2.dumps(partition)))
        except _UnknownQuestionError:
            return None

    async def extent(self, owner_url: str, package_id: UUID) -> PackageExtent | None:
        """See `Forwarder`. An owner of the previous release does not know the question: UnavailableError."""
        with self._place(owner_url):
            return decode_extent(await self._post(owner_url, EXTENTS_PATH, package_id.bytes))

    async def _version_for(self, owner_url: str, asked: Command | IngestCheck) -> int:
        """The version in which to ask the process at this URL.

        A process of the previous release checks no rights, and records no principal beside the actor. So it gets only
        commands without a principal, of senders with all rights, and commands to create packages, which this process
        can check by itself. Raises ForbiddenError if that check fails, PushBackError for all other commands.
        """
        needed = OLDEST if asked.grants is EVERYTHING else SAYS_GRANTS
        if asked.principal is not None:
            needed = SAYS_PRINCIPAL
        version = self._versions.get(owner_url, OLDEST)
        if version >= needed:
            return version
        if isinstance(asked, CreatePackage) and asked.principal is None:
            require_write(None, asked)
            return version
        await self._ask_status(owner_url)  # its answer says which versions the process reads
        version = self._versions.get(owner_url, OLDEST)
        if version < needed:
            lacks = "check what a token may do" if asked.principal is None else "record who sent a command for another"
            raise PushBackError(
                f"the owner of the partition is a gateway of the previous release, which cannot {lacks}: upgrade all "
                "gateways",
                5.0,
            )
        return version

    @contextmanager
    def _place(self, owner_url: str) -> Iterator[None]:
        on_their_way = self._on_their_way
        if on_their_way.total() >= MAX_FORWARDED or on_their_way[owner_url] >= MAX_FORWARDED // 2:
            raise PushBackError("too many commands are on their way to the writer of the package's partition", 2.0)
        on_their_way[owner_url] += 1
        try:
            yield
        finally:
            on_their_way[owner_url] -= 1
            if not on_their_way[owner_url]:
                del on_their_way[owner_url]

    async def _ask_status(self, owner_url: str) -> bytes:
        return await self._post(owner_url, STATUS_PATH, b"", most=_STATUS_BYTES)

    async def _post(
        self, owner_url: str, path: str, body: bytes, version: int = OLDEST, most: int = _ANSWER_BYTES
    ) -> bytes:
        """The answer, which may be `most` bytes longer than the body. Raises the error in it, and UnavailableError."""
        tracer = tracing.tracer
        if tracer is None:
            return await self._send(owner_url, path, body, version, most)
        attributes = {"http.request.method": "POST", "url.full": owner_url + path, **tracing.server_of(owner_url)}
        with tracer.step("POST", "client", attributes):
            return await self._send(owner_url, path, body, version, most)

    async def _send(self, owner_url: str, path: str, body: bytes, version: int, most: int) -> bytes:
        if self._session is None:
            raise UnavailableError("forwarding is closed")
        try:
            trace = TRACEPARENT.get()
            proof = self._credentials.for_request(owner_url)
            proof["headers"] |= {WIRE_VERSION: str(version), WIRE_READS: str(VERSION)}
            if trace is not None:
                proof["headers"]["traceparent"] = trace
            # aiohttp sends a body, even an empty one, in a separate task. If the connection is lost meanwhile, the
            # error of an empty body stays in that task, and Python logs it for each request.
            data = BytesIO(body) if body else None
            async with self._session.post(owner_url + path, data=data, allow_redirects=False, **proof) as response:
                answer = await _read(response, len(body) + most)
                status, kind = response.status, response.content_type
                self._note_version(owner_url, response.headers.get(WIRE_VERSION, ""))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UnavailableError(
                f"the owner of the partition cannot be reached ({type(error).__name__}); the outcome is unknown"
            ) from error
        if kind != CONTENT_TYPE and status == 403:  # otherwise it is the owner's answer to the command
            raise UnavailableError(
                "the owner of the partition refuses this gateway's certificate or internal secret: give every gateway "
                "a certificate of the same authority, or the same ARTIFACT_STORE_INTERNAL_SECRET"
            )
        if kind != CONTENT_TYPE and status == 404:
            raise _UnknownQuestionError("the owner of the partition is of a release that does not know the question")
        if kind != CONTENT_TYPE:
            raise UnavailableError(f"the owner of the partition answered with status {status} and no reason")
        if status != 200:
            raise decode_error(answer)
        return answer

    def _note_version(self, owner_url: str, newest: str) -> None:
        """Replace the version known for this URL: a process of another release may have taken it over."""
        known = min(parse_number(newest) or OLDEST, VERSION)
        if known > OLDEST:
            self._versions[owner_url] = known
        else:
            self._versions.pop(owner_url, None)


async def decoded(decode: Callable[..., _Message], body: bytes, *more: Any) -> _Message:
    """Decode a message. A long one is decoded in a thread: 10,000 files take tens of milliseconds."""
    if len(body) <= DECODED_AT_ONCE_BYTES:
        return decode(body, *more)
    return await asyncio.to_thread(decode, body, *more)


async def _read(response: aiohttp.ClientResponse, most: int) -> bytes:
    """The body of an answer. Raises UnavailableError if it is longer than `most`, or compressed."""
    found = bytearray()
    if "Content-Encoding" not in response.headers:
        async for piece in response.content.iter_any():
            found += piece
            if len(found) > most:
                break
        else:
            return bytes(found)
    raise _unreadable()


def _unreadable() -> UnavailableError:
    """The error for an unreadable answer. It is not a rejection, because the command may be recorded."""
    return UnavailableError("the owner of the partition gave an answer that cannot be read")


def _read_acknowledgement(data: bytes, version: int) -> Acknowledgement:
    try:
        return decode_acknowledgement(data, version)
    except InvalidRequestError as error:
        raise _unreadable() from error


def _acknowledgement_of(data: bytes, command: Command, version: int) -> Acknowledgement:
    """The answer to this command. Raises UnavailableError if it answers another command."""
    found = _read_acknowledgement(data, version)
    if not may_answer(found, command):
        raise UnavailableError("the owner of the partition answered another command")
    return found


def decode_class(data: bytes) -> str | None:
    """Read the name of a retention class; None if the owner does not tell it. Raises UnavailableError."""
    if not data:
        return None
    try:
        name = data.decode()
        check_text("retention_class", name)
    except ValueError:  # InvalidRequestError is one
        raise _unreadable() from None
    return name


def decode_end(data: bytes) -> int:
    """Read the number of a partition or an offset. Raises UnavailableError if it is neither."""
    try:
        found = cbor2.loads(data)
    except _UNREADABLE:
        found = None
    if type(found) is not int or not 0 <= found <= MAX_NUMBER:
        raise UnavailableError("another gateway sent an invalid number of a partition or record")
    return found


def encode_extent(found: PackageExtent | None) -> bytes:
    """Where a package's events lie, as CBOR."""
    return cbor2.dumps(None if found is None else [found.created_at, found.last_sequence])


def decode_extent(data: bytes) -> PackageExtent | None:
    """Read the result of `encode_extent`. Raises UnavailableError if it comes from another release."""
    try:
        match cbor2.loads(data):
            case None:
                return None
            case [int() as created_at, (int() | None) as last] if 0 <= created_at <= LAST_TIME and (
                last is None or 0 < last <= MAX_NUMBER
            ):
                return PackageExtent(created_at, last)
    except _UNREADABLE:
        pass
    raise _unreadable()


def kind_of(confirmation: Confirmation) -> str:
    """The name of the command by which an operator confirms this."""
    return next(kind for kind, shape in _CONFIRMATIONS.items() if type(confirmation) is shape)


def encode_confirmation(confirmation: Confirmation) -> bytes:
    """An operator's confirmation as CBOR."""
    named = {"kind": kind_of(confirmation), "command_id": confirmation.command_id.bytes}
    return cbor2.dumps({**asdict(confirmation), **named})


def decode_confirmation(data: bytes) -> Confirmation:
    """Read the result of `encode_confirmation`. Raises InvalidRequestError if it comes from another release."""
    try:
        match cbor2.loads(data):
            case {
                "kind": "skip" | "accept-loss" as kind,
                "partition": int() as partition,
                "offset": int() as offset,
                "digest": bytes() as digest,
                "actor": str() as actor,
                "reason": str() as reason,
                "command_id": bytes() as command_id,
            }:
                return _CONFIRMATIONS[kind](partition, offset, digest, actor, reason, UUID(bytes=command_id))
    except _UNREADABLE:
        pass
    raise InvalidRequestError("a confirmation cannot be read")


def encode_status(found: Sequence[PartitionStatus]) -> bytes:
    """The states of a process's partitions as CBOR. Omits the owner, who sends them; later releases append values."""
    return cbor2.dumps([[value for name, value in asdict(s).items() if name != "owner"] for s in found])


def decode_status(data: bytes, owner: str) -> list[PartitionStatus]:
    """Read the result of `encode_status`. Raises UnavailableError if it comes from another release."""
    try:
        return [
            _STATUS.validate_python(dict(zip(_TOLD, values, strict=False)) | {"owner": owner})
            for values in cbor2.loads(data)
        ]
    except _UNREADABLE as error:  # pydantic's error is a ValueError
        raise _unreadable() from error


def encode_process(found: ProcessStatus) -> bytes:
    """A process's report about itself as CBOR."""
    return cbor2.dumps(asdict(found))


def decode_process(data: bytes) -> ProcessStatus:
    """Read the result of `encode_process`. Raises UnavailableError if it comes from another release."""
    try:
        return _PROCESS.validate_python(cbor2.loads(data))
    except _UNREADABLE as error:  # pydantic's error is a ValueError
        raise _unreadable() from error
