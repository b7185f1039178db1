"""One request that adds bytes to an upload: parts are stored while it runs, and what is left at its end as well.

Part numbers are reserved in the upload's state before parts are put under them. So a request that was taken for dead
and wakes up can neither replace a part of its successor's nor commit its own.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol
from uuid import uuid4

from blake3 import blake3

from services.blobs.cleanup import Cleanups
from services.blobs.intake import PIECE_BYTES, BodyHash
from services.blobs.memory import PartBuffer, Share
from services.blobs.pace import Pace
from services.blobs.port import BlobStore, Digests, Part
from services.blobs.upload_states import UploadState, UploadStates, tail_key
from services.errors import ChecksumMismatchError, InvalidRequestError, TooLargeError

RENEW_SECONDS = 3.0
"""How often a request that gets bytes says so; far below the time after which it is taken for dead."""

_RESERVED = 4  # part numbers at a time: so many parts at most are sent again after a crash
_RETRY_SECONDS = 5.0


class _Hash(Protocol):
    def update(self, data: bytes, /) -> object: ...

    def digest(self) -> bytes: ...


ALGORITHMS: dict[str, Callable[[], _Hash]] = {
    "sha1": lambda: hashlib.sha1(usedforsecurity=False),  # which tus demands, against damage on the way
    "sha256": hashlib.sha256,
    "blake3": blake3,
}
"""What a body's checksum may be made with."""


@dataclass(frozen=True, slots=True)
class Checksum:
    """What the bytes of one request must hash to."""

    algorithm: str
    digest: bytes

    def __post_init__(self) -> None:
        """Raises InvalidRequestError for an algorithm that is not known, or a digest of another length."""
        if self.algorithm not in ALGORITHMS:
            raise InvalidRequestError(f"checksums are taken by {', '.join(ALGORITHMS)}")
        if len(self.digest) != len(ALGORITHMS[self.algorithm]().digest()):
            raise InvalidRequestError(f"the checksum is none of {self.algorithm}: its length differs")


