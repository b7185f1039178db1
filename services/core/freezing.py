"""Freezing: builds the manifest of a package from the encoded items that the state keeps of each file."""

from __future__ import annotations

import json

from artifact_store.canonical import canonical_cbor, cbor_array_head
from artifact_store.manifest import MANIFEST_VERSION
from services.core.state import FINALIZED, PackageState


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
