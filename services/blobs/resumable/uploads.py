"""Uploads over several requests: begun, added to, and finally recorded by the same command as a single request.

Only the bytes that are just arriving are solely in this process, so any process on the same store can continue an
upload. A request that adds bytes marks the upload's state as held, and renews the mark while bytes arrive. After
HOLD_SECONDS without renewal, as after a crash, the next request takes over, and the first one can no longer commit
anything.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Protocol
from uuid import UUID, uuid4, uuid5
from weakref import WeakValueDictionary

from blake3 import blake3

from artifact_store.errors import (
    ChecksumMismatchError,
    CommandReusedError,
    ContentMismatchError,
    CorruptError,
    InvalidRequestError,
    RejectedError,
    TooLargeError,
    UploadBusyError,
    UploadNotFoundError,
    UploadOffsetError,
)
from artifact_store.models import Acknowledgement, Declared
from artifact_store.rules import check_path, check_text
from services.blobs.intake import BodyHash, Cleanups, Pace
from services.blobs.memory import PartBuffer, Share
from services.blobs.packs import Placed
from services.blobs.port import IDLE_SECONDS, BlobStore, Digests, DirectPart, Part, PartAddress
from services.blobs.resumable.states import (
    UNTAGGED,
    WITH_PRINCIPAL,
    SupersededError,
    UploadState,
    UploadStates,
    tail_key,
)
from services.core.wire import OLDEST, decode_acknowledgement, encode_acknowledgement

HOLD_SECONDS = 10.0
"""For this long after its last renewal, no other request can take the upload from the one that adds to it."""

_SAVE_SECONDS = 30.0  # for storing the received bytes of an interrupted request
_log = logging.getLogger(__name__)

CheckIngest = Callable[[UUID, str, UUID | None, str | None], Awaitable[None]]
"""Package, path, command id, principal."""
MayWrite = Callable[[UUID], Awaitable[bool]]
Record = Callable[[UUID, Placed, str, UUID, str | None], Awaitable[Acknowledgement]]
"""Package, file, actor, command id, principal."""


@dataclass(frozen=True, slots=True)
class NewUpload:
    """The declaration of a new upload; `metadata` is kept unchanged."""

    package_id: UUID
    relative_path: str
    media_type: str
    actor: str
    length: int
    declared: Declared
    command_id: UUID | None = None
    metadata: str | None = None
    principal: str | None = None
    """The sender, if they begin it in the actor's name; None if the actor begins it."""
    drawn: UUID = field(default_factory=uuid4)
    """Its id, unless it is derived from a command id."""

    @property
    def upload_id(self) -> UUID:
        """The upload's id, which is the same in each attempt of the command."""
        return self.drawn if self.command_id is None else uuid5(self.package_id, f"upload:{self.command_id}")


