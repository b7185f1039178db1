"""The port to blob storage: immutable objects, written once, read by key, offset and length.

Two adapters implement it (`s3`, `local`) and pass one contract suite, `tests/contract/test_blobs.py`. Keys are
POSIX-like: those of `content_key` for content-addressed blobs, `uploads/<uuid>` for large bodies without a declared
digest, and the same below `damaged/` for blobs that `set_aside` has moved, which no event names. The store also has
small named objects of the product itself, below `snapshots/` and `resumable/`. No event names these, and they may be
deleted.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from artifact_store.errors import CorruptError
from artifact_store.models import Declared
from services.blobs.memory import ByteBudget, PartBuffer
from services.runtime.clock import StoreClock

__all__ = [
    "DAMAGED",
    "IDLE_SECONDS",
    "RESUMABLE",
    "UPLOADS",
    "BlobStore",
    "Part",
    "PartStore",
    "PartsKey",
    "StoredBlob",
    "checked_key",
    "checked_object_key",
    "checked_removable_key",
]

UPLOADS = "uploads/"
"""The prefix of large bodies whose digest was not declared."""

RESUMABLE = "resumable/"
"""The prefix of the states and the last bytes of uploads over several requests."""

DAMAGED = "damaged/"
"""The prefix of blobs that `set_aside` has moved away from their keys."""

IDLE_SECONDS = 86_400.0
"""How long an upload may make no progress before `sweep` considers it abandoned: a day."""

_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Digests:
    """Length in bytes and both raw digests of a body that was read to its end."""

    length: int
    blake3: bytes
    sha256: bytes


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """Proof that bytes are durable: their location, and both digests (raw, 32 bytes), computed while they streamed."""

    backend_id: str
    key: str
    offset: int
    length: int
    blake3: bytes
    sha256: bytes


def checked_key(key: str) -> str:
    """The key itself, if every segment is plain ASCII and none is hidden, empty, `.` or `..`.

    Keys come from events, which are trusted; the check keeps even a forged key within the store.

    Raises:
        CorruptError: the key breaks the rule.
    """
    if len(key) > 512 or not all(_SEGMENT.fullmatch(segment) for segment in key.split("/")):
        raise CorruptError(f"{key[:80]!r} is not the key of a blob")
    return key


def checked_object_key(key: str) -> str:
    """The key itself, if it is that of a named object or a prefix of such keys, so that no blob is replaced or deleted.

    Raises:
        ValueError: it begins with neither `snapshots/` nor `resumable/`. CorruptError: as `checked_key`.
    """
    if not key.startswith(("snapshots/", RESUMABLE)):
        raise ValueError(f"{key[:80]!r} is no key of a named object")
    checked_key(key.removesuffix("/"))
    return key


def checked_removable_key(key: str) -> str:
    """The key itself, if it is that of a named object or of a body below `uploads/`, which nobody shares.

    Raises: as `checked_object_key`.
    """
    return checked_key(key) if key.startswith(UPLOADS) else checked_object_key(key)


@dataclass(frozen=True, slots=True)
class PartsKey:
    """Identifies parts that belong together: the upload's id, and the token that `PartStore.begin` returned."""

    upload_id: UUID
    token: str


@dataclass(frozen=True, slots=True)
class Part:
    """One part of an upload: its number, and the tag that distinguishes its bytes from others with the same number."""

    number: int
    etag: str


@dataclass(frozen=True, slots=True)
class DirectPart:
    """A part that a client sends straight to the store: its number, its length in bytes, and its CRC-32."""

    number: int
    length: int
    crc32: int


@dataclass(frozen=True, slots=True)
class PartAddress:
    """A signed PUT: its URL, and the headers that it must have. Anyone who has it may send that one part."""

    url: str
    headers: Mapping[str, str]

    def __repr__(self) -> str:
        return f"PartAddress({self.url.partition('?')[0]})"


