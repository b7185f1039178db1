"""The registry on a log, writer, blob store and views that this process has opened, without a gateway in between."""

from __future__ import annotations

import asyncio
import copy
import math
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence, Set
from contextlib import aclosing, suppress
from typing import Any, TypeVar
from uuid import UUID, uuid4

from artifact_store.archives.bundle import MAX_BUNDLE_FILES, Bundle, Group, NamedFile, StreamedFile
from artifact_store.byte_streams import from_any, joined
from artifact_store.errors import (
    ArtifactStoreError,
    ConflictError,
    CorruptError,
    FileNotFoundInRegistryError,
    ForbiddenError,
    IllegalPackageStateError,
    InvalidRequestError,
    PackageNotFoundError,
    RangeNotSatisfiableError,
    RejectedError,
    TooLargeError,
    UnavailableError,
    UnknownContentError,
)
from artifact_store.events import FileIngested, RecordedEvent
from artifact_store.manifest import ContentAddress, content_key, manifest_digest, to_json
from artifact_store.models import (
    DEFAULT_PAGE,
    MAX_PAGE,
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
from artifact_store.registry import ManifestFormat, Order, Registry, Since, filter_of, start_of
from artifact_store.rules import check_path, check_text, metadata_text
from schemas import identifiers
from schemas.runs import StoredFile
from services.blobs.packs import Placed, SharedPacks, is_small
from services.blobs.port import BlobStore, StoredBlob
from services.blobs.resumable.uploads import ResumableUploads
from services.blobs.verified_reads import Place
from services.core.access import EVERYTHING, EVERYWHERE, Grants, Principal, Right, Scope
from services.core.decide import Command, CreatePackage, FinalizePackage, IngestCheck, IngestFiles, Limits
from services.log.port import EXTENT_SECONDS, CommandWriter, Log, PackageExtent
from services.registry.bundle_store import BundleStore
from services.registry.origins import Origins, ScopedFilter, find_origins, in_order_of_time, position_of
from services.runtime.tracing import traced
from services.views.queries import FoundFile, Origin, PlacedFile, Queries
from services.views.waiting import ViewWaits, beyond_log, parked_error

Found = TypeVar("Found")

WAIT_SECONDS = 10.0
"""The longest time that a read waits for the view."""

_ASKED_AT_ONCE = 500
_CLASSES_REMEMBERED = 10_000


FRESH_SECONDS = 1.0
"""How old the known end may be. A reader may see events of other packages twice if they are not older than this."""

PATIENCE_SECONDS = 0.2
"""How long writes wait to learn the log's end. They succeed without it, since other partitions may be unavailable."""


class KnownEnd:
    """Where the log ended recently: a gateway needs this for the positions in its answers to writes.

    A writer knows only the offset in its own partition. A reader that continues after a write must begin in the other
    partitions where they ended before the write, or earlier, to see what others did because of the write. The log is
    asked at most once a second, and only while there are writes. Belongs to one event loop.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._known: Position | None = None
        self._since = -math.inf
        """When the request for `_known` began, on the monotonic clock (s)."""
        self._question: asyncio.Task[None] | None = None
        self._asked = -math.inf
        self._alone = False
        """Whether the log has only one partition, so that its writer knows the whole position."""

    async def before_write(self) -> Position | None:
        """Where the log ends now, or ended recently; None if that is not known, or not needed."""
        if self._alone:
            return None
        now = time.monotonic()
        idle = self._question is None or self._question.done()
        if idle and now > max(self._since, self._asked) + FRESH_SECONDS / 2:
            self._question = asyncio.create_task(self._ask(now), name="log-end")
            self._asked = now
        if self._question is not None and now > self._since + FRESH_SECONDS:
            await asyncio.wait([self._question], timeout=max(0.0, self._asked + PATIENCE_SECONDS - now))
        return self._known

    def after(self, written: Position | None, before: Position | None) -> Position | None:
        """The position after a write: `written` names only its own partition, `before` is from `before_write`."""
        if written is None or self._alone:
            return written
        if before is None or before.log != written.log:
            return None
        ((partition, offset),) = written.offsets.items()
        known = self._known
        if known is not None and known.log == written.log and known.offsets.get(partition, 0) < offset:
            self._known = known.after(partition, offset - 1)
        return before.after(partition, offset - 1)

    async def _ask(self, now: float) -> None:
        with suppress(ArtifactStoreError):  # writes have their own errors
            self._alone = await self._log.partitions() == 1
            if not self._alone:
                self._known, self._since = await self._log.end(self._known), now

    async def close(self) -> None:
        """Stop asking; returns once that is done."""
        if self._question is not None:
            self._question.cancel()
            await asyncio.wait([self._question])


class DirectRegistry(Registry):
    """The façade over the parts, for a caller with all rights; `for_principal` makes one for a caller with fewer.

    `upload_key` signs the states of resumable uploads. `freshen`, if given, brings a view up to the log's end before it
    is read.
    """

    def __init__(
        self,
        log: Log,
        writer: CommandWriter,
        blobs: BlobStore,
        queries: Queries,
        *,
        limits: Limits,
        upload_key: bytes | None = None,
        freshen: Callable[[str], Awaitable[None]] | None = None,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        self._log = log
        self._writer = writer
        self._blobs = blobs
        self._bundles = BundleStore(blobs)
        self._small = SharedPacks(blobs)
        self._classes: dict[tuple[UUID, str], str] = {}
        """Retention classes by package and sender, for the latest packages that took files of that sender."""
        self._queries = queries
        self._limits = limits
        self._upload_key = upload_key
        self._freshen = freshen
        self._waits = ViewWaits(queries, log, writer, wait_seconds)
        self._end = KnownEnd(log)
        self._uploads: ResumableUploads | None = None
        self._readable: Scope = EVERYWHERE
        self.origins = Origins(self._find_origins)
        self._grants: Grants = EVERYTHING
        self.principal: str | None = None
        """The sender who writes in the name of the given actors; None if the actors write themselves."""

    def for_principal(self, principal: Principal, *, delegates: bool = False) -> DirectRegistry:
        """The same registry with the principal's rights: packages that they may not read are not found.

        With `delegates`, events name the principal as well as the given actors.
        """
        if principal.grants == EVERYTHING and not delegates:
            return self
        found, uploads = copy.copy(self), self.uploads
        found.principal = principal.actor if delegates else None
        found._uploads = uploads
        if principal.grants == EVERYTHING:
            return found
        found._uploads = uploads.for_caller(
            principal.actor, found._check_upload, found._record_upload, found._may_write
        )
        found._limit(principal)
        return found

    def limit_again(self, principal: Principal) -> None:
        """Apply these rights of the principal from now on, also to requests under way.

        Raises ForbiddenError: the principal had all rights, and now has fewer.
        """
        if self._grants is EVERYTHING:
            raise ForbiddenError(f"{principal.actor} no longer has all rights")
        self._limit(principal)

    def _limit(self, principal: Principal) -> None:
        self._grants = principal.grants
        self._readable = principal.scope(Right.READ)
        self._queries = self._queries.within(self._readable)

    @property
    def uploads(self) -> ResumableUploads:
        """Uploads of files in several requests."""
        if self._uploads is None:
            self._uploads = ResumableUploads(
                self._blobs,
                check=self._check_upload,
                record=self._record_upload,
                max_file_bytes=self._limits.max_file_bytes,
                key=self._upload_key,
            )
        return self._uploads

    async def close(self) -> None:
        """End background work, and wait until it has ended."""
        await self._waits.close()
        await self._end.close()
        await self._small.close()
        await self._bundles.reads.close()
        if self._uploads is not None:
            await self._uploads.close()

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
        check_text("actor", actor)
        command = command_id or uuid4()
        return await self._write(
            CreatePackage(
                package_id=identifiers.package_id(self.principal or actor, command),
                command_id=command,
                actor=actor,
                name=name,
                producer=producer,
                subject=subject,
                retention_class=retention_class,
                metadata=metadata_text(metadata, self._limits.max_metadata_bytes),
                grants=self._grants,
                principal=self.principal,
            )
        )

    async def check_ingest(self, package_id: UUID, relative_path: str, command_id: UUID | None = None) -> None:
        await self._check_upload(package_id, relative_path, command_id, self.principal)

    async def _check_upload(
        self, package_id: UUID, relative_path: str, command_id: UUID | None, principal: str | None
    ) -> None:
        check_path(relative_path)
        await self._writer.check_ingest(IngestCheck(package_id, [relative_path], command_id, self._grants, principal))

    async def _ask_writer(self, package_id: UUID, paths: Sequence[str], command_id: UUID | None) -> str | None:
        return await self._writer.check_ingest(IngestCheck(package_id, paths, command_id, self._grants, self.principal))

    async def ingest(
        self,
        package_id: UUID,
        relative_path: str,
        media_type: str,
        body: AsyncIterable[bytes] | bytes,
        actor: str,
        *,
        declared: Declared,
        command_id: UUID | None = None,
        ask_first: bool = False,
    ) -> Acknowledgement:
        """See `Registry`. The package's writer is asked before the body is read, with one exception.

        It is not asked about a small body, unless `ask_first` is set, once it has told this process the package's
        retention class: from then on until it rejects a file of this sender. So a client whose files are rejected
        repeatedly gets at most one body stored.
        """
        check_text("actor", actor)
        check_text("media_type", media_type)
        check_path(relative_path)
        small, kept_as, sender = is_small(declared), None, self.principal or actor
        if small and not ask_first:
            kept_as = self._classes.get((package_id, sender))
        if kept_as is None:
            kept_as = await self._ask_writer(package_id, [relative_path], command_id)
        elif isinstance(body, bytes):
            self._writer.announce(package_id)
        largest = self._limits.max_file_bytes
        if small and kept_as is not None:
            self._classes[package_id, sender] = kept_as
            if len(self._classes) > _CLASSES_REMEMBERED:
                del self._classes[next(iter(self._classes))]
            storing = self._small.store(body, declared=declared, max_bytes=largest, retention_class=kept_as)
        else:
            stream = from_any(body) if isinstance(body, bytes) else body
            storing = self._blobs.store(stream, declared=declared, max_bytes=largest)
        blob = await traced("store blob", storing)
        try:
            placed = [Placed(relative_path, media_type, blob)]
            return await self._record(package_id, placed, actor, command_id, self.principal)
        except RejectedError:
            self._classes.pop((package_id, sender), None)
            raise

    async def ingest_files(
        self, package_id: UUID, files: Bundle, actor: str, *, command_id: UUID | None = None
    ) -> Acknowledgement:
        check_text("actor", actor)
        await self._ask_writer(package_id, [], command_id)
        placed = await traced("store blobs", self._bundles.store(_bounded(files), self._limits.max_file_bytes))
        return await self._record(package_id, placed, actor, command_id, self.principal)

    async def ingest_named(
        self, package_id: UUID, files: Sequence[NamedFile], actor: str, *, command_id: UUID | None = None
    ) -> Acknowledgement:
        check_text("actor", actor)
        _check_count(len(files))
        paths = [file.relative_path for file in files]
        await self._ask_writer(package_id, paths, command_id)
        try:
            await self._require_readable(files)
        except UnknownContentError:
            placed = await self._recorded(package_id, files, command_id)
            if placed is None:
                raise
        else:
            placed = await self._bundles.find(files)
        return await self._record(package_id, placed, actor, command_id, self.principal)

    async def _recorded(
        self, package_id: UUID, files: Sequence[NamedFile], command_id: UUID | None
    ) -> list[Placed] | None:
        """The files as an earlier attempt of the command recorded them; None if there was none, or with other files.

        A retry must get the first answer even if the views do not show yet, or no longer show, that the caller may read
        the files. Only the package's own events are read: looking for the named blobs would reveal which are stored.
        """
        try:
            await self._ask_writer(package_id, [file.relative_path for file in files], None)
        except RejectedError:
            pass  # as a new command it would be refused, so it may be a retry
        else:
            return None
        found: dict[str, FileIngested] = {}
        extent = await self.package_extent(package_id)
        async with aclosing(self._log.read(package_id=package_id, extent=extent)) as events:
            async for event in events:
                if event.command_id == command_id and isinstance(event.payload, FileIngested):
                    found[event.payload.relative_path] = event.payload
        placed = []
        for file in files:
            was = found.get(file.relative_path)
            if was is None or (was.size_bytes, was.blake3) != (file.size_bytes, file.blake3):
                return None
            place = was.receipt
            blob = StoredBlob(place.backend_id, place.key, place.offset, place.length, was.blake3, was.sha256)
            placed.append(Placed(file.relative_path, file.media_type, blob))
        return placed

    async def known_blobs(self, digests: Sequence[bytes]) -> frozenset[bytes]:
        if not self._readable.everywhere:
            digests = list(await self._readable_of(digests, self._queries.readable_blobs))
        return await self._bundles.known(digests)

    async def _require_readable(self, files: Sequence[NamedFile]) -> None:
        """Raise UnknownContentError unless the caller may read these files' bytes in some package."""
        if self._readable.everywhere:
            return
        blobs = await self._readable_of([file.blob for file in files], self._queries.readable_blobs)
        digests = await self._readable_of([file.blake3 for file in files], self._queries.readable_files)
        for file in files:
            if file.blob not in blobs or file.blake3 not in digests:
                raise UnknownContentError(
                    f"{ContentAddress.of_digest(file.blob)} is not stored here as {file.relative_path!r} needs it; "
                    "send the bytes"
                )

    async def _readable_of(
        self, digests: Sequence[bytes], ask: Callable[[Set[bytes]], Awaitable[frozenset[bytes]]]
    ) -> frozenset[bytes]:
        """The digests among these that are in packages that the caller may read; none if the views are unavailable."""
        wanted, found = list(set(digests)), frozenset[bytes]()
        try:
            await self._fresh()
            for start in range(0, len(wanted), _ASKED_AT_ONCE):
                found |= await ask(set(wanted[start : start + _ASKED_AT_ONCE]))
        except UnavailableError:
            return frozenset()
        return found

    async def read_files(
        self,
        package_id: UUID,
        *,
        after: str | None = None,
        largest: int | None = None,
        wait_sequence: int | None = None,
    ) -> AsyncGenerator[Group, None]:
        package = await self.get_package(package_id, wait_sequence=wait_sequence)
        if package.manifest_digest is None:
            raise IllegalPackageStateError(f"package {package_id} is open; it is read as a whole once it is finalized")

        async def pages() -> AsyncIterator[Sequence[PlacedFile]]:
            last = after or ""
            while page := await self._queries.placed_files(package_id, last, largest):
                yield page
                last = page[-1].relative_path

        async with aclosing(self._bundles.read(pages())) as groups:
            async for group in groups:
                yield group

    async def finalize(self, package_id: UUID, actor: str, *, command_id: UUID | None = None) -> Acknowledgement:
        check_text("actor", actor)
        command = FinalizePackage(package_id, command_id or uuid4(), actor, self._grants, self.principal)
        return await self._write(command)

    async def get_package(self, package_id: UUID, *, wait_sequence: int | None = None) -> Package:
        package = await self._seen(package_id, lambda: self._queries.package(package_id), wait_sequence)
        if package is None:
            await self._require_followed(package_id)
            raise PackageNotFoundError(f"there is no package {package_id}")
        return package

    async def list_packages(
        self, where: PackageFilter | None = None, *, limit: int = DEFAULT_PAGE, cursor: str | None = None
    ) -> Page[Package]:
        _check_limit(limit)
        asked = where or PackageFilter()
        if asked.manifest_digest is not None and cursor is None:  # one package, looked up as in `get_package`

            async def named() -> Page[Package] | None:
                page = await self._queries.packages(asked, limit=limit)
                return page if page.items else None

            return await self._seen(None, named, None) or Page((), None)
        await self._fresh()
        return await self._queries.packages(asked, limit=limit, cursor=cursor)

    async def list_usage(
        self,
        producer: str | None = None,
        retention_class: str | None = None,
        *,
        limit: int = DEFAULT_PAGE,
        cursor: str | None = None,
    ) -> Page[UsageTotal]:
        _check_limit(limit)
        await self._fresh("usage")
        return await self._queries.usage(producer, retention_class, limit=limit, cursor=cursor)

    async def list_files(
        self,
        package_id: UUID,
        *,
        limit: int = DEFAULT_PAGE,
        cursor: str | None = None,
        wait_sequence: int | None = None,
    ) -> Page[File]:
        _check_limit(limit)
        await self.get_package(package_id, wait_sequence=wait_sequence)
        return await self._queries.files(package_id, limit=limit, cursor=cursor)

    async def get_file_record(self, file_id: UUID) -> File:
        return (await self.find_content(file_id)).file

    async def get_file_at(self, package_id: UUID, relative_path: str, *, wait_sequence: int | None = None) -> File:
        check_path(relative_path)
        file = await self._seen(
            package_id, lambda: self._queries.file_at(package_id, relative_path), wait_sequence, settled=True
        )
        if file is None:
            await self.get_package(package_id)
            await self._require_followed(package_id)
            raise FileNotFoundInRegistryError(f"package {package_id} has no file {relative_path!r}")
        return file

    async def find_content(self, file_id: UUID) -> FoundFile:
        """The file and where its bytes lie, for `read_content`. Raises as `get_file_record`."""
        found = await self._seen(None, lambda: self._queries.found_file(file_id), None, settled=True)
        if found is None:
            raise FileNotFoundInRegistryError(f"there is no file {file_id}")
        return found

    async def open_content(
        self, file_id: UUID, offset: int = 0, length: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        return await self.read_content(await self.find_content(file_id), offset, length)

    async def read_content(
        self, found: FoundFile, offset: int = 0, length: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """As `open_content`, for a file that `find_content` has found."""
        file = found.file
        if offset < 0 or (length is not None and length < 0):
            raise InvalidRequestError("offset and length of a range must not be negative")
        if offset > file.size_bytes or (offset == file.size_bytes and offset > 0):
            raise RangeNotSatisfiableError(f"the file has {file.size_bytes:,} bytes", file.size_bytes)
        wanted = min(file.size_bytes - offset, file.size_bytes if length is None else length)
        if wanted == file.size_bytes:
            return await self._bundles.reads.whole(_places(found), file.blake3, wanted)
        return await self._bundles.reads.part(_places(found), offset, wanted)

    async def read_held(self, found: FoundFile) -> bytes:
        """All bytes of a file that `find_content` has found; at most HELD_BYTES. Raises as `open_content`."""
        return await self._bundles.reads.held(_places(found), found.file.blake3, found.file.size_bytes)

    async def get_manifest_bytes(
        self,
        package_id: UUID,
        format: ManifestFormat = "cbor",  # noqa: A002 - the documented name
        *,
        wait_sequence: int | None = None,
    ) -> bytes:
        if format not in ("cbor", "json"):
            raise InvalidRequestError("a manifest has the format `cbor` or `json`")
        found = await self._seen(package_id, lambda: self._queries.manifest(package_id), wait_sequence, settled=True)
        if found is None:
            await self.get_package(package_id)
            await self._require_followed(package_id)
            raise IllegalPackageStateError(f"package {package_id} is open; it has a manifest once it is finalized")
        cbor = found.inline if found.inline is not None else await self._claim(found.key, found.digest)
        return cbor if format == "cbor" else await asyncio.to_thread(to_json, cbor)

    async def read_events(
        self,
        since: Since = None,
        *,
        package_id: UUID | None = None,
        where: EventFilter | None = None,
        follow: bool = False,
        order: Order = "log",
        poll_seconds: float = 0.1,
    ) -> AsyncGenerator[RecordedEvent]:
        asked = filter_of(where, package_id, order, follow=follow)
        wanted = ScopedFilter(
            asked.package_id, asked.producers, asked.subjects, asked.retention_classes, asked.types, self._readable
        )
        position, package_id = await position_of(self._log, start_of(since)), asked.package_id
        extent = None if package_id is None else await self.package_extent(package_id)
        if order == "time" and package_id is None:
            events = in_order_of_time(self._log, position, await self._log.end())
        else:
            events = self._log.read(
                position, package_id=package_id, extent=extent, follow=follow, poll_seconds=poll_seconds
            )
        async with aclosing(events):
            async for event in events:
                if await self.origins.shows(event, wanted):
                    yield event

    async def _find_origins(self, package_ids: Set[UUID]) -> Mapping[UUID, Origin]:
        return await find_origins(package_ids, self._queries, self._log, self.package_extent)

    async def package_extent(self, package_id: UUID) -> PackageExtent | None:
        """Where the package's events lie, if that can be found out quickly; otherwise None."""
        if self._freshen is not None:
            return None  # the embedded log needs no extent
        found = await self._writer.extent(package_id)
        if found is not None:
            return found
        try:
            async with asyncio.timeout(EXTENT_SECONDS):
                package = await self._queries.package(package_id)
        except (TimeoutError, ArtifactStoreError):
            return None
        # Events that the view has not seen may be in the log.
        return None if package is None else PackageExtent(package.created_at)

    async def _record(
        self,
        package_id: UUID,
        placed: Sequence[Placed],
        actor: str,
        command_id: UUID | None,
        principal: str | None,
    ) -> Acknowledgement:
        """Record files whose bytes are durable."""
        now = self._blobs.clock.micros()  # by the store's clock, since the receipt is about the store
        files = tuple(
            StoredFile(
                relative_path=file.relative_path,
                media_type=file.media_type,
                size_bytes=file.blob.length,
                blake3=file.blob.blake3,
                sha256=file.blob.sha256,
                backend_id=file.blob.backend_id,
                key=file.blob.key,
                offset=file.blob.offset,
                length=file.blob.length,
                stored_at=now,
            )
            for file in placed
        )
        command = IngestFiles(package_id, command_id or uuid4(), actor, files, self._grants, principal)
        return await self._write(command)

    async def _write(self, command: Command) -> Acknowledgement:
        before = await self._end.before_write()
        done = await self._writer.submit(command)
        done.position = self._end.after(done.position, before)
        return done

    async def _record_upload(
        self, package_id: UUID, file: Placed, actor: str, command_id: UUID, principal: str | None
    ) -> Acknowledgement:
        return await self._record(package_id, [file], actor, command_id, principal)

    async def _may_write(self, package_id: UUID) -> bool:
        """Whether the caller has the right to write to the package, whatever its state."""
        if self._grants is EVERYTHING:
            return True
        try:
            await self._writer.check_ingest(IngestCheck(package_id, [], None, self._grants))
        except (PackageNotFoundError, ForbiddenError):
            return False
        except ConflictError:
            pass
        return True

    async def _fresh(self, view: str = "registry") -> None:
        if self._freshen is not None:
            await self._freshen(view)

    async def _seen(
        self,
        package_id: UUID | None,
        read: Callable[[], Awaitable[Found | None]],
        wait_sequence: int | None,
        *,
        settled: bool = False,
    ) -> Found | None:
        """The result of `read`, once the view is recent enough.

        With `wait_sequence`, the view must hold the package's event with this sequence. Without it, a read that finds
        nothing waits until the view holds what the log held when the request came, so that nothing acknowledged is
        reported as missing. Set `settled` for things that never change: if one is found, it is current.
        """
        if wait_sequence is not None and package_id is not None:
            await self._wait_sequence(package_id, wait_sequence)
        elif self._freshen is not None:
            if settled and (found := await read()) is not None:
                return found
            await self._fresh()
        found = await read()
        if found is not None or self._freshen is not None:
            return found
        await self._waits.for_end(package_id)
        return await read()

    async def _require_followed(self, package_id: UUID) -> None:
        """Raise PackageParkedError if the view has stopped following the package: it may lack events of the log."""
        parked = await self._queries.parked(package_id)
        if parked is not None:
            raise parked_error(package_id, parked)

    async def _wait_sequence(self, package_id: UUID, sequence: int) -> None:
        await self._fresh()
        package = await self._queries.package(package_id)
        last = None if package is None else package.last_event_sequence
        if last is not None and last >= sequence:
            return
        if self._freshen is None:
            await self._waits.for_sequence(package_id, sequence, self._readable)
            return
        await self._require_followed(package_id)
        raise beyond_log(package_id, last, sequence)  # the view has just been brought up to the log's end

    async def _claim(self, key: str | None, digest: ContentAddress) -> bytes:
        if key is None:
            raise CorruptError(f"the view does not say where manifest {digest} is stored")
        size = await self._blobs.size(key)
        if size is None:
            raise CorruptError(f"the blob of manifest {digest} is missing")
        data = await joined(self._blobs.read(key, 0, size))
        if await asyncio.to_thread(manifest_digest, data) != digest.digest:
            raise CorruptError(f"the blob of manifest {digest} does not hold the bytes that were acknowledged")
        return data


def _places(found: FoundFile) -> tuple[Place, ...]:
    """Where the file's bytes may lie: at the places that the view knows, or in a blob that has only this file."""
    return (*found.places, (content_key(found.file.blake3), 0))


def _check_limit(limit: int) -> None:
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidRequestError(f"limit must be 1 to {MAX_PAGE}")


async def _bounded(files: Bundle) -> AsyncIterator[Group]:
    """The same bundle. Raises TooLargeError at the first file that exceeds a command's limit."""
    count = 0
    async for group in files:
        count += 1 if isinstance(group, StreamedFile) else len(group)
        _check_count(count)
        yield group


def _check_count(count: int) -> None:
    if count > MAX_BUNDLE_FILES:
        raise TooLargeError(f"one command adds at most {MAX_BUNDLE_FILES:,} files, and this one has {count:,} or more")
