"""The manifest of a package's events, built piece by piece in canonical CBOR (RFC 8949 §4.2) and compared on the way.

Apart from `services.core.manifest`, which built the one that was recorded; a test holds both to the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain

from blake3 import blake3

from artifact_store.canonical import canonical_cbor, cbor_array_head
from artifact_store.events import Event, PackageCreated
from services.verify.notes import Head, Notes

_MAP_OF_FOUR = b"\xa4"


class ManifestCheck:
    """Digest (32 raw bytes) and length of the manifest that the noted events make, and whether `recorded` is the same.

    Memory is bounded: nothing of the manifest is kept.
    """

    def __init__(self, notes: Notes, event: Event, head: Head, recorded: bytes | None) -> None:
        hasher = blake3()
        length = 0
        same = recorded is not None
        for piece in _pieces(notes, event, head):
            if recorded is not None and same:
                same = recorded[length : length + len(piece)] == piece
            hasher.update(piece)
            length += len(piece)
        self.digest = hasher.digest()
        self.length = length
        self.same = same and recorded is not None and len(recorded) == length


def _pieces(notes: Notes, event: Event, head: Head) -> Iterator[bytes]:
    package = event.package_id
    created = notes.creation(package) or PackageCreated("", "", "", "", None, "{}")
    try:
        metadata = json.loads(created.metadata)
    except ValueError:
        metadata = None
    about = {
        "id": str(package),
        "name": created.name,
        "producer": created.producer,
        "subject": created.subject,
        "retention_class": created.retention_class,
        "metadata": metadata,
        "status": "finalized",
        "created_at": head.created_at,
        "finalized_at": event.created_at,
    }
    values: dict[str, Iterator[bytes]] = {
        "manifest_version": iter([canonical_cbor(1)]),
        "package": iter([canonical_cbor(about)]),
        "files": chain([cbor_array_head(head.files)], notes.entries(package)),
        "storage_receipts": chain([cbor_array_head(head.files)], notes.receipts(package)),
    }
    yield _MAP_OF_FOUR
    for name in sorted(values, key=canonical_cbor):
        yield canonical_cbor(name)
        yield from values[name]
