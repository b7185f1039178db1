"""The manifest of a finalized package, in canonical CBOR and as JSON; and content addresses, which name bytes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Self
from uuid import UUID

import cbor2
from blake3 import blake3

from artifact_store.canonical import MAX_LEVELS, jcs
from artifact_store.errors import CorruptError, InvalidRequestError

_FORM = re.compile(r"blake3:[0-9a-f]{64}")

MANIFEST_VERSION = 1

_LEVELS = 2 + MAX_LEVELS
"""A package's metadata may be MAX_LEVELS deep and lies two levels down."""


class ContentAddress(str):
    """`blake3:` and 64 lower-case hex digits. A `str`, so that it prints, compares and serialises as one."""

    __slots__ = ()

    @classmethod
    def of_digest(cls, digest: bytes) -> Self:
        """The address of bytes with this BLAKE3 digest (32 raw bytes)."""
        return cls(f"blake3:{digest.hex()}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse an address that came from outside. Raises InvalidRequestError if it has another form."""
        if not _FORM.fullmatch(text):
            raise InvalidRequestError("a content address is `blake3:` followed by 64 lower-case hex digits")
        return cls(text)

    @property
    def digest(self) -> bytes:
        """The 32 raw bytes."""
        return bytes.fromhex(self.removeprefix("blake3:"))


def content_key(blake3: bytes) -> str:
    """The key under which a blob store keeps the bytes with this BLAKE3 digest (32 raw bytes)."""
    text = blake3.hex()
    return f"blobs/blake3/{text[:2]}/{text[2:4]}/{text}"


def digest_of_key(key: str) -> bytes | None:
    """The BLAKE3 digest (32 raw bytes) that a content-addressed key names; None for every other key."""
    try:
        digest = bytes.fromhex(key.rpartition("/")[2])
    except ValueError:
        return None
    return digest if key == content_key(digest) else None


@dataclass(frozen=True, slots=True)
class ManifestPackage:
    """The package in the manifest; times are in µs since 1970, UTC."""

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
    """A decoded manifest. `files` and `storage_receipts` have the same order: by the UTF-8 bytes of the path."""

    manifest_version: int
    package: ManifestPackage
    files: tuple[ManifestFile, ...]
    storage_receipts: tuple[ManifestReceipt, ...]


def decode(data: bytes) -> Manifest:
    """Read a manifest in canonical CBOR or JSON. Raises CorruptError if it is neither."""
    try:
        raw = json.loads(data) if data[:1] == b"{" else cbor2.loads(data)
        if raw["manifest_version"] != MANIFEST_VERSION:
            raise CorruptError("the manifest has an unknown version")
        package = dict(raw["package"])
        package["id"] = UUID(package["id"])
        return Manifest(
            manifest_version=raw["manifest_version"],
            package=ManifestPackage(**package),
            files=tuple([ManifestFile(**f) for f in _with_ids(raw["files"], "file_id")]),
            storage_receipts=tuple(
                [ManifestReceipt(**r) for r in _with_ids(raw["storage_receipts"], "file_id", "location_id")]
            ),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, cbor2.CBORDecodeError) as error:
        raise CorruptError(f"the manifest cannot be read: {type(error).__name__}") from error


def _with_ids(entries: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """The entries, in which the texts under these names have become identifiers."""
    for name in names:
        for entry in entries:
            entry[name] = UUID(entry[name])
    return entries


def to_json(cbor: bytes) -> bytes:
    """The JCS projection (RFC 8785) of a manifest in canonical CBOR."""
    return jcs(cbor2.loads(cbor), levels=_LEVELS).encode()


def manifest_digest(manifest: bytes) -> bytes:
    """BLAKE3 over the manifest's canonical CBOR (32 bytes)."""
    return blake3(manifest).digest()
