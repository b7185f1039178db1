"""The two rows that the registry makes of a file, for either database: one in `artifact_files`, one in
`storage_locations`. Nearly all rows are these, so on PostgreSQL they are put together as its binary `COPY` has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from struct import Struct
from uuid import UUID

from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncConnection

from artifact_store.manifest import ContentAddress
from schemas.file_fields import FileFields
from services.views.bulk import Row, copy_encoded, insert_rows, on_postgresql
from services.views.tables import artifact_files

# PostgreSQL documentation, COPY, "Binary Format": the number of columns, then each value behind its length.
_SHAPES = 1024
_ADDRESS = b"blake3:"
_ADDRESS_BYTES = len(_ADDRESS) + 64


@lru_cache(_SHAPES)
def _file_row(path: int, media_type: int) -> Callable[..., bytes]:
    """Makes a row of `artifact_files` whose texts have these lengths: each column's length and value in their order."""
    return Struct(f">h i16s i16s i{path}s i{media_type}s iq i32s i32s iq").pack


@lru_cache(_SHAPES)
def _location_row(backend_id: int, key: int) -> Callable[..., bytes]:
    """As `_file_row`, of `storage_locations`; the content address is in two parts."""
    return Struct(f">h i16s i16s i{backend_id}s i{len(_ADDRESS)}s64s i{key}s iq iq iq").pack


async def insert_files(
    connection: AsyncConnection, files: Table, locations: Table, found: Sequence[FileFields]
) -> None:
    """Insert both rows of every file. As `insert_rows`."""
    if not found:
        return
    if on_postgresql(connection):
        # By their first column, the key: neighbours in its index are then written one after the other, which saves the
        # database a fifth of its work. What is built beside the live view has no index yet.
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
