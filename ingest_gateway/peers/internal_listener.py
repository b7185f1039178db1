"""The internal listener: other gateways send it commands for partitions that this process owns.

Each process has one, by default on loopback. It only serves clients that prove to be gateways.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, Self
from uuid import UUID

import cbor2
from aiohttp import web

from artifact_store.errors import (
    ArtifactStoreError,
    ConfigurationError,
    InvalidRequestError,
    PushBackError,
    TooLargeError,
    UnavailableError,
)
from artifact_store.models import Acknowledgement
from artifact_store.rules import parse_number
from ingest_gateway.peers.authentication import PeerCredentials
from ingest_gateway.peers.forwarding import (
    CHECKS_PATH,
    COMMANDS_PATH,
    CONFIRMATIONS_PATH,
    CONTENT_TYPE,
    ENDS_PATH,
    EXTENTS_PATH,
    PROCESS_PATH,
    STATUS_PATH,
    WIRE_READS,
    WIRE_VERSION,
    ProcessStatus,
    decode_confirmation,
    decode_end,
    decoded,
    encode_extent,
    encode_process,
    encode_status,
    kind_of,
)
from services.config import Settings
from services.core.decide import Command, IngestCheck
from services.core.wire import VERSION, decode_check, decode_command, encode_acknowledgement, encode_error
from services.identity.audit import Audit
from services.log.kafka.connection import INTERFACE
from services.log.port import PackageExtent, PartitionNotOwnedError, PartitionStatus
from services.log.records import Confirmation
from services.runtime import tracing
from services.runtime.addresses import ListenAddress
from services.runtime.tracing import TRACEPARENT, traceparent

MAX_BODY_BYTES = 32 << 20
"""The largest command: 10,000 files with the longest paths and media types."""

MAX_TAKEN_BYTES = 4 * MAX_BODY_BYTES
"""How many bytes of commands may be in progress here at a time; further ones are pushed back."""

MAX_TAKEN = 1024
"""How many commands and questions may be in progress here at a time; further ones are pushed back."""

_EVERYWHERE = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared with, not listened on
_DRAIN_SECONDS = 5.0


class Here(Protocol):
    """What this process's writer does for other gateways: the methods of `KafkaWriter` that do not forward."""

    async def submit_here(self, command: Command) -> Acknowledgement:
        """As `CommandWriter.submit`; raises PartitionNotOwnedError if this process is not the owner."""

    async def check_ingest_here(self, asked: IngestCheck) -> str:
        """As `CommandWriter.check_ingest`; raises PartitionNotOwnedError if this process is not the owner."""

    async def confirm_here(self, confirmation: Confirmation) -> Acknowledgement:
        """Record an operator's confirmation; raises PartitionNotOwnedError if this process is not the owner."""

    async def end_here(self, partition: int) -> int:
        """As `CommandWriter.end`, of one partition; raises PartitionNotOwnedError if this process is not the owner."""

    async def extent_here(self, package_id: UUID) -> PackageExtent | None:
        """As `CommandWriter.extent`; raises PartitionNotOwnedError if this process is not the owner."""

    def status_here(self) -> Sequence[PartitionStatus]:
        """The state of the partitions that this process owns."""


About = Callable[[], Awaitable[ProcessStatus]]
"""Reports the health of this process."""


@contextmanager
def _of_another_release() -> Iterator[None]:
    """Treat an unreadable message as one of another release, which is not the client's fault: UnavailableError."""
    try:
        yield
    except InvalidRequestError as error:
        raise UnavailableError(f"{error.detail}: the gateways are of different releases") from None


