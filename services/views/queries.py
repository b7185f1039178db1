"""Queries on the views: packages, files, locations, manifests, retention, usage, and a view's position in the log."""

from __future__ import annotations

import base64
import binascii
import copy
import json
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self
from uuid import UUID

import cbor2
from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Integer,
    Row,
    Select,
    Text,
    Tuple,
    Uuid,
    and_,
    any_,
    bindparam,
    false,
    literal,
    or_,
    select,
    true,
    tuple_,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.types import TypeEngine

from artifact_store.canonical import canonical_cbor
from artifact_store.errors import InvalidRequestError
from artifact_store.events import PackageCreated
from artifact_store.manifest import ContentAddress, content_key
from artifact_store.models import DEFAULT_PAGE, MAX_PAGE, File, Package, PackageFilter, Page, Parked, UsageTotal
from artifact_store.position import Position
from artifact_store.rules import check_path, check_text
from services.core.access import EVERYWHERE, Scope
from services.views.database import Views
from services.views.engine.checkpoints import read_position
from services.views.lookups import Lookups
from services.views.projections import projection_named
from services.views.tables import (
    artifact_files,
    artifact_manifests,
    artifact_packages,
    parked_packages,
    projection_generations,
    retention_state,
    storage_locations,
    usage_totals,
)

PAGE_BYTES = 1 << 20
"""The most metadata on one page. A thousand packages at their limit would be 64 MiB, and ten times that when parsed."""

_ROWS_AT_ONCE = 50

NEWEST_PACKAGES = 200
"""How many of a reader's newest packages are searched for bytes that the reader may know of."""


@dataclass(frozen=True, slots=True)
class PlacedFile:
    """A file and where its bytes lie: `size_bytes` at `offset` in `key`. `blake3` is the file's digest (32 bytes)."""

    file_id: UUID
    relative_path: str
    media_type: str
    size_bytes: int
    blake3: bytes
    key: str
    offset: int


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file's metadata and the places of its bytes: pairs of key and offset, in the order of the locations' ids."""

    file: File
    places: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class ManifestLocation:
    """The manifest of a finalized package: inline bytes, or the key of the blob that holds them."""

    digest: ContentAddress
    inline: bytes | None
    key: str | None


@dataclass(frozen=True, slots=True)
class Retention:
    """How long a package is kept: for `retention_days` after `counted_from`, that is until `retain_until`.

    None as days or end means for ever. Times are µs since 1970, UTC.
    """

    package_id: UUID
    retention_class: str
    retention_days: int | None
    counted_from: int
    retain_until: int | None


class Origin(NamedTuple):
    """The properties of a package at its creation that rights and event filters are matched against."""

    producer: str
    subject: str
    retention_class: str

    @classmethod
    def of(cls, created: PackageCreated) -> Self:
        """The origin of the package that this event created."""
        return cls(created.producer, created.subject, created.retention_class)


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of the registry view: its position, and of some packages the last sequence and the origin.

    `parked` has all parked packages. A package that the view does not know is absent.
    """

    position: Position | None
    last_sequences: Mapping[UUID, int]
    parked: Mapping[UUID, Parked]
    origins: Mapping[UUID, Origin] = field(default_factory=dict)


_FOUND_FILES = (
    select(artifact_files, storage_locations.c.key, storage_locations.c.offset)
    .outerjoin(storage_locations, storage_locations.c.artifact_file_id == artifact_files.c.id)
    .order_by(artifact_files.c.id, storage_locations.c.id)
)
_FOUND_FILES_ON = {
    # An array is one parameter, so the statement is the same for any number of files.
    "postgresql": _FOUND_FILES.where(artifact_files.c.id == any_(bindparam("ids", type_=postgresql.ARRAY(Uuid)))),
    "sqlite": _FOUND_FILES.where(artifact_files.c.id.in_(bindparam("ids", expanding=True))),
}
"""The files of some `ids` with their locations, by dialect."""


