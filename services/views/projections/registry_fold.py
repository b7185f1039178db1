"""The registry: packages, files, storage locations and manifests.

Nearly all of its rows belong to files: each has one in `artifact_files` and one in `storage_locations`. For PostgreSQL
they are encoded for its binary `COPY`, straight from the bytes of the record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from struct import Struct
from uuid import UUID

from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncConnection

from artifact_store.errors import CorruptError
from artifact_store.events import Event, PackageCreated, PackageFinalized
from artifact_store.manifest import ContentAddress
from schemas.runs import Entry, FileFields
from services.core.state import CREATED, FINALIZED
from services.views.bulk import Row, copy_encoded, insert_rows, on_postgresql, update_rows
from services.views.projections.port import Tables, follows, known_packages
from services.views.tables import artifact_files, artifact_manifests, artifact_packages, storage_locations


@dataclass(slots=True)
class _Change:
    """The state of one package after the batch. `created` is set if the batch itself creates the package."""

    last_sequence: int
    status: str
    created: Event | None = None
    manifest_digest: str | None = None
    finalized_at: int | None = None


class RegistryProjection:
    """`artifact_packages`, `artifact_files`, `storage_locations`, `artifact_manifests`."""

    name = "registry"
    layout = 1
    tables: Sequence[Table] = (artifact_packages, artifact_files, storage_locations, artifact_manifests)

    async def fold(self, connection: AsyncConnection, tables: Tables, events: Sequence[Entry]) -> None:
        """As `Projection.fold`. Takes a few statements a batch, however many events there are."""
        packages = tables["artifact_packages"]
        columns = (packages.c.last_event_sequence, packages.c.status)
        known = await known_packages(connection, packages.c.id, columns, events)
        changes = {package_id: _Change(*found) for package_id, found in known.items()}
        files, manifests = _follow_all(changes, events)
        await insert_rows(connection, packages, [_package(c.created, c) for c in changes.values() if c.created])
        await insert_files(connection, tables["artifact_files"], tables["storage_locations"], files)
        await insert_rows(connection, tables["artifact_manifests"], manifests)
        await _update(connection, packages, changes)


def _follow_all(changes: dict[UUID, _Change], entries: Sequence[Entry]) -> tuple[list[FileFields], list[Row]]:
    """Update `changes` with the events. Returns the files among the events, and the rows of manifests."""
    files: list[FileFields] = []
    manifests: list[Row] = []
    change: _Change | None = None
    package_id: UUID | None = None
    for entry in entries:
        if entry.package_id is not package_id:
            package_id = entry.package_id
            change = changes.get(package_id)
        if isinstance(entry, FileFields) and change and change.status == CREATED:
            if entry.sequence != change.last_sequence + 1 and not follows(entry, change.last_sequence):
                continue
            change.last_sequence = entry.sequence
            files.append(entry)
            continue
        if not follows(entry, change.last_sequence if change else 0):
            continue
        change = _follow(changes, entry)
        if isinstance(entry, Event) and isinstance(entry.payload, PackageFinalized):
            digest = ContentAddress.of_digest(entry.payload_digest)
            change.status, change.manifest_digest, change.finalized_at = FINALIZED, digest, entry.created_at
            manifests.append((entry.package_id, digest, entry.payload.manifest, entry.payload.manifest_key))
    return files, manifests


def _follow(changes: dict[UUID, _Change], entry: Entry) -> _Change:
    change = changes.get(entry.package_id)
    if change is None and isinstance(entry, Event):  # `follows` made sure that the first event is not a file
        change = changes[entry.package_id] = _Change(0, CREATED, entry)
    if change is None or change.status != CREATED:
        raise CorruptError(f"package {entry.package_id}: event {entry.sequence} follows its finalization")
    change.last_sequence = entry.sequence
    return change


def _package(event: Event, change: _Change) -> Row:
    created = event.payload
    if not isinstance(created, PackageCreated):  # `follows` has ruled this out
        raise CorruptError(f"package {event.package_id} begins with {event.event_type}")
    return (
        event.package_id,
        created.name,
        created.producer,
        created.subject,
        created.retention_class,
        change.status,
        created.metadata,
        change.manifest_digest,
        change.last_sequence,
        event.actor,
        event.created_at,
        change.finalized_at,
    )


async def _update(connection: AsyncConnection, packages: Table, changes: dict[UUID, _Change]) -> None:
    """Update the rows of packages that earlier batches created: one statement for each kind of change."""
    row = packages.c
    before = [(package_id, change) for package_id, change in changes.items() if not change.created]
    advanced = [(package_id, c.last_sequence) for package_id, c in before if c.status == CREATED]
    await update_rows(connection, [row.id, row.last_event_sequence], advanced)
    finalized = [
        (package_id, c.last_sequence, c.status, c.manifest_digest, c.finalized_at)
        for package_id, c in before
        if c.status != CREATED
    ]
    columns = [row.id, row.last_event_sequence, row.status, row.manifest_digest, row.finalized_at]
    await update_rows(connection, columns, finalized)


# PostgreSQL documentation, COPY, "Binary Format": the number of columns, then each value after its length.
_SHAPES = 1024
_ADDRESS = b"blake3:"
_ADDRESS_BYTES = len(_ADDRESS) + 64


@lru_cache(_SHAPES)
def _file_row(path: int, media_type: int) -> Callable[..., bytes]:
    """Packs a row of `artifact_files` whose texts have these lengths (bytes): each column's length, then its value."""
    return Struct(f">h i16s i16s i{path}s i{media_type}s iq i32s i32s iq").pack