class InternalListener:
    """Listens from `open` to `close`. Until `serve` is called it answers that it owns no partition."""

    def __init__(self, credentials: PeerCredentials, audit: Audit | None = None) -> None:
        """`audit` records who was refused, and what operators confirmed."""
        self.url = ""
        self._credentials = credentials
        self._audit = audit or Audit(None)
        self._here: Here | None = None
        self._about: About | None = None
        self._taken = self._taken_bytes = 0
        self._runner: web.AppRunner | None = None

    @classmethod
    async def open(cls, settings: Settings, credentials: PeerCredentials, audit: Audit | None = None) -> Self:
        """Bind `internal_listen` and set `url` to `internal_url`, or else to the bound address.

        Raises ConfigurationError: the address is invalid or taken, others cannot reach it, or it needs a certificate.
        """
        try:
            address = ListenAddress.parse(settings.internal_listen)
        except ValueError:
            raise ConfigurationError("ARTIFACT_STORE_INTERNAL_LISTEN must be HOST:PORT, such as 127.0.0.1:0") from None
        if credentials.for_loopback_alone and not address.is_loopback:
            raise ConfigurationError(
                "ARTIFACT_STORE_INTERNAL_LISTEN names an interface that other machines reach: set "
                "ARTIFACT_STORE_PEER_CERT, ARTIFACT_STORE_PEER_KEY and ARTIFACT_STORE_PEER_CA, or "
                "ARTIFACT_STORE_INTERNAL_SECRET"
            )
        if settings.internal_url is None and address.host in _EVERYWHERE:
            raise ConfigurationError(
                "ARTIFACT_STORE_INTERNAL_LISTEN names every interface: set ARTIFACT_STORE_INTERNAL_URL to the address "
                "at which other gateways reach this one"
            )
        url, secure = settings.internal_url, credentials.server_context is not None
        if url is not None and secure != url.startswith("https:"):
            raise ConfigurationError(
                f"ARTIFACT_STORE_INTERNAL_URL must begin with {'https:' if secure else 'http:'}, because this gateway "
                f"has {'a' if secure else 'no'} certificate for others"
            )
        listener = cls(credentials, audit)
        await listener._bind(address)
        if settings.internal_url is not None:
            listener.url = settings.internal_url.rstrip("/")
        return listener

    def serve(self, here: Here, about: About | None = None) -> None:
        """Carry out requests with this writer from now on. `about` reports the process's health to operators."""
        self._here, self._about = here, about

    async def close(self) -> None:
        """Wait at most a few seconds for requests in progress, and release the port."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _bind(self, address: ListenAddress) -> None:
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        for prefix in ("", INTERFACE):  # other gateways may know the URL without or with the prefix
            app.router.add_post(prefix + COMMANDS_PATH, self._command)
            app.router.add_post(prefix + CHECKS_PATH, self._check)
            app.router.add_post(prefix + EXTENTS_PATH, self._extent)
            app.router.add_post(prefix + ENDS_PATH, self._end)
            app.router.add_post(prefix + STATUS_PATH, self._status)
            app.router.add_post(prefix + PROCESS_PATH, self._process)
            app.router.add_post(prefix + CONFIRMATIONS_PATH, self._confirmation)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_DRAIN_SECONDS)
        await self._runner.setup()
        try:
            context = self._credentials.server_context
            await web.TCPSite(self._runner, address.host, address.port, ssl_context=context).start()
        except OSError as error:
            await self._runner.cleanup()
            raise ConfigurationError(
                f"the internal listener cannot use its address ({error.strerror}); set ARTIFACT_STORE_INTERNAL_LISTEN"
            ) from error
        scheme = "http" if context is None else "https"
        self.url = f"{scheme}://{ListenAddress(*self._runner.addresses[0][:2])}"

    async def _command(self, request: web.Request) -> web.Response:
        async def carry_out(here: Here, body: bytes) -> bytes:
            with _of_another_release():
                command = await decoded(decode_command, body, _version_of(request))
            reads = min(_version_of(request, WIRE_READS), VERSION)
            return encode_acknowledgement(await here.submit_here(command), reads)

        return await self._answer(request, carry_out)

    async def _check(self, request: web.Request) -> web.Response:
        async def carry_out(here: Here, body: bytes) -> bytes:
            with _of_another_release():
                asked = await decoded(decode_check, body)
            return (await here.check_ingest_here(asked)).encode()

        return await self._answer(request, carry_out)

    async def _confirmation(self, request: web.Request) -> web.Response:
        async def carry_out(here: Here, body: bytes) -> bytes:
            with _of_another_release():
                confirmation = decode_confirmation(body)
            status = 500
            try:
                recorded = await here.confirm_here(confirmation)
                status = 200
                return encode_acknowledgement(recorded, _version_of(request))
            except ArtifactStoreError as error:
                status = error.status
                raise
            finally:
                self._audit.record(
                    principal=None,  # the credentials are those of the deployment
                    actor=confirmation.actor,
                    action=f"log {kind_of(confirmation)}",
                    allowed=True,
                    client=request.remote or "",
                    status=status,
                    target=f"{confirmation.partition} {confirmation.offset}",
                )

        return await self._answer(request, carry_out)

    async def _end(self, request: web.Request) -> web.Response:
        async def carry_out(here: Here, body: bytes) -> bytes:
            return cbor2.dumps(await here.end_here(decode_end(body)))

        return await self._answer(request, carry_out)

    async def _extent(self, request: web.Request) -> web.Response:
        async def carry_out(here: Here, body: bytes) -> bytes:
            try:
                package_id = UUID(bytes=body)
            except ValueError:
                raise UnavailableError("the forwarded question is malformed") from None
            return encode_extent(await here.extent_here(package_id))

        return await self._answer(request, carry_out)

    async def _status(self, request: web.Request) -> web.Response:
        async def carry_out(here: Here, _: bytes) -> bytes:
            return encode_status(here.status_here())

        return await self._answer(request, carry_out)

    async def _process(self, request: web.Request) -> web.Response:
        async def carry_out(_: Here, __: bytes) -> bytes:
            if self._about is None:
                raise UnavailableError("this process cannot report its health")
            return encode_process(await self._about())

        return await self._answer(request, carry_out)

    @contextmanager
    def _room(self, size: int) -> Iterator[None]:
        """Reserve room for a body. Raises PushBackError, but never for a request without a body, as for the state."""
        full = self._taken >= MAX_TAKEN or (self._taken and self._taken_bytes + size > MAX_TAKEN_BYTES)
        if size and full:
            raise PushBackError("too many commands are forwarded to the owner of the partition", 2.0)
        self._taken += 1
        self._taken_bytes += size
        try:
            yield
        finally:
            self._taken -= 1
            self._taken_bytes -= size

    async def _answer(self, request: web.Request, carry_out: Callable[[Here, bytes], Awaitable[bytes]]) -> web.Response:
        if not self._credentials.admits(request):
            self._audit.record(
                principal=None,
                action=f"POST {request.path}",
                allowed=False,
                client=request.remote or "",
                status=web.HTTPForbidden.status_code,
            )
            raise web.HTTPForbidden
        if request.content_type != CONTENT_TYPE:
            raise web.HTTPUnsupportedMediaType
        TRACEPARENT.set(traceparent(request.headers.get("traceparent")))
        tracer = tracing.tracer
        if tracer is None:
            return await self._answered(request, carry_out)
        attributes = {"http.request.method": "POST", "http.route": request.path, "url.path": request.path}
        with tracer.step(f"POST {request.path}", "server", {**attributes, "url.scheme": request.scheme}):
            return await self._answered(request, carry_out)

    async def _answered(
        self, request: web.Request, carry_out: Callable[[Here, bytes], Awaitable[bytes]]
    ) -> web.Response:
        try:
            if self._here is None:
                raise PartitionNotOwnedError("this process is still starting")
            with self._room(_length_of(request)):
                try:
                    body = await request.read()
                except web.HTTPRequestEntityTooLarge:
                    raise TooLargeError(f"a forwarded command is larger than {MAX_BODY_BYTES:,} bytes") from None
                answer = await carry_out(self._here, body)
        except ArtifactStoreError as error:
            return _message(encode_error(error, _version_of(request, WIRE_READS)), error.status)
        return _message(answer)


def _length_of(request: web.Request) -> int:
    """The most bytes that the body can have. Raises HTTPBadRequest if its length is not a number."""
    named = request.headers.get("Content-Length")
    length = MAX_BODY_BYTES if named is None else parse_number(named)
    if length is None:
        raise web.HTTPBadRequest
    return length


def _version_of(request: web.Request, header: str = WIRE_VERSION) -> int:
    """The version of the message. Gateways that do not send the header write and read the first one."""
    return parse_number(request.headers.get(header, "1")) or 0


def _message(body: bytes, status: int = 200) -> web.Response:
    headers = {WIRE_VERSION: str(VERSION)}
    return web.Response(body=body, status=status, content_type=CONTENT_TYPE, headers=headers)