class Queries:
    """Queries on the views. Missing things are None or an empty page. Each call is a short read.

    Anything outside `scope` counts as missing: the database itself leaves it out.

    Every method may raise UnavailableError, and ConfigurationError if tables are missing.
    """

    def __init__(self, views: Views, scope: Scope = EVERYWHERE) -> None:
        self._views = views
        self._scope = scope
        self._lookups = Lookups[Scope, FoundFile](lambda scope, wanted: self.within(scope)._found_files(wanted))

    def within(self, scope: Scope) -> Queries:
        """The same queries, limited to the packages of this scope."""
        found = copy.copy(self)
        found._scope = scope
        return found

    async def package(self, package_id: UUID) -> Package | None:
        """The package with this id."""
        async with self._views.reading() as connection:
            query = select(artifact_packages).where(artifact_packages.c.id == package_id)
            row = (await connection.execute(query.where(*self._visible()))).one_or_none()
            return None if row is None else _package(row, await _marks(connection, package_id))

    async def parked(self, package_id: UUID) -> Parked | None:
        """Where the registry view stopped following the package, or None if it follows it.

        A package that the view does not know at all is only found with the scope EVERYWHERE.
        """
        async with self._views.reading() as connection:
            if visible := self._visible():
                query = select(artifact_packages.c.id).where(artifact_packages.c.id == package_id, *visible)
                if (await connection.execute(query)).one_or_none() is None:
                    return None
            return (await _marks(connection, package_id)).get(package_id)

    async def packages(
        self, where: PackageFilter | None = None, limit: int = DEFAULT_PAGE, cursor: str | None = None
    ) -> Page[Package]:
        """Packages, newest first. Each is on one page at most, whatever is created between the calls.

        A page ends before `limit` if its metadata would exceed PAGE_BYTES, but it has at least one package.

        Raises InvalidRequestError: a bad cursor, limit or filter.
        """
        table = artifact_packages.c
        key = (table.created_at, table.id)
        query = select(artifact_packages).where(*self._visible()).order_by(*(column.desc() for column in key))
        for name in ("producer", "subject", "status", "retention_class", "manifest_digest"):
            wanted = getattr(where, name, None)
            if wanted is not None:
                check_text(name, wanted)
                query = query.where(table[name] == wanted)
        if cursor is not None:
            query = query.where(tuple_(*key) < _behind(cursor, "packages", key))
        rows, more = await self._page(query, limit, lambda row: len(row.metadata.encode()))
        async with self._views.reading() as connection:
            marks = await _marks(connection)
        following = write_cursor("packages", rows[-1].created_at, rows[-1].id) if more else None
        return Page(tuple(_package(row, marks) for row in rows), following)

    async def files(self, package_id: UUID, limit: int = DEFAULT_PAGE, cursor: str | None = None) -> Page[File]:
        """The package's files, sorted by the UTF-8 bytes of their paths; an empty page for an unknown package.

        Raises InvalidRequestError: a bad cursor or limit.
        """
        table = artifact_files.c
        query = select(artifact_files).where(table.package_id == package_id, *self._visible(table.package_id))
        query = query.order_by(table.relative_path)
        if cursor is not None:
            (path,) = read_cursor(cursor, "files", table.relative_path)
            query = query.where(table.relative_path > path)
        rows, more = await self._page(query, limit)
        return Page(tuple(_file(row) for row in rows), write_cursor("files", rows[-1].relative_path) if more else None)

    async def found_file(self, file_id: UUID) -> FoundFile | None:
        """The file with this id and where its bytes lie. Concurrent callers share a query."""
        return await self._lookups.find(self._scope, file_id)

    async def _found_files(self, file_ids: Set[UUID]) -> dict[UUID, FoundFile]:
        query = _FOUND_FILES_ON[self._views.dialect].where(*self._visible(artifact_files.c.package_id))
        found: dict[UUID, FoundFile] = {}
        for row in await self._all(query, {"ids": list(file_ids)}):
            known = found.get(row.id)
            place = () if row.key is None else ((row.key, row.offset),)
            found[row.id] = FoundFile(_file(row), place if known is None else known.places + place)
        return found

    async def file_at(self, package_id: UUID, relative_path: str) -> File | None:
        """The package's file with this path. Raises InvalidPathError, which names the rule that the path breaks."""
        check_path(relative_path)
        table = artifact_files.c
        query = select(artifact_files).where(table.package_id == package_id, table.relative_path == relative_path)
        row = await self._one(query.where(*self._visible(table.package_id)))
        return _file(row) if row else None

    async def placed_files(
        self, package_id: UUID, after: str = "", largest: int | None = None, limit: int = MAX_PAGE
    ) -> tuple[PlacedFile, ...]:
        """The package's files after the path `after`, of at most `largest` bytes, each with one of its locations.

        Sorted by the UTF-8 bytes of their paths, at most `limit`.
        """
        files, places = artifact_files.c, storage_locations.c
        query = (
            select(artifact_files, places.id.label("place"), places.key, places.offset)
            .join(storage_locations, places.artifact_file_id == files.id)
            .where(files.package_id == package_id, files.relative_path > after, *self._visible(files.package_id))
            .order_by(files.relative_path, places.id)
            .limit(limit)
        )
        if largest is not None:
            query = query.where(files.size_bytes <= largest)
        async with self._views.reading() as connection:
            rows = (await connection.execute(query)).all()
        first = {row.id: row for row in reversed(rows)}  # a file has one location as long as blobs are never moved
        return tuple(
            PlacedFile(row.id, row.relative_path, row.media_type, row.size_bytes, row.blake3, row.key, row.offset)
            for row in rows
            if first[row.id] is row
        )

    async def manifest(self, package_id: UUID) -> ManifestLocation | None:
        """Where the manifest of a finalized package is; None for an open or unknown package."""
        table = artifact_manifests.c
        query = select(artifact_manifests).where(table.package_id == package_id, *self._visible(table.package_id))
        row = await self._one(query)
        return ManifestLocation(ContentAddress(row.digest), row.manifest, row.manifest_key) if row else None

    async def retention(self, package_id: UUID) -> Retention | None:
        """How long the package is kept, according to the retention view."""
        table = retention_state.c
        query = select(retention_state).where(table.package_id == package_id, *self._visible(table.package_id))
        row = await self._one(query)
        if row is None:
            return None
        return Retention(row.package_id, row.retention_class, row.retention_days, row.counted_from, row.retain_until)

    async def usage(
        self,
        producer: str | None = None,
        retention_class: str | None = None,
        limit: int = DEFAULT_PAGE,
        cursor: str | None = None,
    ) -> Page[UsageTotal]:
        """Totals of ingested packages, files and bytes by producer, retention class and day, from the usage view.

        Totals are not kept by subject, so a producer's totals are included only if all its packages are in the scope.

        Raises InvalidRequestError: a bad cursor, limit or filter.
        """
        table = usage_totals.c
        key = (table.producer, table.retention_class, table.day)
        query = select(usage_totals).order_by(*key)
        if not self._scope.everywhere:
            whole = [packages.producers for packages in self._scope.packages if "*" in packages.subjects]
            query = query.where(or_(false(), *(self._any(table.producer, patterns) for patterns in whole)))
        for column, wanted in ((table.producer, producer), (table.retention_class, retention_class)):
            if wanted is not None:
                check_text(column.name, wanted)
                query = query.where(column == wanted)
        if cursor is not None:
            query = query.where(tuple_(*key) > _behind(cursor, "usage", key))
        rows, more = await self._page(query, limit)
        following = write_cursor("usage", *rows[-1][:3]) if more else None
        return Page(tuple(_usage(row) for row in rows), following)

    async def origins(self, package_ids: Set[UUID]) -> dict[UUID, Origin]:
        """The origins of these packages, as far as the view knows them."""
        return dict((await self.progress(package_ids)).origins)

    async def readable_blobs(self, digests: Set[bytes]) -> frozenset[bytes]:
        """The blobs among these (BLAKE3 digests) that hold a file of the reader's newest packages."""
        by_key = {content_key(digest): digest for digest in digests}
        files, places = artifact_files.c, storage_locations.c
        query = select(places.key).join(artifact_files, files.id == places.artifact_file_id)
        found = await self._all(query.where(files.package_id.in_(self._newest()), places.key.in_(by_key)).distinct())
        return frozenset(by_key[row.key] for row in found)

    async def readable_files(self, digests: Set[bytes]) -> frozenset[bytes]:
        """The digests among these (BLAKE3) that belong to a file of the reader's newest packages."""
        table = artifact_files.c
        query = select(table.blake3).where(table.package_id.in_(self._newest()), table.blake3.in_(digests)).distinct()
        return frozenset(row.blake3 for row in await self._all(query))

    async def progress(self, package_ids: Set[UUID]) -> Progress:
        """The progress of the registry view, with these packages, whether or not they are in the scope."""
        table = artifact_packages.c
        sequences: dict[UUID, int] = {}
        origins: dict[UUID, Origin] = {}
        async with self._views.reading() as connection:
            # Read the position first, so that the rows are at that position or later.
            position = await read_position(connection, projection_named("registry"))
            wanted = sorted(package_ids)
            for first in range(0, len(wanted), MAX_PAGE):
                some = wanted[first : first + MAX_PAGE]
                query = select(
                    table.id, table.last_event_sequence, table.producer, table.subject, table.retention_class
                )
                for row in await connection.execute(query.where(table.id.in_(some))):
                    sequences[row.id] = row.last_event_sequence
                    origins[row.id] = Origin(row.producer, row.subject, row.retention_class)
            return Progress(position, sequences, await _marks(connection), origins)

    async def checkpoint(self, projection: str) -> Position | None:
        """The view's position; None before it has folded from any log. Raises InvalidRequestError: no such view."""
        known = projection_named(projection)
        async with self._views.reading() as connection:
            return await read_position(connection, known)

    def _visible(self, package_id: Column[Any] | None = None) -> tuple[ColumnElement[bool], ...]:
        """The conditions that leave out packages outside the scope, or rows whose `package_id` column names one."""
        if self._scope.everywhere:
            return ()
        table = artifact_packages.c
        within = or_(
            false(),
            *(
                and_(self._any(table.producer, packages.producers), self._any(table.subject, packages.subjects))
                for packages in self._scope.packages
            ),
        )
        if package_id is None:
            return (within,)
        return (select(table.id).where(table.id == package_id, within).exists(),)

    def _any(self, column: Column[Any], patterns: Sequence[str]) -> ColumnElement[bool]:
        """The condition that the column's text matches one of the patterns. Case matters."""
        if "*" in patterns:
            return true()
        exact = [pattern for pattern in patterns if "*" not in pattern]
        forms = [pattern for pattern in patterns if "*" in pattern]
        if self._views.dialect == "sqlite":  # its LIKE ignores case
            globs = [pattern.replace("[", "[[]").replace("?", "[?]") for pattern in forms]
            like = [column.op("GLOB")(glob) for glob in globs]
        else:
            like = [column.like(_like(pattern), escape="\\") for pattern in forms]
        return or_(false(), column.in_(exact) if exact else false(), *like)

    def _newest(self) -> Select[Any]:
        table = artifact_packages.c
        return (
            select(table.id)
            .where(*self._visible())
            .order_by(table.created_at.desc(), table.id.desc())
            .limit(NEWEST_PACKAGES)
        )

    async def _all(self, query: Select[Any], values: Mapping[str, Any] | None = None) -> Sequence[Row[Any]]:
        async with self._views.reading(single=True) as connection:
            found: Sequence[Row[Any]] = (await connection.execute(query, values)).all()
        return found

    async def _one(self, query: Select[Any]) -> Row[Any] | None:
        async with self._views.reading(single=True) as connection:
            found: Row[Any] | None = (await connection.execute(query)).one_or_none()
        return found

    async def _page(
        self, query: Select[Any], limit: int, weight: Callable[[Row[Any]], int] = lambda _: 0
    ) -> tuple[list[Row[Any]], bool]:
        """At most `limit` rows and PAGE_BYTES of `weight`, but at least one row; and whether there are more."""
        if not 1 <= limit <= MAX_PAGE:
            raise InvalidRequestError(f"limit must be 1 to {MAX_PAGE}")
        rows: list[Row[Any]] = []
        size = 0
        options = {"yield_per": _ROWS_AT_ONCE}
        async with (
            self._views.reading() as connection,
            connection.stream(query.limit(limit + 1), execution_options=options) as result,
        ):
            async for row in result:
                size += weight(row)
                if len(rows) == limit or (rows and size > PAGE_BYTES):
                    return rows, True
                rows.append(row)
        return rows, False