@lru_cache(_SHAPES)
def _location_row(backend_id: int, key: int) -> Callable[..., bytes]:
    """As `_file_row`, for `storage_locations`. The content address is given as prefix and hex digits."""
    return Struct(f">h i16s i16s i{backend_id}s i{len(_ADDRESS)}s64s i{key}s iq iq iq").pack


async def insert_files(
    connection: AsyncConnection, files: Table, locations: Table, found: Sequence[FileFields]
) -> None:
    """Insert both rows of every file. Fails as `insert_rows`."""
    if not found:
        return
    if on_postgresql(connection):
        # Sorted by the first column, the key, so that neighbours in its index are written one after the other. That
        # saves the database a fifth of its work. A build has no index yet.
        ordered = sorted if files is artifact_files else iter
        await copy_encoded(connection, files, ordered(_encoded_files(found)))
        await copy_encoded(connection, locations, ordered(_encoded_locations(found)))
    else:
        await insert_rows(connection, files, [_file(fields) for fields in found])
        await insert_rows(connection, locations, [_location(fields) for fields in found])


def _encoded_files(found: Iterable[FileFields]) -> Iterator[bytes]:
    known: UUID | None = None
    package = b""
    for package_id, _, created_at, file_id, path, media_type, size, blake3, sha256, _, _, _, _, _, _ in found:
        if package_id is not known:
            known, package = package_id, package_id.bytes
        paths, types = len(path), len(media_type)
        yield _file_row(paths, types)(
            8,
            16,
            file_id,
            16,
            package,
            paths,
            path,
            types,
            media_type,
            8,
            size,
            32,
            blake3,
            32,
            sha256,
            8,
            created_at,
        )


def _encoded_locations(found: Iterable[FileFields]) -> Iterator[bytes]:
    for _, _, _, file_id, _, _, _, blake3, _, location_id, backend_id, key, offset, length, stored_at in found:
        backends, keys = len(backend_id), len(key)
        address = blake3.hex().encode()
        yield _location_row(backends, keys)(
            8,
            16,
            location_id,
            16,
            file_id,
            backends,
            backend_id,
            _ADDRESS_BYTES,
            _ADDRESS,
            address,
            keys,
            key,
            8,
            offset,
            8,
            length,
            8,
            stored_at,
        )


def _file(fields: FileFields) -> Row:
    return (
        UUID(bytes=fields.file_id),
        fields.package_id,
        fields.relative_path.decode(),
        fields.media_type.decode(),
        fields.size_bytes,
        fields.blake3,
        fields.sha256,
        fields.created_at,
    )


def _location(fields: FileFields) -> Row:
    return (
        UUID(bytes=fields.location_id),
        UUID(bytes=fields.file_id),
        fields.backend_id.decode(),
        ContentAddress.of_digest(fields.blake3),
        fields.key.decode(),
        fields.offset,
        fields.length,
        fields.stored_at,
    )
