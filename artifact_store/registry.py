"""The operations of the registry: the one interface of the HTTP gateway, the command line and Python programs.

`artifact_store.Client` implements it through a gateway, `services.registry.direct.DirectRegistry` on log, blobs and
views.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias
from uuid import UUID

from artifact_store.archives.bundle import Bundle, Group, NamedFile
from artifact_store.byte_streams import from_any
from artifact_store.documents import times
from artifact_store.errors import InvalidRequestError, PackageNotFoundError
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
from artifact_store.position import Position

if TYPE_CHECKING:
    from artifact_store.events import RecordedEvent

ByteStream = AsyncIterable[bytes] | Iterable[bytes] | IO[bytes] | bytes
ManifestFormat = Literal["cbor", "json"]
Order = Literal["log", "time"]

NOW: Literal["now"] = "now"
"""The log's end at the time of the request."""

Since: TypeAlias = Position | datetime | str | None
"""Where to begin reading: after a position, at a time, at the log's end (`now`), or at its start (None).

As text, as in HTTP and on the command line: a position, an RFC 3339 time, or `now`.
"""

Start: TypeAlias = Position | int | Literal["now"] | None
"""The same, with a time in µs since 1970."""


def start_of(since: Since) -> Start:
    """Parse where to begin. Raises InvalidPositionError; InvalidRequestError for a time without an offset from UTC."""
    if isinstance(since, datetime):
        since = since.isoformat()
    if not isinstance(since, str):
        return since
    if since == NOW:
        return NOW
    if "T" not in since[:11] or ":" not in since:  # no position has a colon
        return Position.parse(since)
    try:
        return times.from_text(since.replace(" ", "+"))  # a plus that was not percent-encoded
    except (ValueError, OverflowError):
        raise InvalidRequestError("since must be a position, an RFC 3339 time with its offset, or `now`") from None


def start_text(start: Start) -> str | None:
    """The text that `start_of` parses back; None for the log's start."""
    if isinstance(start, int):
        return times.to_text(start)
    return None if start is None else str(start)


ANYONE = "anonymous"
"""The actor if none is given. A gateway replaces it with the sender that it has identified."""