def _like(pattern: str) -> str:
    for special in "\\%_":
        pattern = pattern.replace(special, "\\" + special)
    return pattern.replace("*", "%")


def _behind(cursor: str, listing: str, key: Sequence[Column[Any]]) -> Tuple:
    """The key in the cursor, as values of these columns. Raises InvalidRequestError."""
    values = zip(read_cursor(cursor, listing, *key), key, strict=True)
    return tuple_(*(literal(value, column.type) for value, column in values))


async def _marks(connection: AsyncConnection, package_id: UUID | None = None) -> dict[UUID, Parked]:
    """The marks of the registry view's parked packages, of one package or all; there are never many."""
    live, table = projection_generations.c, parked_packages.c
    query = (
        select(table.package_id, table.partition, table.offset, table.events, table.cause)
        .join(projection_generations, live.generation == table.generation)
        .where(live.projection == "registry", table.package_id.is_not(None))
    )
    if package_id is not None:
        query = query.where(table.package_id == package_id)
    return {row[0]: Parked(*row[1:]) for row in await connection.execute(query)}


def _package(row: Row[Any], marks: Mapping[UUID, Parked]) -> Package:
    return Package(
        package_id=row.id,
        name=row.name,
        producer=row.producer,
        subject=row.subject,
        retention_class=row.retention_class,
        status=row.status,
        metadata=json.loads(row.metadata),
        manifest_digest=None if row.manifest_digest is None else ContentAddress(row.manifest_digest),
        last_event_sequence=row.last_event_sequence,
        created_at=row.created_at,
        finalized_at=row.finalized_at,
        parked=marks.get(row.id),
    )