class Appending:
    """One such request. Belongs to one task and runs once."""

    def __init__(
        self,
        blobs: BlobStore,
        states: UploadStates,
        state: UploadState,
        clock: Callable[[], datetime],
        cleanups: Cleanups,
        checksum: Checksum | None,
        *,
        whole: bool,
    ) -> None:
        """`state` is the newest one; all others are refused when it runs.

        With `whole` or a `checksum` a body that ends in an error adds nothing.
        """
        self._blobs = blobs
        self._parts = blobs.parts
        self._states = states
        self._state = state
        self._clock = clock
        self._cleanups = cleanups
        self._checksum = checksum
        self._whole = whole or checksum is not None
        self._hash = None if checksum is None else ALGORITHMS[checksum.algorithm]()
        self._body = BodyHash() if state.offset == 0 else None  # hashing cannot go on where another request ended
        self._holder = uuid4()
        self._renewed = 0.0
        self._number = self._reserved = state.next_number
        self._done: list[Part] = []  # there, and not in the state yet
        self._done_bytes = 0
        self._sending: asyncio.Task[str] | None = None
        self._sending_bytes = 0
        self._failed = False
        self._buffer: PartBuffer | None = None
        self._room = 0
        self._fresh = False  # whether the buffer holds bytes that came in this request
        self._buffers = 1

    @property
    def digests(self) -> Digests | None:
        """Of the whole upload, if this request has brought all of it."""
        found = None if self._body is None else self._body.digests()
        return found if found is not None and found.length == self._state.length == self._state.held else None

    async def run(self, body: AsyncIterator[bytes]) -> UploadState:
        """Take the body and return the upload's state behind it. Raises as `ResumableUploads.append`, SupersededError.

        Also when it raises, what came is stored, unless all of it was to be taken or the body was too long.
        """
        with self._parts.memory.share() as share:
            first = min(self._state.part_bytes, self._state.length - self._state.held)
            await share.take_in_turn(first, others="uploads under way", nothing="taken", retry_after=_RETRY_SECONDS)
            self._state = await self._states.replace(self._state, **self._claim())
            try:
                try:
                    async with Pace(body, lambda: self._parts.memory.contended, size=len) as pace:
                        await self._load_tail()
                        await self._take(pace, share)
                    self._verify()
                except BaseException as error:
                    keep = not self._whole and not isinstance(error, TooLargeError)
                    await self._cleanups.run(self._save(keep=keep))
                    raise
                await self._save(keep=True)
            finally:
                if self._buffer is not None:
                    self._buffer.close()
        return self._state

    async def _take(self, body: Pace[bytes], share: Share) -> None:
        async for chunk in body:
            if self._hash is not None:
                await asyncio.to_thread(self._hash.update, chunk) if len(chunk) > 65536 else self._hash.update(chunk)
            view = memoryview(chunk)
            while view:
                if self._room == 0:
                    await self._next(share)
                piece, view = view[: self._room], view[self._room :]
                self._filled().append(bytes(piece))
                self._room -= len(piece)
                self._fresh = True
            await self._renew(force=False)

    async def _next(self, share: Share) -> None:
        """Send the buffer, which is full, and make room for the next part. Raises TooLargeError: there is none."""
        left = self._state.length - self._start() - len(self._filled())
        if left == 0:
            raise TooLargeError(f"the body is longer than the {self._state.length:,} bytes of the upload")
        await self._send()
        size = min(self._state.part_bytes, left)
        if self._buffers == 1:
            memory = self._parts.memory
            if memory.free >= size and not memory.contended:
                await share.take(size)  # at once: nobody may wait for memory while holding some
                self._buffers = 2
            else:
                await self._settle()
        self._buffer, self._room, self._fresh = PartBuffer(size), size, False

    async def _send(self) -> None:
        """Put the buffer, once the one before it is there."""
        await self._settle()
        if self._number == self._reserved:
            await self._renew(force=True)
        if self._number > self._parts.max_number:
            raise TooLargeError("the upload was interrupted too often: begin a new one")
        part, self._buffer, self._fresh = self._filled(), None, False
        self._sending_bytes = len(part)
        self._sending = asyncio.create_task(self._put(self._number, part))
        self._sending.add_done_callback(lambda _: part.close())

    async def _put(self, number: int, part: PartBuffer) -> str:
        """Store a part, and hash it meanwhile; gives its `etag`."""
        if self._body is None:
            return await self._parts.put(self._state.where, number, part)
        hashing = self._body.update_beside(part.pieces(PIECE_BYTES))
        try:
            return await self._parts.put(self._state.where, number, part)
        finally:
            await hashing

    async def _settle(self) -> None:
        """Wait until the part that is on its way is there. Raises UnavailableError."""
        if self._sending is None:
            return
        await asyncio.wait({self._sending})  # which a cancellation leaves running
        sent, self._sending = self._sending, None
        number, self._number = self._number, self._number + 1
        self._failed = True
        etag = sent.result()
        self._failed = False
        self._done.append(Part(number, etag))
        self._done_bytes += self._sending_bytes

    async def _renew(self, *, force: bool) -> None:
        """Say that bytes come, commit the parts that are there, and reserve more numbers."""
        if force or asyncio.get_running_loop().time() - self._renewed >= RENEW_SECONDS:
            moved = self._moved() if self._done and not self._whole else {}
            self._state = await self._states.replace(self._state, **moved, **self._claim())
            if moved:
                self._done, self._done_bytes = [], 0

    async def _save(self, *, keep: bool) -> None:
        """Store what has come, and let go of the upload. Without `keep` it stands where it was committed last."""
        moved: dict[str, Any] = {}
        try:
            await self._settle()
            if keep and not self._failed and self._fresh:
                moved = await self._save_buffer()
        finally:
            if keep and self._done and not moved:
                moved = self._moved()
            self._state = await self._states.replace(
                self._state, **moved, holder=None, next_number=self._unused(), active_at=self._clock()
            )

    async def _save_buffer(self) -> dict[str, Any]:
        """The last bytes: as a part if the upload is complete with it, as a tail if not."""
        buffer = self._filled()
        if self._start() + len(buffer) == self._state.length:
            await self._send()
            await self._settle()
            return self._moved()
        key = tail_key(self._state.upload_id)
        await self._blobs.put_object(key, buffer.read(0, len(buffer)))
        return {**self._moved(), "tail": key, "tail_bytes": len(buffer)}

    async def _load_tail(self) -> None:
        state = self._state
        self._room = min(state.part_bytes, state.length - state.held)
        self._buffer = PartBuffer(self._room)
        if state.tail is not None:
            async for chunk in self._blobs.read(state.tail, 0, state.tail_bytes):
                self._buffer.append(chunk)
                self._room -= len(chunk)

    def _verify(self) -> None:
        if self._checksum is not None and self._hash is not None and self._hash.digest() != self._checksum.digest:
            raise ChecksumMismatchError(
                f"the bytes are not those of the {self._checksum.algorithm} checksum: send them again"
            )

    def _claim(self) -> dict[str, Any]:
        self._renewed = asyncio.get_running_loop().time()
        self._reserved = self._number + _RESERVED
        return {"holder": self._holder, "next_number": self._reserved, "active_at": self._clock()}

    def _unused(self) -> int:
        """The first number under which no part was put, nor still may be."""
        return self._number + (self._sending is not None)

    def _moved(self) -> dict[str, Any]:
        """The state's fields with the parts that are there."""
        return {
            "parts": (*self._state.parts, *self._done),
            "held": self._state.held + self._done_bytes,
            "tail": None,
            "tail_bytes": 0,
        }

    def _start(self) -> int:
        """Where the buffer's bytes lie in the upload."""
        return self._state.held + self._done_bytes + (self._sending_bytes if self._sending is not None else 0)

    def _filled(self) -> PartBuffer:
        if self._buffer is None:
            raise RuntimeError("no part is being filled")
        return self._buffer