class PartStore(Protocol):
    """Parts of uploads over several requests and processes, until they become one blob. Belongs to one event loop.

    A part is put under a number that nobody else uses; numbers may have gaps. All parts except the last have the size
    that `part_bytes` gives for the length of the whole.
    """

    @property
    def memory(self) -> ByteBudget:
        """The memory that all uploads of this store share."""

    @property
    def longest(self) -> int:
        """The most bytes that one upload may have."""

    @property
    def max_number(self) -> int:
        """The greatest number that a part may have; the smallest is 1."""

    def part_bytes(self, length: int) -> int:
        """The size of the parts of an upload of `length` bytes. Raises TooLargeError."""

    async def begin(self, upload_id: UUID, length: int) -> str:
        """Prepare for parts; returns the token of their `PartsKey`. Raises UnavailableError.

        Each call returns another token, and so begins separate parts and a separate blob, even for the same upload.
        """

    async def put(self, where: PartsKey, number: int, part: PartBuffer) -> str:
        """Store a part durably; returns its `etag`. Raises UploadNotFoundError, as `assemble`; UnavailableError."""

    async def takes_direct(self, where: PartsKey) -> bool:
        """Whether clients can send parts of this upload straight to the store, by `addresses`. Raises nothing."""

    def addresses(self, where: PartsKey, parts: Sequence[DirectPart]) -> list[PartAddress]:
        """Signed requests for these parts, once `takes_direct` is true. They expire after ADDRESS_SECONDS.

        The store accepts other bytes only if they have the same length and CRC-32. So the assembled blob has to be read
        back before an event names it, which `assemble` does.
        """

    def sent(self, part: DirectPart, etag: str) -> Part:
        """The part as `assemble` takes it, with the ETag that the store gave the client."""

    async def assemble(
        self, where: PartsKey, parts: Sequence[Part], *, declared: Declared, digests: Digests | None = None
    ) -> StoredBlob:
        """Join the parts into one blob, in this order, and compute both digests of the bytes read back from it.

        `digests` are those of all bytes that were put, if the caller has them: the blob is then not read back unless it
        must be read anyway. Otherwise, it takes as long as reading the whole. May be called again, also by another
        process, until `discard`.

        Raises:
            ContentMismatchError: the length, which must be declared, or a declared digest differs.
            UploadNotFoundError: parts are missing or were replaced, permanently.
            CorruptError: the joined blob cannot be read. UnavailableError.
        """

    def blob_key(self, where: PartsKey) -> str | None:
        """The upload's own key, at which `assemble` stores the blob; None if the blob is content-addressed."""

    async def discard(self, where: PartsKey, *, blob: bool) -> None:
        """Remove all parts and, if `blob` is set, the assembled blob unless others may share it.

        Raises UnavailableError.
        """


ADDRESS_SECONDS = 900
"""How long a `PartAddress` can be used, by the store's clock."""

PROVEN_SECONDS = 30.0
"""How long a successful write counts as proof that the store takes writes."""