def _file(row: Row[Any]) -> File:
    return File(
        file_id=row.id,
        package_id=row.package_id,
        relative_path=row.relative_path,
        media_type=row.media_type,
        size_bytes=row.size_bytes,
        blake3=row.blake3,
        sha256=row.sha256,
        created_at=row.created_at,
    )


def _usage(row: Row[Any]) -> UsageTotal:
    return UsageTotal(row.producer, row.retention_class, row.day, row.packages, row.files, row.bytes)


_MAX_TEXT = 4096


def write_cursor(listing: str, *key: int | str | UUID) -> str:
    """The cursor for rows after this key: base64url (RFC 4648 §5) of the canonical CBOR array [listing, key…]."""
    return _encoded([listing, *(part.bytes if isinstance(part, UUID) else part for part in key)])


def _encoded(parts: list[Any]) -> str:
    return base64.urlsafe_b64encode(canonical_cbor(parts)).rstrip(b"=").decode()


def read_cursor(text: str, listing: str, *columns: Column[Any]) -> list[Any]:
    """The key in a cursor of this listing: for each of these columns, a value that the database accepts.

    Raises InvalidRequestError: the listing has not given out this cursor.
    """
    try:
        if len(text) > _MAX_TEXT:
            raise ValueError("too long")
        raw = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
        found = cbor2.loads(raw)
        if not isinstance(found, list) or found[:1] != [listing]:
            raise ValueError("not a cursor of this listing")
        key = [_value(part, column.type) for part, column in zip(found[1:], columns, strict=True)]
        if _encoded(found) != text:
            raise ValueError("not in the form that is given out")
    except (ValueError, TypeError, binascii.Error, cbor2.CBORDecodeError, RecursionError, OverflowError):
        raise InvalidRequestError("the cursor is not one that this listing has given out") from None
    return key


def _value(part: object, kind: TypeEngine[Any]) -> Any:
    """The part as a value of the column's type; rules for such values are not checked. Raises ValueError."""
    match part:
        case bytes() if isinstance(kind, Uuid):
            return UUID(bytes=part)
        case str() if isinstance(kind, Text) and "\0" not in part:
            return part
        case int() if isinstance(kind, Integer) and not isinstance(part, bool):
            bits = 64 if isinstance(kind, BigInteger) else 32
            if -(1 << bits - 1) <= part < 1 << bits - 1:
                return part
    raise ValueError("not a key of this listing")
