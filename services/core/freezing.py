"""Building manifests: the items of one file when it is ingested, the whole when the package is finalized."""

from __future__ import annotations

import json

from artifact_store.canonical import canonical_cbor, cbor_array_head, ordered_cbor
from artifact_store.events import FileIngested
from artifact_store.manifest import MANIFEST_VERSION
from schemas.identifiers import Identifier
from services.core.state import FINALIZED, PackageState


def manifest_items(file: FileIngested) -> tuple[bytes, bytes]:
    """The canonical CBOR of a file's entry in `files` and of its entry in `storage_receipts`."""
    receipt, file_id = file.receipt, str(file.file_id)
    entry = {
        "blake3": file.blake3.hex(),
        "sha256": file.sha256.hex(),
        "file_id": file_id,
        "media_type": file.media_type,
        "size_bytes": file.size_bytes,
        "relative_path": file.relative_path,
    }
    proof = {
        "key": receipt.key,
        "length": receipt.length,
        "offset": receipt.offset,
        "file_id": file_id,
        "stored_at": receipt.stored_at,
        "backend_id": receipt.backend_id,
        "location_id": str(receipt.location_id),
    }
    return ordered_cbor(entry), ordered_cbor(proof)


_BEHIND_FILE_ID = len(ordered_cbor({"blake3": "0" * 64, "sha256": "0" * 64, "file_id": "0" * 36}))
_FILE_ID = slice(_BEHIND_FILE_ID - 36, _BEHIND_FILE_ID)


def item_file_id(item: bytes) -> Identifier:
    """The id of the file whose entry in `files` this is; what stands before it is always as long."""
    return Identifier(item[_FILE_ID].decode())


def manifest_of(state: PackageState, finalized_at: int) -> bytes:
    """The manifest of the package as it stands, in canonical CBOR; `finalized_at` in µs since 1970.

    The map's keys come in canonical order: by the length of their text, then by its bytes.
    """
    created = state.created
    package = {
        "id": str(state.package_id),
        "name": created.name,
        "producer": created.producer,
        "subject": created.subject,
        "retention_class": created.retention_class,
        "metadata": json.loads(created.metadata),
        "status": FINALIZED,
        "created_at": state.created_at,
        "finalized_at": finalized_at,
    }
    # UTF-8 keeps the order of code points, and Python compares strings by code points.
    files = [state.files[path] for path in sorted(state.files)]
    head = cbor_array_head(len(files))
    pieces = [_FILES, head]
    pieces += [file.manifest_item for file in files]
    pieces += _PACKAGE, canonical_cbor(package), _VERSION_AND_RECEIPTS, head
    pieces += [file.receipt_item for file in files]
    return b"".join(pieces)


_FILES = b"\xa4" + canonical_cbor("files")
_PACKAGE = canonical_cbor("package")
_VERSION_AND_RECEIPTS = b"".join(map(canonical_cbor, ("manifest_version", MANIFEST_VERSION, "storage_receipts")))