class ResumableUploads:
    """The uploads of one blob store. Belongs to one event loop."""

    def __init__(
        self,
        blobs: BlobStore,
        *,
        check: CheckIngest,
        record: Record,
        max_file_bytes: int,
        key: bytes | None = None,
        clock: Callable[[], datetime] | None = None,
        hold_seconds: float = HOLD_SECONDS,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        """`check` asks the writer as before a single request's body, `record` submits the command.

        `key` is that of `UploadStates`. Gateways share uploads, so all go by the store's clock; tests give another
        `clock`.
        """
        self._parts = blobs.parts
        self._states = UploadStates(blobs, key)
        self._blobs = blobs
        self._check = check
        self._record = record
        self._sender: str | None = None
        """The sender whose uploads are visible; None: everybody's."""
        self._may_write: MayWrite | None = None
        self._clock = clock or blobs.clock.now
        self._hold = timedelta(seconds=hold_seconds)
        self._idle = timedelta(seconds=idle_seconds)
        self._cleanups = Cleanups(_SAVE_SECONDS)
        self._finishing: WeakValueDictionary[UUID, asyncio.Lock] = WeakValueDictionary()
        self.longest = min(max_file_bytes, self._parts.longest)
        """The most bytes that an upload may have."""

    def for_caller(self, sender: str, check: CheckIngest, record: Record, may_write: MayWrite) -> ResumableUploads:
        """The uploads as one caller sees them: only their own, and only while they may write to the package."""
        found = copy.copy(self)
        found._sender, found._check, found._record, found._may_write = sender, check, record, may_write
        return found

    async def create(self, new: NewUpload) -> UploadState:
        """Begin an upload. With a command id, a repeat finds the upload that the first one began, at its current
        offset.

        Raises:
            InvalidRequestError, InvalidPathError, TooLargeError, and the writer's errors about package and path.
            CommandReusedError: another upload to this package has the command id.
        """
        check_path(new.relative_path)
        check_text("actor", new.actor)
        check_text("media_type", new.media_type)
        if new.length > self.longest:
            raise TooLargeError(f"an upload may have {self.longest:,} bytes here")
        await self._check(new.package_id, new.relative_path, new.command_id, new.principal)
        found = None if new.command_id is None else await self._alive(new.upload_id)
        if found is None:
            found = await self._begin(new.upload_id, new)
        if not _same(found, new):
            raise CommandReusedError("the command id was used for another upload")
        return await self.finished(found)

    async def find(self, package_id: UUID, upload_id: UUID) -> UploadState:
        """The upload's present state; an upload with all its bytes is finished first.

        Raises UploadNotFoundError; otherwise as `finish`.
        """
        return await self.finished(await self._known(package_id, upload_id))

    async def append(
        self,
        package_id: UUID,
        upload_id: UUID,
        offset: int,
        body: AsyncIterator[bytes],
        *,
        size: int | None = None,
        checksum: Checksum | None = None,
        whole: bool = False,
    ) -> UploadState:
        """Append the body's bytes after the first `offset` bytes; the received part of a body that broke off is kept.

        With `whole` or a `checksum`, either the whole body is accepted or nothing. The last byte finishes the upload.
        `size` is the length of the body, if it is known.

        Raises:
            UploadNotFoundError, UploadOffsetError.
            UploadBusyError: another request adds to the upload, or did so a moment ago.
            ChecksumMismatchError. TooLargeError: the body is longer than the missing part.
            PushBackError, UnavailableError; whatever iterating over `body` raises; the errors of a refused command.
        """
        state = await self._standing_at(package_id, upload_id, offset)
        if size is not None and size > state.length - offset:
            raise TooLargeError(f"{state.length - offset:,} bytes of the upload are missing, {size:,} were sent")
        if not state.complete:
            self._require_free(state)
            await self._check(package_id, state.relative_path, state.command_id, state.principal)
            if size == 0:
                return state
            appending = Appending(self._blobs, self._states, state, self._clock, self._cleanups, checksum, whole=whole)
            try:
                state = await appending.run(body)
            except SupersededError as error:
                raise UploadBusyError(error.detail) from None
            except UploadNotFoundError:
                with suppress(SupersededError):
                    await self._lost(await self._known(package_id, upload_id, state.token))
                raise
            return await self.finished(state, appending.digests)
        return await self.finished(state)

    async def direct_part_bytes(self, state: UploadState) -> int | None:
        """The size of parts that a client may send straight to the store by `send_direct`; None if it may not."""
        may = not state.complete and state.tail is None and await self._parts.takes_direct(state.where)
        return state.part_bytes if may else None

    async def send_direct(
        self,
        package_id: UUID,
        upload_id: UUID,
        offset: int,
        sent: Sequence[tuple[DirectPart, str]],
        wanted: Sequence[tuple[int, int]],
    ) -> tuple[UploadState, list[tuple[DirectPart, PartAddress]]]:
        """Add parts that the client has `sent` to the store, with their ETags, and give addresses of further ones.

        Parts are consecutive from `offset` on; the `wanted` ones, each a length and a CRC-32, follow those that were
        sent. No addresses are returned if direct access is unavailable now, or no bytes are missing: then the upload
        continues with `append`. The last part finishes the upload. The client's claims about the bytes are not trusted:
        all of them are read back and hashed.

        Raises:
            UploadNotFoundError, UploadOffsetError, UploadBusyError: as `append`.
            InvalidRequestError: a part has a wrong length for its offset, or a number that was not given out.
            TooLargeError: all numbers of parts are used up. UnavailableError; the errors of a refused command.
        """
        state = await self._standing_at(package_id, upload_id, offset)
        if state.complete:
            return await self.finished(state), []
        self._require_free(state)
        await self._check(package_id, state.relative_path, state.command_id, state.principal)
        if await self.direct_part_bytes(state) is None:
            return state, []
        held, last = state.held, max((part.number for part in state.parts), default=0)
        for part, _ in sent:
            held = _behind(state, held, part.length)
            if not last < part.number < state.next_number:
                raise InvalidRequestError(f"part {part.number} was not given out, or not in this order")
            last = part.number
        end, numbered = held, []
        for number, (length, crc32) in enumerate(wanted, state.next_number):
            end = _behind(state, end, length)
            numbered.append(DirectPart(number, length, crc32))
        if state.next_number + len(wanted) > self._parts.max_number + 1:
            raise TooLargeError("the upload was interrupted too often: begin a new one")
        parts = (*state.parts, *(self._parts.sent(part, etag) for part, etag in sent))
        try:
            # Reserve the numbers before an address is handed out, so that a later request uses others.
            state = await self._states.replace(
                state,
                parts=parts,
                held=held,
                next_number=state.next_number + len(wanted),
                holder=None,
                active_at=self._clock(),
            )
        except SupersededError as error:
            raise UploadBusyError(error.detail) from None
        if state.complete:
            return await self.finished(state), []
        return state, list(zip(numbered, self._parts.addresses(state.where, numbered), strict=True))

    async def remove(self, package_id: UUID, upload_id: UUID) -> None:
        """Remove an upload and its bytes; the file of a finished upload stays.

        Raises UploadNotFoundError, UploadBusyError.
        """
        state = await self._known(package_id, upload_id)
        self._require_free(state)
        try:
            await self._states.remove(state)
        except SupersededError as error:
            raise UploadBusyError(error.detail) from None

    async def finished(self, state: UploadState, digests: Digests | None = None) -> UploadState:
        """The upload, with its file recorded if all bytes are there, which have these `digests` if they are known.

        What is refused is removed at once. Raises what the command is refused for, ContentMismatchError when the bytes
        are not what was declared, UploadNotFoundError, UnavailableError; it may be called again then.
        """
        if not state.complete or state.answer is not None:
            return state
        token = state.token
        lock = self._finishing.setdefault(state.upload_id, asyncio.Lock())
        async with lock:
            while True:
                try:
                    state = await self._known(state.package_id, state.upload_id, token)
                    return state if state.answer is not None else await self._finish(state, digests)
                except SupersededError:  # another process does the same
                    continue

    async def is_open(self, upload_id: UUID) -> bool:
        """Whether such an unfinished upload exists, of any caller.

        Raises UnavailableError, CorruptError.
        """
        state = await self._alive(upload_id)
        return state is not None and state.answer is None

    def expires_at(self, state: UploadState) -> datetime:
        """When the upload is removed if it stays idle (aware)."""
        return state.active_at + self._idle

    async def close(self) -> None:
        """Wait until the received bytes of interrupted requests are stored."""
        await self._cleanups.drain()

    async def _begin(self, upload_id: UUID, new: NewUpload) -> UploadState:
        token = await self._parts.begin(upload_id, new.length)
        now = self._clock()
        state = UploadState(
            upload_id=upload_id,
            package_id=new.package_id,
            relative_path=new.relative_path,
            media_type=new.media_type,
            actor=new.actor,
            principal=new.principal,
            form=UNTAGGED if new.principal is None else WITH_PRINCIPAL,
            command_id=new.command_id or uuid4(),
            length=new.length,
            blake3=_hex(new.declared.blake3),
            sha256=_hex(new.declared.sha256),
            metadata=new.metadata,
            token=token,
            part_bytes=self._parts.part_bytes(new.length),
            created_at=now,
            active_at=now,
        )
        try:
            await self._states.create(state)
        except SupersededError as error:
            found = await self._alive(upload_id)
            if found is None or found.token != state.token:
                await self._parts.discard(state.where, blob=False)
            if found is None:
                raise UploadBusyError(error.detail) from None
            return found
        except BaseException:
            await self._cleanups.run(self._undo(state))
            raise
        return state

    async def _undo(self, state: UploadState) -> None:
        """Remove an upload that was just begun, whether its state was written or not, unless somebody continues it."""
        try:
            await self._states.remove(state)
        except SupersededError:
            found = await self._states.load(state.upload_id)
            if found is None or found.token != state.token:
                await self._parts.discard(state.where, blob=False)

    async def _finish(self, state: UploadState, digests: Digests | None) -> UploadState:
        first = state.stored is None
        if state.stored is None:
            try:
                stored = await self._parts.assemble(state.where, state.parts, declared=state.declared, digests=digests)
            except ContentMismatchError:
                await self._states.remove(state)
                raise
            except UploadNotFoundError:
                await self._lost(state)
                raise
            except CorruptError:
                await self._known(state.package_id, state.upload_id, state.token)  # it may have been removed meanwhile
                raise
            state = await self._states.replace(state, stored=stored, active_at=self._clock(), holder=None)
        else:
            stored = state.stored
            if await self._blobs.size(stored.key) is None:  # no request knew that an event would still name it
                await self._states.remove(state)
                raise UploadNotFoundError(f"the bytes of upload {state.upload_id} were removed: begin a new one")
        try:
            placed = Placed(state.relative_path, state.media_type, stored)
            done = await self._record(state.package_id, placed, state.actor, state.command_id, state.principal)
        except RejectedError:
            # Only if the command was never tried before is it certain that no event names the stored bytes.
            await (self._states.remove_with_blob(state) if first else self._states.remove(state))
            raise
        answer = encode_acknowledgement(done, OLDEST).hex()  # in a version that the previous release can read
        state = await self._states.replace(state, answer=answer, active_at=self._clock())
        await self._parts.discard(state.where, blob=False)
        return state

    async def _lost(self, state: UploadState) -> None:
        """Remove an upload whose bytes the store no longer has. Raises SupersededError."""
        await self._states.remove(state)
        _log.warning("upload %s was given up: the blob store has removed parts of it", state.upload_id)

    async def _known(self, package_id: UUID, upload_id: UUID, token: str | None = None) -> UploadState:
        """The upload's state. With a token, only of the very same upload: another one may have begun under its id."""
        # Before the lookup, so that a caller who may not write to the package cannot tell whether the upload exists.
        visible = token is not None or self._may_write is None or await self._may_write(package_id)
        state = await self._alive(upload_id) if visible else None
        if state is not None and self._sender is not None and state.sender != self._sender:
            state = None  # otherwise its event would name an actor who did not send these bytes
        if state is None or state.package_id != package_id or (token is not None and state.token != token):
            raise UploadNotFoundError(
                f"package {package_id} has no upload {upload_id}: it expired, was ended or was refused; begin a new one"
            )
        return state

    async def _standing_at(self, package_id: UUID, upload_id: UUID, offset: int) -> UploadState:
        """The upload, which must have this many bytes. Raises UploadNotFoundError, UploadOffsetError."""
        state = await self._known(package_id, upload_id)
        if offset != state.offset:
            raise UploadOffsetError(f"the upload stands at {state.offset}, not at {offset}: continue from there")
        return state

    async def _alive(self, upload_id: UUID) -> UploadState | None:
        """The upload, unless it has expired: then it is removed completely."""
        state = await self._states.load(upload_id)
        if state is None or self._clock() < self.expires_at(state):
            return state
        try:
            await self._states.remove(state)
        except SupersededError:
            return await self._states.load(upload_id)
        return None

    def _require_free(self, state: UploadState) -> None:
        if state.holder is not None and self._clock() - state.active_at < self._hold:
            raise UploadBusyError("another request adds to this upload: wait until it ends, then ask for the offset")


def acknowledgement_of(state: UploadState) -> Acknowledgement | None:
    """The answer to the command that named the upload's file; None before that."""
    return None if state.answer is None else decode_acknowledgement(bytes.fromhex(state.answer), OLDEST)


def _behind(state: UploadState, at: int, length: int) -> int:
    """The end of a part at this offset. Raises InvalidRequestError: parts at that offset have another length."""
    right = min(state.part_bytes, state.length - at)
    if length != right or not right:
        raise InvalidRequestError(f"a part at offset {at:,} must have {right:,} bytes, not {length:,}")
    return at + length


def _hex(digest: bytes | None) -> str | None:
    return None if digest is None else digest.hex()


def _same(state: UploadState, new: NewUpload) -> bool:
    said = (new.package_id, new.relative_path, new.media_type, new.actor, new.principal, new.length)
    known = (state.package_id, state.relative_path, state.media_type, state.actor, state.principal, state.length)
    return said == known and (_hex(new.declared.blake3), _hex(new.declared.sha256)) == (state.blake3, state.sha256)


RENEW_SECONDS = 3.0
"""How often a request that receives bytes renews its mark; far below the time after which it is considered dead."""

_HASHED_BYTES = 2 << 20  # at a time: a thread that hashes waits for Python's lock after each piece
_RESERVED = 4  # part numbers reserved at a time: at most this many parts are sent again after a crash


class _Hash(Protocol):
    def update(self, data: bytes, /) -> object: ...

    def digest(self) -> bytes: ...


ALGORITHMS: dict[str, Callable[[], _Hash]] = {
    "sha1": lambda: hashlib.sha1(usedforsecurity=False),  # tus demands it, against damage in transit
    "sha256": hashlib.sha256,
    "blake3": blake3,
}
"""The algorithms for a body's checksum."""


@dataclass(frozen=True, slots=True)
class Checksum:
    """The digest that the bytes of one request must have."""

    algorithm: str
    digest: bytes

    def __post_init__(self) -> None:
        """Raises InvalidRequestError for an unknown algorithm, or a digest with a wrong length."""
        if self.algorithm not in ALGORITHMS:
            raise InvalidRequestError(f"checksums are supported with {', '.join(ALGORITHMS)}")
        if len(self.digest) != len(ALGORITHMS[self.algorithm]().digest()):
            raise InvalidRequestError(f"the checksum is not one of {self.algorithm}: its length differs")


class Appending:
    """One request that adds bytes. Belongs to one task and runs once."""

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
        """`state` must be the newest one; any other is refused when this runs.

        With `whole` or a `checksum`, a body that ends with an error adds nothing.
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
        self._done: list[Part] = []  # stored, but not in the state yet
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
        """The digests of the whole upload, if this request has brought all of it."""
        found = None if self._body is None else self._body.digests()
        return found if found is not None and found.length == self._state.length == self._state.held else None

    async def run(self, body: AsyncIterator[bytes]) -> UploadState:
        """Accept the body and return the upload's state after it. Raises as `ResumableUploads.append`, SupersededError.

        Received bytes are stored even if it raises, unless the body was all or nothing, or too long.
        """
        with self._parts.memory.share() as share:
            first = min(self._state.part_bytes, self._state.length - self._state.held)
            await share.take_in_turn(first, nothing="taken")
            self._state = await self._states.replace(self._state, **self._claim())
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
                self._filled().append(piece)
                self._room -= len(piece)
                self._fresh = True
            await self._renew(force=False)

    async def _next(self, share: Share) -> None:
        """Send the full buffer, and make room for the next part. Raises TooLargeError: there are no more parts."""
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
        """Put the buffer after the previous one is stored."""
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
        """Store a part, and hash it meanwhile. Returns its `etag`."""
        if self._body is None:
            return await self._parts.put(self._state.where, number, part)
        hashing = self._body.update_beside(part.views(_HASHED_BYTES))
        try:
            return await self._parts.put(self._state.where, number, part)
        finally:
            await hashing

    async def _settle(self) -> None:
        """Wait until the part that is being sent is stored. Raises UnavailableError."""
        if self._sending is None:
            return
        await asyncio.wait({self._sending})  # a cancellation leaves it running
        sent, self._sending = self._sending, None
        number, self._number = self._number, self._number + 1
        self._failed = True
        etag = sent.result()
        self._failed = False
        self._done.append(Part(number, etag))
        self._done_bytes += self._sending_bytes

    async def _renew(self, *, force: bool) -> None:
        """Renew the hold, commit the stored parts, and reserve more numbers."""
        if force or asyncio.get_running_loop().time() - self._renewed >= RENEW_SECONDS:
            moved = self._moved() if self._done and not self._whole else {}
            self._state = await self._states.replace(self._state, **moved, **self._claim())
            if moved:
                self._done, self._done_bytes = [], 0

    async def _save(self, *, keep: bool) -> None:
        """Store the received bytes, and release the upload. Without `keep`, it stays at the last committed offset.

        The caller may be cancelled meanwhile, so the buffer is closed here.
        """
        moved: dict[str, Any] = {}
        try:
            await self._settle()
            if keep and not self._failed and self._fresh:
                moved = await self._save_buffer()
        finally:
            if keep and self._done and not moved:
                moved = self._moved()
            if self._buffer is not None:
                self._buffer.close()
            self._state = await self._states.replace(
                self._state, **moved, holder=None, next_number=self._unused(), active_at=self._clock()
            )

    async def _save_buffer(self) -> dict[str, Any]:
        """Store the last bytes: as a part if they fill one or complete the upload, otherwise as a tail."""
        buffer = self._filled()
        if self._room == 0:
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
        """The lowest number under which no part was put, nor may still be put."""
        return self._number + (self._sending is not None)

    def _moved(self) -> dict[str, Any]:
        """The state's fields with the stored parts."""
        return {
            "parts": (*self._state.parts, *self._done),
            "held": self._state.held + self._done_bytes,
            "tail": None,
            "tail_bytes": 0,
        }

    def _start(self) -> int:
        """The offset of the buffer's bytes in the upload."""
        return self._state.held + self._done_bytes + (self._sending_bytes if self._sending is not None else 0)

    def _filled(self) -> PartBuffer:
        if self._buffer is None:
            raise RuntimeError("no part is being filled")
        return self._buffer