class Registry(ABC):
    """Create packages, add files, read manifests and bytes, and follow events.

    Most callers need only the first six operations (`create_package` … `tail_events`). The others return whole
    acknowledgements and pages. Every operation may raise UnavailableError or PushBackError. Retry it with the same
    `command_id`: a repeat gets the first answer. Answers are kept until 24 hours after the package is finalized. A
    repeat after that raises AnswerExpiredError, whether the command was recorded or not.
    """

    async def create_package(
        self,
        name: str,
        producer: str,
        subject: str,
        retention_class: str,
        actor: str = ANYONE,
        metadata: dict[str, Any] | None = None,
        *,
        command_id: UUID | None = None,
    ) -> UUID:
        """Create a package and return its id.

        Raises:
            UnknownRetentionClassError: a ValueError that lists the known classes.
            InvalidRequestError, TooLargeError: a field breaks its rule.
            CommandReusedError: `command_id` was used before with another request.
        """
        done = await self.create(
            name, producer, subject, retention_class, actor, {} if metadata is None else metadata, command_id=command_id
        )
        return done.package_id

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
        """Stream a file into the package. Return its id once the bytes and the event are durable.

        Raises:
            PackageNotFoundError, IllegalPackageStateError, DuplicateRelativePathError, PathConflictError,
                InvalidPathError: checked before a large body is read, and again when it is stored.
            ContentMismatchError: the bytes are not what `declared` says.
            TooLargeError, CommandReusedError.
        """
        done = await self.ingest(
            package_id,
            relative_path,
            media_type,
            from_any(stream),
            actor,
            declared=declared or Declared(),
            command_id=command_id,
        )
        return done.files[0].file_id

    async def finalize_package(
        self, package_id: UUID, actor: str = ANYONE, *, command_id: UUID | None = None
    ) -> ContentAddress:
        """Freeze the package and return its manifest's content address.

        `finalize` also returns the paths that differ only by case or Unicode form: some file systems cannot hold both.

        Raises:
            PackageNotFoundError, IllegalPackageStateError: there is no such package, or it is finalized already.
        """
        done = await self.finalize(package_id, actor, command_id=command_id)
        if done.manifest_digest is None:
            raise InvalidRequestError("the command id belongs to a command that is not a finalization")
        return ContentAddress.of_digest(done.manifest_digest)

    async def get_file(self, file_id: UUID) -> AsyncIterator[bytes]:
        """An iterator over the file's bytes. Raises FileNotFoundInRegistryError; iterating may raise CorruptError."""
        return await self.open_content(file_id)

    async def tail_events(
        self,
        since_sequence: int = 0,
        poll_interval_seconds: float = 0.5,
        package_id: UUID | None = None,
        since: Since = None,
        *,
        where: EventFilter | None = None,
    ) -> AsyncIterator[RecordedEvent]:
        """Follow events for as long as the caller iterates; in order per package.

        `since_sequence` skips a package's events up to that sequence, and needs `package_id`. For `since` and `where`,
        see `read_events`. With the embedded log, an event may be seen up to `poll_interval_seconds` late.

        Raises:
            InvalidRequestError: a sequence without a package, or a bad `since`. InvalidPositionError, LogIdentityError:
                the position does not exist in this log.
        """
        if since_sequence and package_id is None:
            raise InvalidRequestError(
                "since_sequence needs a package_id, because sequences are numbers within a package"
            )
        events = self.read_events(
            since, package_id=package_id, where=where, follow=True, poll_seconds=poll_interval_seconds
        )
        async for event in events:
            if event.sequence > since_sequence:
                yield event

    @abstractmethod
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
        """`create_package`, with the whole acknowledgement."""

    @abstractmethod
    async def check_ingest(self, package_id: UUID, relative_path: str, command_id: UUID | None = None) -> None:
        """Raise what `ingest` would raise, as far as that can be known before the body is read."""

    @abstractmethod
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
        """`ingest_file`, with the whole acknowledgement (one entry in `files`)."""

    @abstractmethod
    async def ingest_files(
        self, package_id: UUID, files: Bundle, actor: str, *, command_id: UUID | None = None
    ) -> Acknowledgement:
        """Add many files in one command, all or none; small ones are packed. `files` of the result keeps their order.

        Raises what `ingest` and iterating over `files` raise, and TooLargeError for more than MAX_BUNDLE_FILES.
        """

    @abstractmethod
    async def ingest_named(
        self, package_id: UUID, files: Sequence[NamedFile], actor: str, *, command_id: UUID | None = None
    ) -> Acknowledgement:
        """As `ingest_files`, for files whose bytes are stored already: the registry reads and verifies them there.

        Raises UnknownContentError if a file's bytes are not stored: nothing is recorded, send the bytes.
        """

    @abstractmethod
    async def known_blobs(self, digests: Sequence[bytes]) -> frozenset[bytes]:
        """The blobs among these (BLAKE3, 32 raw bytes each) that are stored under their content-addressed keys."""

    @abstractmethod
    def read_files(
        self,
        package_id: UUID,
        *,
        after: str | None = None,
        largest: int | None = None,
        wait_sequence: int | None = None,
    ) -> AsyncGenerator[Group, None]:
        """The files of a finalized package with their bytes, sorted by the UTF-8 bytes of their paths.

        `after` leaves out the files up to that path, `largest` those with more bytes. The bytes are not verified: the
        caller has their digests.

        Raises (on iteration): PackageNotFoundError; IllegalPackageStateError while the package is open; CorruptError.
        """

    @abstractmethod
    async def finalize(self, package_id: UUID, actor: str, *, command_id: UUID | None = None) -> Acknowledgement:
        """`finalize_package`, with the whole acknowledgement."""

    @abstractmethod
    async def get_package(self, package_id: UUID, *, wait_sequence: int | None = None) -> Package:
        """The package as the view shows it. Raises PackageNotFoundError.

        `wait_sequence` waits until the view has the package's event with that sequence. Raises WaitTimeoutError after a
        bounded wait, and SequenceBeyondLogError at once if the log has no such event.
        """

    @abstractmethod
    async def list_packages(
        self, where: PackageFilter | None = None, *, limit: int = DEFAULT_PAGE, cursor: str | None = None
    ) -> Page[Package]:
        """Packages, newest first. Raises InvalidRequestError for a bad cursor or limit."""

    @abstractmethod
    async def list_usage(
        self,
        producer: str | None = None,
        retention_class: str | None = None,
        *,
        limit: int = DEFAULT_PAGE,
        cursor: str | None = None,
    ) -> Page[UsageTotal]:
        """Totals by producer, retention class and day. Raises InvalidRequestError for a bad cursor or limit."""

    @abstractmethod
    async def list_files(
        self,
        package_id: UUID,
        *,
        limit: int = DEFAULT_PAGE,
        cursor: str | None = None,
        wait_sequence: int | None = None,
    ) -> Page[File]:
        """Files of a package, sorted by the UTF-8 bytes of their paths. Raises PackageNotFoundError."""

    @abstractmethod
    async def get_file_record(self, file_id: UUID) -> File:
        """A file's metadata. Raises FileNotFoundInRegistryError."""

    @abstractmethod
    async def get_file_at(self, package_id: UUID, relative_path: str, *, wait_sequence: int | None = None) -> File:
        """A file's metadata by its path. Raises PackageNotFoundError, FileNotFoundInRegistryError, InvalidPathError."""

    @abstractmethod
    async def open_content(self, file_id: UUID, offset: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        """An iterator over `length` bytes from `offset` (None: to the end).

        Raises FileNotFoundInRegistryError; RangeNotSatisfiableError when no byte lies in the range. Iterating raises
        CorruptError and UnavailableError.
        """

    @abstractmethod
    async def get_manifest_bytes(
        self,
        package_id: UUID,
        format: ManifestFormat = "cbor",  # noqa: A002 - the documented name
        *,
        wait_sequence: int | None = None,
    ) -> bytes:
        """The manifest's canonical CBOR, or its JCS projection.

        Raises PackageNotFoundError; IllegalPackageStateError while the package is open.
        """

    def events(
        self, since: Since = None, *, where: EventFilter | None = None, follow: bool = True
    ) -> AsyncIterator[RecordedEvent]:
        """Follow events as they come: `read_events` with `follow` by default."""
        return self.read_events(since, where=where, follow=follow)

    @abstractmethod
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
        """Read events that match `where`, from `since` to the log's end at the time of the call; `follow` goes on.

        `package_id` asks for one package, as the same field of `where` does. The order `log` is that of the log: in
        order per package, otherwise as partitions are read. The order `time` is by `created_at`, without `follow`.

        Raises (on iteration) InvalidRequestError, InvalidPositionError, LogIdentityError, UnavailableError.
        """


def filter_of(where: EventFilter | None, package_id: UUID | None, order: Order, *, follow: bool) -> EventFilter:
    """The filter of `read_events` with these arguments. Raises InvalidRequestError if they exclude each other."""
    if follow and order == "time":
        raise InvalidRequestError("the order `time` is only for events that the log holds now: leave out follow")
    where = where or EventFilter()
    if package_id is None:
        return where
    if where.package_id not in (None, package_id):
        raise InvalidRequestError("the filter and package_id name different packages")
    return replace(where, package_id=package_id)


async def find_frozen(registry: Registry, manifest: ContentAddress) -> UUID:
    """Return the id of the package that was finalized with this manifest. Raises PackageNotFoundError."""
    page = await registry.list_packages(PackageFilter(manifest_digest=manifest), limit=1)
    if not page.items:
        raise PackageNotFoundError(f"no package has the manifest {manifest}")
    return page.items[0].package_id
