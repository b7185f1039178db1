"""Read manifests: `decode` gives a `Manifest` of either form. They are `artifact_store`'s, offered here as well."""

from __future__ import annotations

from artifact_store.manifest import (
    MANIFEST_VERSION,
    Manifest,
    ManifestFile,
    ManifestPackage,
    ManifestReceipt,
    decode,
    to_json,
)

__all__ = [
    "MANIFEST_VERSION",
    "Manifest",
    "ManifestFile",
    "ManifestPackage",
    "ManifestReceipt",
    "decode",
    "to_json",
]
