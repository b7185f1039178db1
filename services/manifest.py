"""The manifest: the document that a finalized package is frozen under, in canonical CBOR and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import cbor2

from schemas.canonical import MAX_LEVELS, jcs
from services.errors import CorruptError

MANIFEST_VERSION = 1

_LEVELS = 2 + MAX_LEVELS
"""A package's metadata, as deep as it may be, lies two levels down."""


@dataclass(frozen=True, slots=True)
class ManifestPackage:
    """The package as the manifest names it; times in µs since 1970, UTC."""

    id: UUID
    name: str
    producer: str
    subject: str
    retention_class: str
    metadata: dict[str, Any]
    status: str
    created_at: int
    finalized_at: int


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file; digests in 64 hex digits each."""

    file_id: UUID
    relative_path: str
    media_type: str
    size_bytes: int
    blake3: str
    sha256: str


@dataclass(frozen=True, slots=True)
class ManifestReceipt:
    """Where one file's bytes lay when the package was finalized; `stored_at` in µs since 1970."""

    file_id: UUID
    location_id: UUID
    backend_id: str
    key: str
    offset: int
    length: int
    stored_at: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A decoded manifest. `files` and `storage_receipts` stand in the same order: by UTF-8 bytes of the path."""

    manifest_version: int
    package: ManifestPackage
    files: tuple[ManifestFile, ...]
    storage_receipts: tuple[ManifestReceipt, ...]


def decode(data: bytes) -> Manifest:
    """Read a manifest from either form, canonical CBOR or JSON. Raises CorruptError when it is neither."""
    try:
        raw = json.loads(data) if data[:1] == b"{" else cbor2.loads(data)
        if raw["manifest_version"] != MANIFEST_VERSION:
            raise CorruptError("the manifest is of a version that is not known")
        package = dict(raw["package"])
        package["id"] = UUID(package["id"])
        return Manifest(
            manifest_version=raw["manifest_version"],
            package=ManifestPackage(**package),
            files=tuple(ManifestFile(**{**f, "file_id": UUID(f["file_id"])}) for f in raw["files"]),
            storage_receipts=tuple(
                ManifestReceipt(**{**r, "file_id": UUID(r["file_id"]), "location_id": UUID(r["location_id"])})
                for r in raw["storage_receipts"]
            ),
        )
    except (ValueError, KeyError, TypeError, AttributeError, cbor2.CBORDecodeError) as error:
        raise CorruptError(f"the manifest cannot be read: {type(error).__name__}") from error


def to_json(cbor: bytes) -> bytes:
    """The JCS projection (RFC 8785) of a manifest in canonical CBOR."""
    return jcs(cbor2.loads(cbor), levels=_LEVELS).encode()
