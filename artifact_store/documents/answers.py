"""Parses the answers that pushes and pulls read into the domain's objects, without the models of `shapes.py`.

Loading pydantic and building its models takes longer than reading all answers of a command. All functions raise
CorruptError if an answer has another shape. Unknown fields are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar
from uuid import UUID

from artifact_store.documents import times
from artifact_store.errors import ArtifactStoreError, CorruptError
from artifact_store.manifest import ContentAddress
from artifact_store.models import Acknowledgement, IngestedFile, Package, Page, Parked
from artifact_store.position import Position
from artifact_store.rules import PathPair

Made = TypeVar("Made")

_DIGEST_BYTES = 32


def created(body: bytes) -> Acknowledgement:
    """A package was created."""
    return _made(body, _acknowledgement)


def ingested(body: bytes) -> Acknowledgement:
    """One file is durable."""

    def make(found: Any) -> Acknowledgement:
        done = _acknowledgement(found)
        done.files = (_file(found),)
        return done

    return _made(body, make)


def ingested_together(body: bytes) -> Acknowledgement:
    """Many files are durable."""

    def make(found: Any) -> Acknowledgement:
        done = _acknowledgement(found)
        done.files = tuple(map(_file, found["files"]))
        return done

    return _made(body, make)


def finalized(body: bytes) -> Acknowledgement:
    """A package is frozen under its manifest."""

    def make(found: Any) -> Acknowledgement:
        done = _acknowledgement(found)
        done.manifest_digest = _address(found["manifest_digest"])
        done.unportable_count = _number(found.get("unportable_count", 0))
        pairs = found.get("unportable_paths", ())
        done.unportable_paths = tuple(PathPair(_text(pair["path"]), _text(pair["other"])) for pair in pairs)
        return done

    return _made(body, make)


def known_blobs(body: bytes) -> frozenset[bytes]:
    """The digests (32 raw bytes each) of the blobs that are stored."""
    return _made(body, lambda found: frozenset(map(_address, found["known"])))


def package(body: bytes) -> Package:
    """A package as the view has it."""
    return _made(body, _package)


def packages(body: bytes) -> Page[Package]:
    """A page of packages."""

    def make(found: Any) -> Page[Package]:
        following = found["next"]
        return Page(tuple(map(_package, found["items"])), None if following is None else _text(following))

    return _made(body, make)


def _made(body: bytes, make: Callable[[Any], Made]) -> Made:
    try:
        found = json.loads(body.decode())
        if b"\\u" in body:
            json.dumps(found, ensure_ascii=False).encode()  # fails for a lone surrogate, which JSON can escape
        return make(found)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, ArtifactStoreError):
        raise CorruptError("the gateway's answer is not one to this request: is this the URL of a gateway?") from None


def _acknowledgement(found: Any) -> Acknowledgement:
    position = found.get("position")
    return Acknowledgement(
        UUID(found["package_id"]),
        _number(found["sequence"], least=1),
        _digest(found["event_digest"]),
        position=None if position is None else Position.parse(position),
    )


def _file(found: Any) -> IngestedFile:
    return IngestedFile(
        UUID(found["file_id"]),
        _text(found["relative_path"]),
        _number(found["size_bytes"]),
        _address(found["content_address"]),
        _digest(found["sha256"]),
        _number(found["sequence"], least=1),
        _digest(found["event_digest"]),
    )


def _package(found: Any) -> Package:
    manifest, finalized_at, parked = found["manifest_digest"], found["finalized_at"], found.get("parked")
    if not isinstance(found["metadata"], dict):
        raise TypeError("no object")
    return Package(
        package_id=UUID(found["package_id"]),
        name=_text(found["name"]),
        producer=_text(found["producer"]),
        subject=_text(found["subject"]),
        retention_class=_text(found["retention_class"]),
        status=_text(found["status"]),
        metadata=found["metadata"],
        manifest_digest=None if manifest is None else ContentAddress.parse(manifest),
        last_event_sequence=_number(found["last_event_sequence"], least=1),
        created_at=times.from_text(found["created_at"]),
        finalized_at=None if finalized_at is None else times.from_text(finalized_at),
        parked=None if parked is None else _parked(parked),
    )


def _parked(found: Any) -> Parked:
    partition, offset, events = (_number(found[name]) for name in ("partition", "offset", "events"))
    return Parked(partition, offset, events, _text(found["cause"]))


def _address(text: Any) -> bytes:
    kind, _, digest = text.partition(":")
    if kind != "blake3":
        raise ValueError("no content address")
    return _digest(digest)


def _digest(text: Any) -> bytes:
    digest = bytes.fromhex(text)
    if len(digest) != _DIGEST_BYTES or digest.hex() != text:
        raise ValueError("no digest of 32 bytes in lower-case hex")
    return digest


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def _number(value: Any, *, least: int = 0) -> int:
    if type(value) is not int or value < least:
        raise TypeError(f"no number from {least}")
    return value