class BlobStore(Protocol):
    """A store of immutable blobs. Every method may be called from many tasks of one event loop at a time."""

    @property
    def backend_id(self) -> str:
        """Name of the storage backend that goes into storage receipts: `s3` or `local`."""

    @property
    def parts(self) -> PartStore:
        """The store for parts of uploads that span requests."""

    async def store(self, body: AsyncIterable[bytes], *, declared: Declared, max_bytes: int) -> StoredBlob:
        """Stream `body` into the store, hashing on the way; return once the blob is durable.

        Holds at most a few parts in memory, whatever the length. The same bytes are stored once at content-addressed
        keys. If it raises for any reason, including cancellation, nothing is left behind, with one exception: if the
        last step was in progress, a complete blob may be left at its content-addressed key, where a retry finds it.
        `sweep` finds the remains of a killed process.

        Raises:
            ContentMismatchError: length or a digest differs from what was declared.
            TooLargeError: the body exceeds `max_bytes`.
            UnavailableError: the store cannot be reached or is full.
            PushBackError: other uploads hold all the memory, and none of the body was read, unless it is small; or this
                body was slow while others waited for the memory that it held.
            Whatever iterating over `body` raises.
        """

    async def store_bytes(self, data: bytes, digests: Digests) -> StoredBlob:
        """Store bytes from memory at their content address. Returns when they are durable.

        `digests` are their digests, which the caller has computed. Takes no memory from the budget. On failure it
        leaves behind what `store` would. Raises UnavailableError.
        """

    def read(self, key: str, offset: int, length: int) -> AsyncIterator[bytes]:
        """Stream `length` bytes from `offset` of a blob, in chunks of at most 1 MiB.

        Raises (on iteration): CorruptError: the blob is missing or shorter than `offset + length`.
            UnavailableError: the store cannot be reached, or was lost repeatedly in the middle.
        """

    async def size(self, key: str) -> int | None:
        """The blob's length in bytes; None if there is none. Raises UnavailableError, CorruptError (`checked_key`)."""

    async def secure(self, key: str) -> None:
        """Make a readable blob durable, so that it survives any crash. Raises UnavailableError.

        `store` has done so when it returns; this is for blobs of another process, which may have died before that step.
        """

    async def set_aside(self, key: str) -> str | None:
        """Move a damaged blob away from its key, and return its new key, below `damaged/`; None if it is gone.

        The next upload of the same bytes then stores them again. The caller must check the moved bytes: an upload may
        have replaced the damaged blob by an intact one meanwhile, which must then be stored again. Raises
        UnavailableError.
        """

    def mistrust(self, key: str) -> None:
        """Note that the blob at this key is damaged: this process stores the next upload of its bytes again.

        Until then, intact ranges of the damaged blob can still be read.
        """

    async def fresh_uploads(self) -> frozenset[str]:
        """The keys below `uploads/` at which `store` is putting a body, or has put one less than a day ago.

        An event may yet name them, whatever their age in the store. Raises UnavailableError.
        """

    async def remove_uploads(self, *, before: datetime, orphaned: Callable[[str], bool]) -> int:
        """Remove the blobs below `uploads/` that were stored before that time (aware) and that are `orphaned`.

        A store may date a blob to the start of its upload, as Amazon S3 does, which may be long before its completion.
        `orphaned` is called for each key, and must only be true if no event names the key nor ever will. Returns how
        many were removed. Raises UnavailableError.
        """

    async def put_object(self, key: str, data: bytes) -> None:
        """Write a named object of at most a few MiB, replacing an existing one. Returns when it is durable.

        A reader sees the old bytes or the new ones, never a mixture. Raises UnavailableError, and as
        `checked_object_key`, which holds for the other four as well.
        """

    async def create_object(self, key: str, data: bytes) -> bool:
        """Write a named object if its key does not exist. Returns whether the object has these bytes now, durably.

        Of simultaneous calls, in any processes, one wins. Equal bytes count as the caller's, so make them differ.
        Raises UnavailableError.
        """

    async def get_object(self, key: str) -> bytes | None:
        """The bytes of a named object; None if there is none. Raises UnavailableError."""

    async def list_objects(self, prefix: str) -> list[str]:
        """Keys of all named objects below `prefix`, which ends in a slash; sorted. Raises UnavailableError."""

    async def delete_object(self, key: str) -> None:
        """Remove a named object, if it exists, or a blob below `uploads/` that no command has named.

        Not even a refused command may have named it, because the refusal may be outdated. The key of a
        content-addressed blob is refused, because others may share it. Raises UnavailableError.
        """

    async def migrate(self) -> None:
        """Create the bucket or folder if it is missing. Safe to repeat. Raises UnavailableError, ConfigurationError."""

    async def check(self) -> None:
        """Return if the store can take writes now. Raises UnavailableError with the reason.

        It writes something small, unless a write has succeeded within PROVEN_SECONDS and none has failed since.
        """

    @property
    def clock(self) -> StoreClock:
        """The store's clock, known from its last answers; the system's if the store has no separate one."""

    async def now(self) -> datetime:
        """Ask for the time (aware) by which the store dates its objects. Raises UnavailableError."""

    async def sweep(self, *, now: datetime, idle_seconds: float = IDLE_SECONDS) -> int:
        """Abort the uploads without progress for `idle_seconds` before `now`, and return their number.

        `now` is the time by the store's clock: a system clock that is ahead would abort uploads in progress.

        Only removes unfinished uploads, never a blob. Safe beside running uploads and other sweeps. Raises
        UnavailableError.
        """

    async def close(self) -> None:
        """Release connections and threads after running clean-ups. The store cannot be used afterwards."""
