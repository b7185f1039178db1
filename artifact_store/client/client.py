"""The registry through a gateway: one method for each operation of `Registry`.

Each write has one command id, which is random unless the caller gives one. All attempts carry it, so a repeat gets the
first answer. Reads wait until the view shows what this client wrote.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from artifact_store.archives.bundle import Bundle, Group, NamedFile
from artifact_store.client.bodies import BodySource, source_of
from artifact_store.client.device_login import find_credentials
from artifact_store.client.downloads import ContentStream, receive_manifest, verified
from artifact_store.client.many_files import ask_known, name_files, receive_files, send_files
from artifact_store.client.sending import Sending, send_body
from artifact_store.client.transport import Answer, Notify, RetryPolicy, Transport, log_retry, read_answer
from artifact_store.documents import answers, http
from artifact_store.documents.http import quoted
from artifact_store.errors import (
    CorruptError,
    DuplicateRelativePathError,
    FileNotFoundInRegistryError,
    IllegalPackageStateError,
    InvalidRequestError,
    RangeNotSatisfiableError,
    TooLargeError,
)
from artifact_store.manifest import ContentAddress
from artifact_store.models import (
    DEFAULT_PAGE,
    Acknowledgement,
    Declared,
    EventFilter,
    File,
    Package,
    PackageFilter,
    Page,
    UsageTotal,
)
from artifact_store.registry import (
    ANYONE,
    ByteStream,
    ManifestFormat,
    Order,
    Registry,
    Since,
    filter_of,
    start_of,
)
from artifact_store.rules import check_header_text, check_path, check_text, metadata_text

if TYPE_CHECKING:
    from artifact_store.client.stream import FileStream
    from artifact_store.client.subscribing import SubscriptionsClient
    from artifact_store.events import RecordedEvent

# Pushing and pulling do not need pydantic, and most programs do not need streams and subscriptions: such modules are
# imported where they are used.

_OPEN = "created"
_log = logging.getLogger(__name__)

REMEMBERED_PACKAGES = 10_000

RESUMABLE_BYTES = 64 << 20
"""Files of at least this length are sent in as many requests as needed, if they can be read from any offset."""


class Client(Registry):
    """The registry behind a gateway's URL. Use it inside `async with`; many tasks of one event loop may share it.

    Operations are retried according to `policy`. When its time is over, they raise UnavailableError or PushBackError.
    """

    def __init__(
        self,
        url: str,
        policy: RetryPolicy | None = None,
        notify: Notify = log_retry,
        *,
        token_file: Path | None = None,
        ca: Path | None = None,
    ) -> None:
        """`notify` is called before each pause between attempts.

        Requests carry the token in `token_file`, or in the file that ARTIFACT_STORE_TOKEN_FILE names, or that of
        `artifact-store login`. `ca` is a PEM file of authorities to trust in addition to the system's; by default, the
        one that ARTIFACT_STORE_CA names.

        Raises ConfigurationError: the URL is malformed, or a token would be sent to it in the clear.
        """
        credentials = find_credentials(url, token_file, ca)
        self._transport = Transport(url, policy or RetryPolicy(), notify, credentials=credentials, ca=ca)
        self._written = Written()

    @property
    def subscriptions(self) -> SubscriptionsClient:
        """Subscriptions: the server sends events to a URL."""
        from artifact_store.client.subscribing import SubscriptionsClient

        return SubscriptionsClient(self._transport)

    async def __aenter__(self) -> Client:
        await self._transport.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._transport.__aexit__()

    async def create(
        self,
        name: str,
        producer: str,
        subject: str,
        retention_class: str,
        actor: str,
        metadata: dict[str, Any],
        *,
        command_id: UUID | None = None,
    ) -> Acknowledgement:
        for field, text in (("name", name), ("producer", producer), ("subject", subject)):
            check_text(field, text)
        metadata_text(metadata, sys.maxsize)  # the gateway checks the size
        request = {
            "name": name,
            "producer": producer,
            "subject": subject,
            "retention_class": retention_class,
            "metadata": metadata,
        }
        answer = await self._transport.call(
            "POST", "/v1/packages", headers=_write_headers(actor, command_id), json=request
        )
        return self._acknowledged(answers.created(answer.body))

    async def check_ingest(self, package_id: UUID, relative_path: str, command_id: UUID | None = None) -> None:
        """Check against the view. `ingest` asks the package's writer before it sends a large body."""
        check_path(relative_path)
        package = await self.get_package(package_id)
        if command_id is not None:
            return
        if package.status != _OPEN:
            raise IllegalPackageStateError(f"package {package_id} is {package.status}")
        try:
            await self.get_file_at(package_id, relative_path)
        except FileNotFoundInRegistryError:
            return
        raise DuplicateRelativePathError(f"package {package_id} already holds {relative_path!r}")

    async def ingest_file(
        self,
        package_id: UUID,
        relative_path: str,
        media_type: str,
        stream: ByteStream,
        actor: str = ANYONE,
        *,
        declared: Declared | None = None,
        command_id: UUID | None = None,
    ) -> UUID:
        # Bytes and seekable files can be sent again, so that callers need not handle lost connections.
        done = await self.ingest(
            package_id,
            relative_path,
            media_type,
            source_of(stream),
            actor,
            declared=declared or Declared(),
            command_id=command_id,
        )
        return done.files[0].file_id

    async def ingest(
        self,
        package_id: UUID,
        relative_path: str,
        media_type: str,
        body: AsyncIterable[bytes],
        actor: str,
        *,
        declared: Declared,
        command_id: UUID | None = None,
    ) -> Acknowledgement:
        """As `Registry.ingest`. After a lost connection a `BodySource` is sent again, any other stream is not.

        Raises UnavailableError if the connection was lost with such a stream: the outcome is unknown.
        """
        check_path(relative_path)
        check_header_text("media_type", media_type)
        command = command_id or uuid4()
        declared = _completed(declared, body)
        length = declared.size_bytes
        if length is not None and length >= RESUMABLE_BYTES and isinstance(body, BodySource):
            try:
                return await self._ingest_resumably(
                    package_id, relative_path, media_type, body, length, actor, declared, command
                )
            except TooLargeError as error:
                _log.info("%s: sending %r in one request", error.detail, relative_path)
        fields = {
            **_write_headers(actor, command),
            **_declared_headers(declared),
            "Content-Type": media_type,
        }
        sending = Sending(body, declared.size_bytes, hashed=declared.blake3 is None)
        answer = await send_body(
            self._transport,
            "PUT",
            f"/v1/packages/{package_id}/files/{quoted(relative_path)}",
            fields,
            sending,
            what=f"{relative_path!r} was lost on its way and its stream cannot be read again",
            command_id=command,
        )
        done = answers.ingested(answer.body)
        sent = declared.blake3 or sending.digest
        if sent is not None and done.files[0].blake3 != sent:
            raise CorruptError(f"{relative_path!r} did not arrive as it was sent; do not finalize {package_id}")
        return self._acknowledged(done)

    async def _ingest_resumably(
        self,
        package_id: UUID,
        relative_path: str,
        media_type: str,
        body: BodySource,
        length: int,
        actor: str,
        declared: Declared,
        command: UUID,
    ) -> Acknowledgement:
        """Send a large file in as many requests as needed. Bytes that an earlier run sent are not sent again."""
        from artifact_store.client.resumable import send_resumably

        # With the digest declared, an upload of another file's bytes under this command is not continued.
        said = replace(declared, size_bytes=None, blake3=declared.blake3 or await body.blake3())
        fields = {**_write_headers(actor, command), **_declared_headers(said)}
        done = await send_resumably(self._transport, package_id, relative_path, media_type, body, length, fields)
        return self._acknowledged(done)

    async def ingest_files(
        self, package_id: UUID, files: Bundle, actor: str, *, command_id: UUID | None = None
    ) -> Acknowledgement:
        """As `Registry.ingest_files`. After a lost connection `HeldFiles` are sent again, any other bundle is not."""
        command = command_id or uuid4()
        return self._acknowledged(
            await send_files(self._transport, package_id, files, _write_headers(actor, command), command)
        )

    async def ingest_named(
        self, package_id: UUID, files: Sequence[NamedFile], actor: str, *, command_id: UUID | None = None
    ) -> Acknowledgement:
        fields = _write_headers(actor, command_id)
        return self._acknowledged(await name_files(self._transport, package_id, files, fields))

    async def known_blobs(self, digests: Sequence[bytes]) -> frozenset[bytes]:
        return await ask_known(self._transport, digests)

    def read_files(
        self,
        package_id: UUID,
        *,
        after: str | None = None,
        largest: int | None = None,
        wait_sequence: int | None = None,
    ) -> AsyncGenerator[Group, None]:
        """As `Registry.read_files`. After a lost connection it continues after the last complete file."""
        wait = self._wait(package_id, wait_sequence)
        return receive_files(self._transport, package_id, after, largest, wait)

    def stream(
        self,
        package_id: UUID,
        actor: str = ANYONE,
        *,
        spool: Path | str | None = None,
        max_bytes: int | None = None,
    ) -> FileStream:
        """Add many files to a package, one by one; they are sent together. Use it inside `async with`.

            async with registry.stream(package_id) as files:
                await files.add("frame-00001.bin", data)

        `spool` is a folder of one producer, in which files wait until they are acknowledged; they outlive this process.
        Without it they wait in memory, and the stream ends with UnavailableError when the gateway has been down for the
        policy's `total_seconds`. `max_bytes` is how much may wait: by default 1 GiB in a spool, 64 MiB in memory.
        """
        from artifact_store.client.spool import SPOOL_BYTES, Spool
        from artifact_store.client.stream import MEMORY_BYTES, FileStream, MemoryBacklog

        backlog = MemoryBacklog() if spool is None else Spool(Path(spool), package_id)
        default = MEMORY_BYTES if spool is None else SPOOL_BYTES
        return FileStream(
            self,
            package_id,
            actor,
            backlog,
            max_bytes=default if max_bytes is None else max_bytes,
            pause_seconds=self._transport.policy.longest_pause_seconds,
        )

    async def finalize(self, package_id: UUID, actor: str, *, command_id: UUID | None = None) -> Acknowledgement:
        answer = await self._transport.call(
            "POST", f"/v1/packages/{package_id}/finalize", headers=_write_headers(actor, command_id)
        )
        return self._acknowledged(answers.finalized(answer.body))

    async def get_package(self, package_id: UUID, *, wait_sequence: int | None = None) -> Package:
        answer = await self._below(package_id, "", wait_sequence)
        package = answers.package(answer.body)
        self._written.seen(package_id, package.last_event_sequence)
        return package

    async def list_packages(
        self, where: PackageFilter | None = None, *, limit: int = DEFAULT_PAGE, cursor: str | None = None
    ) -> Page[Package]:
        # A listing has no sequence to wait for, so wait for each package that was written to and not read since.
        await asyncio.gather(*(self.get_package(package) for package in self._written.unseen()))
        asked = where or PackageFilter()
        query = {
            "producer": asked.producer,
            "subject": asked.subject,
            "status": asked.status,
            "retention_class": asked.retention_class,
            "manifest_digest": asked.manifest_digest,
            "limit": limit,
            "cursor": cursor,
        }
        return answers.packages((await self._transport.call("GET", "/v1/packages", query=query)).body)

    async def list_usage(
        self,
        producer: str | None = None,
        retention_class: str | None = None,
        *,
        limit: int = DEFAULT_PAGE,
        cursor: str | None = None,
    ) -> Page[UsageTotal]:
        from artifact_store.documents.shapes import UsagePageAnswer

        query = {"producer": producer, "retention_class": retention_class, "limit": limit, "cursor": cursor}
        return read_answer(UsagePageAnswer, await self._transport.call("GET", "/v1/usage", query=query)).to_page()

    async def list_files(
        self,
        package_id: UUID,
        *,
        limit: int = DEFAULT_PAGE,
        cursor: str | None = None,
        wait_sequence: int | None = None,
    ) -> Page[File]:
        from artifact_store.documents.shapes import FilePageAnswer

        answer = await self._below(package_id, "/files", wait_sequence, limit=limit, cursor=cursor)
        return read_answer(FilePageAnswer, answer).to_page()

    async def get_file_record(self, file_id: UUID) -> File:
        from artifact_store.documents.shapes import FileAnswer

        return read_answer(FileAnswer, await self._transport.call("GET", f"/v1/files/{file_id}")).to_file()

    async def get_file_at(self, package_id: UUID, relative_path: str, *, wait_sequence: int | None = None) -> File:
        from artifact_store.documents.shapes import FileAnswer

        check_path(relative_path)
        answer = await self._below(package_id, f"/files/{quoted(relative_path)}", wait_sequence)
        return read_answer(FileAnswer, answer).to_file()

    async def open_content(self, file_id: UUID, offset: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        """As `Registry.open_content`. A whole file is checked against its content address at its end."""
        if offset < 0 or (length is not None and length < 0):
            raise InvalidRequestError("offset and length of a range must not be negative")
        if length == 0:
            await self._check_offset(file_id, offset)
            return _nothing()
        stream = ContentStream(self._transport, f"/v1/files/{file_id}/content", offset, length)
        try:
            await stream.open()
        except RangeNotSatisfiableError as error:
            if offset == 0 and error.size == 0:  # an empty file has no bytes, not even from offset 0 on
                return _nothing()
            raise
        if offset == 0 and length is None and stream.address is not None:
            return verified(stream, ContentAddress.parse(stream.address).digest)
        return stream

    async def get_manifest_bytes(
        self,
        package_id: UUID,
        format: ManifestFormat = "cbor",  # noqa: A002 - the documented name
        *,
        wait_sequence: int | None = None,
    ) -> bytes:
        if format not in ("cbor", "json"):
            raise InvalidRequestError("a manifest has the format `cbor` or `json`")
        query = {"wait_sequence": self._wait(package_id, wait_sequence)}
        accept = {"Accept": f"application/{format}"}
        return await receive_manifest(self._transport, f"/v1/packages/{package_id}/manifest", query, accept)

    def read_events(
        self,
        since: Since = None,
        *,
        package_id: UUID | None = None,
        where: EventFilter | None = None,
        follow: bool = False,
        order: Order = "log",
        poll_seconds: float = 0.1,
    ) -> AsyncIterator[RecordedEvent]:
        """As `Registry.read_events`. A gateway sends events as they arrive, so `poll_seconds` has no effect."""
        from artifact_store.client.following import (
            follow_events,  # its models take time to load, and only readers of events need them
        )

        wanted = filter_of(where, package_id, order, follow=follow)
        return follow_events(self._transport, start_of(since), wanted, follow=follow, order=order)

    async def _below(self, package_id: UUID, path: str, wait_sequence: int | None, **query: object) -> Answer:
        """GET something below a package, once the view shows what this client wrote."""
        query["wait_sequence"] = self._wait(package_id, wait_sequence)
        return await self._transport.call("GET", f"/v1/packages/{package_id}{path}", query=query)

    def _wait(self, package_id: UUID, wait_sequence: int | None) -> int | None:
        return max(wait_sequence or 0, self._written.last(package_id)) or None

    async def _check_offset(self, file_id: UUID, offset: int) -> None:
        size = (await self.get_file_record(file_id)).size_bytes
        if offset and offset >= size:
            raise RangeNotSatisfiableError(f"the file has {size:,} bytes", size)

    def _acknowledged(self, done: Acknowledgement) -> Acknowledgement:
        self._written.wrote(done.package_id, done.sequence)
        return done


async def _nothing() -> AsyncIterator[bytes]:
    chunks: tuple[bytes, ...] = ()
    for chunk in chunks:
        yield chunk


def _write_headers(actor: str, command_id: UUID | None) -> dict[str, str]:
    key = {http.IDEMPOTENCY_KEY: str(command_id or uuid4())}
    if actor == ANYONE:  # no actor was named, so the gateway determines it
        return key
    check_header_text("actor", actor)
    return {http.ACTOR: actor, **key}


def _completed(declared: Declared, body: AsyncIterable[bytes]) -> Declared:
    """The caller's declaration, completed with what the source knows about itself."""
    if not isinstance(body, BodySource):
        return declared
    return Declared(
        size_bytes=body.size_bytes if declared.size_bytes is None else declared.size_bytes,
        blake3=declared.blake3 or body.digest,
        sha256=declared.sha256,
    )


def _declared_headers(declared: Declared) -> dict[str, str]:
    found = {}
    if declared.size_bytes is not None:
        found["Content-Length"] = str(declared.size_bytes)
    if declared.blake3 is not None:
        found[http.CONTENT_ADDRESS] = ContentAddress.of_digest(declared.blake3)
    if declared.sha256 is not None:
        found[http.REPR_DIGEST] = http.repr_digest(declared.sha256)
    return found


class Written:
    """The last sequence written to each package, for the packages written to most recently."""

    def __init__(self, remembered: int = REMEMBERED_PACKAGES) -> None:
        self._remembered = remembered
        self._last: OrderedDict[UUID, int] = OrderedDict()
        self._unseen: OrderedDict[UUID, int] = OrderedDict()

    def wrote(self, package_id: UUID, sequence: int) -> None:
        """Remember that the package has an event with this sequence."""
        newest = max(sequence, self._last.pop(package_id, 0))
        self._last[package_id] = newest
        self._unseen[package_id] = newest
        if len(self._last) > self._remembered:
            forgotten, _ = self._last.popitem(last=False)
            self._unseen.pop(forgotten, None)

    def last(self, package_id: UUID) -> int:
        """The sequence of the last event written to the package; 0 if none is remembered."""
        return self._last.get(package_id, 0)

    def seen(self, package_id: UUID, sequence: int) -> None:
        """Remember that a view has shown the package up to `sequence`."""
        if sequence >= self._unseen.get(package_id, 0):
            self._unseen.pop(package_id, None)

    def unseen(self) -> tuple[UUID, ...]:
        """The packages whose last written event no view has shown yet."""
        return tuple(self._unseen)
