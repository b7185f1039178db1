"""The two rows that the registry makes of a file, for either database: one in `artifact_files`, one in
`storage_locations`. Nearly all rows are these, so on PostgreSQL they are put together as its binary `COPY` has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from struct import Struct
from uuid import UUID

from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncConnection

from schemas.file_fields import FileFields
from services.core.content_address import ContentAddress
from services.views.bulk import Row, copy_encoded, insert_rows, on_postgresql

# PostgreSQL documentation, COPY, "Binary Format": the number of columns, then each value behind its length.
_int32 = Struct(">i").pack
_int64 = Struct(">q").pack
_LENGTHS = tuple(_int32(length) for length in range(2048))
_FILE = b"".join(
    (
        b"\0\x08" + _LENGTHS[16] + b"%b" + _LENGTHS[16] + b"%b",  # id, package_id
        b"%b%b%b%b",  # relative_path, media_type
        _LENGTHS[8] + b"%b" + _LENGTHS[32] + b"%b" + _LENGTHS[32] + b"%b" + _LENGTHS[8] + b"%b",
        # size_bytes, blake3, sha256, created_at
    )
)
_LOCATION = b"".join(
    (
        b"\0\x08" + _LENGTHS[16] + b"%b" + _LENGTHS[16] + b"%b",  # id, artifact_file_id
        b"%b%b",  # backend_id
        _LENGTHS[71] + b"blake3:%b",  # content_address
        b"%b%b",  # key
        _LENGTHS[8] + b"%b" + _LENGTHS[8] + b"%b" + _LENGTHS[8] + b"%b",  # offset, length, created_at
    )
)


async def insert_files(
    connection: AsyncConnection, files: Table, locations: Table, found: Sequence[FileFields]
) -> None:
    """Insert both rows of every file. As `insert_rows`."""
    if not found:
        return
    if on_postgresql(connection):
        await copy_encoded(connection, files, _encoded_files(found))
        await copy_encoded(connection, locations, _encoded_locations(found))
    else:
        await insert_rows(connection, files, [_file(fields) for fields in found])
        await insert_rows(connection, locations, [_location(fields) for fields in found])


def _encoded_files(found: Iterable[FileFields]) -> Iterator[bytes]:
    known: UUID | None = None
    package = b""
    for package_id, _, created_at, file_id, path, media_type, size, blake3, sha256, *_ in found:
        if package_id is not known:
            known, package = package_id, package_id.bytes
        yield _FILE % (
            file_id,
            package,
            _length(path),
            path,
            _length(media_type),
            media_type,
            _int64(size),
            blake3,
            sha256,
            _int64(created_at),
        )


def _encoded_locations(found: Iterable[FileFields]) -> Iterator[bytes]:
    for fields in found:
        _, _, _, file_id, _, _, _, blake3, _, location_id, backend_id, key, offset, length, stored_at = fields
        yield _LOCATION % (
            location_id,
            file_id,
            _length(backend_id),
            backend_id,
            blake3.hex().encode(),
            _length(key),
            key,
            _int64(offset),
            _int64(length),
            _int64(stored_at),
        )


def _length(text: bytes) -> bytes:
    size = len(text)
    return _LENGTHS[size] if size < 2048 else _int32(size)


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
