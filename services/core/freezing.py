"""Building manifests: the items of one file when it is ingested, the whole when the package is finalized."""

from __future__ import annotations

import json
from collections.abc import Sequence

from artifact_store.canonical import canonical_cbor, cbor_array_head, ordered_cbor
from artifact_store.events import Event, PackageFinalized
from artifact_store.manifest import MANIFEST_VERSION
from schemas.runs import FileRun, StoredFile
from services.core.state import FINALIZED, PackageState


def manifest_item(file_id: str, file: StoredFile) -> bytes:
    """The canonical CBOR of a file's entry in `files`."""
    return ordered_cbor(
        {
            "blake3": file.blake3.hex(),
            "sha256": file.sha256.hex(),
            "file_id": file_id,
            "media_type": file.media_type,
            "size_bytes": file.size_bytes,
            "relative_path": file.relative_path,
        }
    )


def receipt_item(file_id: str, location_id: str, file: StoredFile) -> bytes:
    """The canonical CBOR of a file's entry in `storage_receipts`."""
    return ordered_cbor(
        {
            "key": file.key,
            "length": file.length,
            "offset": file.offset,
            "file_id": file_id,
            "stored_at": file.stored_at,
            "backend_id": file.backend_id,
            "location_id": location_id,
        }
    )


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


def claim_check(state: PackageState, events: Sequence[Event]) -> bytes | None:
    """The manifest that must be durable under its key before these events are appended, if one of them names it so."""
    for event in events if not isinstance(events, FileRun) else ():
        if isinstance(event.payload, PackageFinalized) and event.payload.manifest is None:
            return manifest_of(state, event.created_at)
    return None


_FILES = b"\xa4" + canonical_cbor("files")
_PACKAGE = canonical_cbor("package")
_VERSION_AND_RECEIPTS = b"".join(map(canonical_cbor, ("manifest_version", MANIFEST_VERSION, "storage_receipts")))
