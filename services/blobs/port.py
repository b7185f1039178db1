"""The port to blob storage: immutable objects, written once, read by key, offset and length.

Two adapters fulfil it (`s3`, `local`) and pass one contract suite (`tests/contract/test_blobs.py`). Keys are POSIX-like:
`blobs/blake3/ab/cd/<64 hex digits>` for content-addressed blobs, `uploads/<uuid>` for large bodies that came without a
declared digest.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Declared:
    """What a producer says the bytes are, before they arrive. None means: not said. Digests are raw 32 bytes."""

    size_bytes: int | None = None
    blake3: bytes | None = None
    sha256: bytes | None = None


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """Proof that bytes are durable: where they lie and both digests (raw, 32 bytes), computed while they streamed."""

    backend_id: str
    key: str
    offset: int
    length: int
    blake3: bytes
    sha256: bytes


def content_key(blake3: bytes) -> str:
    """The content-addressed key of a blob with this BLAKE3 digest (32 raw bytes)."""
    text = blake3.hex()
    return f"blobs/blake3/{text[:2]}/{text[2:4]}/{text}"


class BlobStore(Protocol):
    """A store of immutable blobs. Every method may be called from many tasks of one event loop at a time."""

    @property
    def backend_id(self) -> str:
        """Name of the storage backend that goes into storage receipts: `s3` or `local`."""

    async def store(self, body: AsyncIterable[bytes], *, declared: Declared, max_bytes: int) -> StoredBlob:
        """Stream `body` into the store, hashing on the way; return once the blob is durable.

        Holds at most a few parts in memory, whatever the length. The same bytes are stored once at content-addressed
        keys. Nothing is left behind when it raises, whatever the reason, cancellation included.

        Raises:
            ContentMismatchError: length or a digest differs from what was declared.
            TooLargeError: the body exceeds `max_bytes`.
            UnavailableError: the store cannot be reached or is full.
            Whatever iterating over `body` raises.
        """

    def read(self, key: str, offset: int, length: int) -> AsyncIterator[bytes]:
        """Stream `length` bytes from `offset` of a blob, in chunks of at most 1 MiB.

        Raises (on iteration): CorruptError: the blob is missing or shorter than `offset + length`.
            UnavailableError: the store cannot be reached.
        """

    async def size(self, key: str) -> int | None:
        """Length of the blob in bytes, None if there is none. Raises UnavailableError."""

    async def migrate(self) -> None:
        """Create the bucket or folder if it is missing. Safe to repeat. Raises UnavailableError, ConfigurationError."""

    async def check(self) -> None:
        """Return if the store can take writes now. Raises UnavailableError with the reason."""

    async def close(self) -> None:
        """Release connections. Blocks until done; the store cannot be used afterwards."""
