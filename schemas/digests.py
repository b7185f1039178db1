"""Digests of payloads, of events in their package's chain, and of records."""

from __future__ import annotations

from collections.abc import Iterable

from blake3 import blake3

from artifact_store.canonical import ordered_cbor
from artifact_store.events import (
    AdministrativePayload,
    Event,
    FileIngested,
    PackageCreated,
    PackageFinalized,
    payload_map,
)
from artifact_store.manifest import manifest_digest

DIGEST_BYTES = 32


def payload_digest(payload: PackageCreated | FileIngested | AdministrativePayload) -> bytes:
    """BLAKE3 over the payload in canonical CBOR (32 bytes).

    The CBOR is a map of the payload's fields by name: identifiers and metadata as text, digests as byte strings,
    timestamps as integer µs, absent optionals as null. The payload of `v1.package.finalized` is the manifest: digest
    its bytes instead.
    """
    return blake3(ordered_cbor(payload_map(payload))).digest()


def event_digest(event: Event) -> bytes:
    """The digest that the package's next event carries as `previous_digest` (32 bytes)."""
    return chain_digest(
        event.event_type,
        str(event.package_id),
        event.sequence,
        event.created_at,
        event.actor,
        str(event.command_id),
        event.payload_digest,
        event.previous_digest,
        event.principal,
    )


def chain_digest(
    event_type: str,
    package_id: str,
    sequence: int,
    created_at: int,
    actor: str,
    command_id: str,
    payload_digest: bytes,
    previous_digest: bytes,
    principal: str | None = None,
) -> bytes:
    """BLAKE3 over the canonical CBOR array of these values, in this order; a principal follows the actor (32 bytes)."""
    who = [actor] if principal is None else [actor, principal]
    link = [event_type, package_id, sequence, created_at, *who, command_id, payload_digest, previous_digest]
    return blake3(ordered_cbor(link)).digest()


def items_digest(items: Iterable[bytes]) -> bytes:
    """BLAKE3 over files' items in a manifest, which have everything that a producer said of the files (32 bytes)."""
    return blake3(b"".join(items)).digest()


def record_digest(key: bytes, value: bytes) -> bytes:
    """The digest that identifies a record, even if it is not an event: BLAKE3 over the canonical CBOR array of both.

    32 bytes. An absent key or value counts as an empty one.
    """
    return blake3(ordered_cbor([key, value])).digest()


def payload_digest_holds(event: Event) -> bool | None:
    """Whether `payload_digest` is that of the payload; None if the event has only a claim check for its manifest."""
    if isinstance(event.payload, PackageFinalized):
        if event.payload.manifest is None:
            return None
        return manifest_digest(event.payload.manifest) == event.payload_digest
    return payload_digest(event.payload) == event.payload_digest
