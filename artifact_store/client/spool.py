"""A spool: files that were added to a stream, on disk until a gateway has acknowledged them.

A spool is a folder of segments, each an append-only series of records. A record is a file, a batch (which files are
sent together, under which command id), a mark (all files before this number are settled), or the segment's end. A
file's record is on disk when `put` returns, a batch's before the batch is sent for the first time. So a process that
opens the folder after a crash sends the same batches under the same ids, and the gateway answers a repeat as it did the
first time. A segment is removed when all of its files are settled.

A segment without an end belongs to a process that died; bytes after its last whole record were never confirmed. Disk
space is allocated with each segment, and some of it is reserved for batches and marks, so that a full disk stops `put`
but not sending. Only one process at a time can use the folder.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import logging
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import NamedTuple
from uuid import UUID, uuid4
from zlib import crc32

from artifact_store.byte_streams import to_its_end
from artifact_store.client.stream import FILE_BYTES, AddedFile, Backlog, Batch, Refusal, first_batch
from artifact_store.errors import ConfigurationError, CorruptError, PushBackError, UnavailableError
from artifact_store.user_files import sync_folder

SPOOL_BYTES = 1 << 30
"""The most bytes in a spool, unless its stream says otherwise. On disk it may take two segments more."""

SEGMENT_BYTES = 8 << 20
"""The length of a segment. A segment with a longer first record is as long as needed."""

_RESERVE_BYTES = 64 << 10
"""How many bytes at the end of a segment are reserved for batches and marks."""

_MAGIC = b"ASSPOOL1"
_HEADER = struct.Struct(">8s16sQI")
"""Magic, package id, number of the first file, and the CRC-32 of these."""

_RECORD = struct.Struct(">BII")
"""Kind, length of the body in bytes, and the CRC-32 over both and the body."""

_NAMES = struct.Struct(">HH")
"""The lengths of the path and the media type in a file's record (bytes); the data follows them."""

_BATCH = struct.Struct(">QI16s")
_MARK = struct.Struct(">Q")

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

_log = logging.getLogger(__name__)


class _Kind(IntEnum):
    FILE = 1
    BATCH = 2
    MARK = 3
    END = 4


_FILE = _Kind.FILE


class _Record(NamedTuple):
    kind: _Kind
    body: bytes

    def encoded(self) -> bytes:
        return _RECORD.pack(self.kind, len(self.body), _checksum(self.kind, self.body)) + self.body


@dataclass(slots=True)
class _Segment:
    """One file of records. The next record goes to offset `end`; everything before it is on disk."""

    path: Path
    first: int
    """The number of its first file or, if it has none, of the first file after it."""
    next: int
    """The number after its last file."""
    end: int
    size: int
    descriptor: int
    following: _Segment | None = None


class _Planned(NamedTuple):
    """A batch that an earlier process has planned."""

    files: int
    command_id: UUID


class Spool(Backlog):
    """Files that wait on disk. All reading and writing is done in threads."""

    keeps = True

    def __init__(self, folder: Path, package_id: UUID, segment_bytes: int = SEGMENT_BYTES) -> None:
        super().__init__()
        self._folder = folder
        self._package_id = package_id
        self._segment_bytes = segment_bytes
        self._lock: int | None = None
        self._segments: deque[_Segment] = deque()
        self._serial = 0
        self._next = 0
        self._taken = 0
        self._at: tuple[_Segment, int] | None = None
        self._planned: dict[int, _Planned] = {}
        self._queue: list[tuple[_Record, asyncio.Future[int] | None]] = []
        self._writing: asyncio.Task[None] | None = None
        self._failure: UnavailableError | None = None
        self._rotating = Lock()

    async def open(self) -> int:
        """Begin with the files that an earlier process left. Returns how many files were ever added.

        Raises:
            ConfigurationError: another process uses the folder, it has files of another package, or it cannot be used.
            CorruptError: a segment is damaged.
        """
        files, size = await to_its_end(self._open)
        self.count(files, size)
        self.held_bytes = size + files * FILE_BYTES
        return self._next

    async def put(self, file: AddedFile) -> int:
        """As `Backlog.put`. Raises PushBackError: the disk is full. UnavailableError: it cannot be written."""
        path, media_type = file.relative_path.encode(), (file.media_type or "").encode()
        body = b"".join((_NAMES.pack(len(path), len(media_type)), path, media_type, file.data))
        return await self._write(_Record(_FILE, body))

    async def take(self) -> Batch:
        """As `Backlog.take`. The batch is on disk. Raises as `put`, and CorruptError."""
        planned = self._planned.pop(self._taken, None)
        files, at = await to_its_end(partial(self._read, None if planned is None else planned.files))
        if planned is None:
            batch = Batch(self._taken, files, uuid4())
            await self._write(_Record(_Kind.BATCH, _BATCH.pack(batch.number, len(files), batch.command_id.bytes)))
        else:
            batch = Batch(self._taken, files, planned.command_id)
        self._at = at
        self._taken += len(files)
        self.count(-len(files), -sum(len(file.data) for file in files))
        return batch

    async def settle(self, batch: Batch, refused: Sequence[Refusal]) -> None:
        """As `Backlog.settle`. Refused files are kept in the folder `refused` of the spool."""
        if refused:
            await to_its_end(partial(self._keep, batch.command_id, refused))
        settled = batch.number + len(batch.files)
        mark = _Record(_Kind.MARK, _MARK.pack(settled))
        if len(self._segments) > 1 and self._segments[0].next <= settled:
            await self._write(mark)  # before the segments with the batch's files may be removed
            self.settled = settled
            await to_its_end(self._remove_settled)
        else:
            self._begin_writing(mark, None)
            self.settled = settled

    async def close(self) -> None:
        """End the last segment, remove settled segments, and release the folder."""
        if self._writing is not None:
            await self._writing
        await to_its_end(self._close)

    # --- writing: one thread at a time ---

    async def _write(self, record: _Record) -> int:
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._begin_writing(record, done)
        return await done

    def _begin_writing(self, record: _Record, done: asyncio.Future[int] | None) -> None:
        """Write the record with the next group. `done` gets the number of the next file before it."""
        self._queue.append((record, done))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_all())

    async def _write_all(self) -> None:
        """Write the waiting records, group after group. Records that arrive during one group join the next."""
        while self._queue:
            group = self._next_group()
            records = [record for record, _ in group]
            try:
                if self._failure is not None:
                    raise self._failure
                await asyncio.to_thread(self._append, records)
            except Exception as error:  # noqa: BLE001 - whoever waits for the record gets it
                for _, done in group:
                    if done is not None and not done.done():
                        done.set_exception(error)
                continue
            for record, done in group:
                if done is not None and not done.done():
                    done.set_result(self._next)
                if record.kind is _FILE:
                    self._next += 1
                    self.count(1, _data_bytes(record.body))
        self._writing = None

    def _next_group(self) -> list[tuple[_Record, asyncio.Future[int] | None]]:
        """The records to write together. Batches and marks go without files, because there is always room for them."""
        small = [each for each in self._queue if each[0].kind is not _FILE]
        if small:
            self._queue = [each for each in self._queue if each[0].kind is _FILE]
            return small
        size, count = 0, 0
        for record, _ in self._queue:
            size += _RECORD.size + len(record.body)
            if count and size > self._segment_bytes // 2:
                break
            count += 1
        group, self._queue = self._queue[:count], self._queue[count:]
        return group

    def _append(self, records: Sequence[_Record]) -> None:
        """Write records to the last segment, and wait until they are on disk. Blocks."""
        with self._rotating:
            self._append_alone(records)

    def _append_alone(self, records: Sequence[_Record]) -> None:
        data = b"".join(record.encoded() for record in records)
        files = sum(record.kind is _FILE for record in records)
        reserve = _RESERVE_BYTES if files else 0
        try:
            segment = self._segments[-1] if self._segments else None
            if segment is None or segment.end + len(data) + reserve + _RECORD.size > segment.size:
                full, segment = segment, self._begin_segment(len(data))
                if full is not None:  # only now, because on a full disk the old segment must keep its reserve
                    self._end(full)
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise PushBackError(f"the disk of the spool {self._folder} is full") from None
            raise self._broken(error) from error
        try:
            _write_at(segment.descriptor, data, segment.end)
            _sync(segment.descriptor)
        except OSError as error:  # after a failed sync it is unknown what is on disk
            raise self._broken(error) from error
        segment.next += files
        segment.end += len(data)

    def _broken(self, error: OSError) -> UnavailableError:
        self._failure = UnavailableError(
            f"the spool {self._folder} cannot be written: {error.strerror}; repair its disk and open it again"
        )
        return self._failure

    def _begin_segment(self, length: int) -> _Segment:
        """Create an empty segment with room for this many bytes. Blocks."""
        first = self._segments[-1].next if self._segments else self._next
        size = max(self._segment_bytes, _HEADER.size + length + _RECORD.size + _RESERVE_BYTES)
        path = self._folder / f"{self._serial:012}.segment"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _allocate(descriptor, size)
            head = _HEADER.pack(_MAGIC, self._package_id.bytes, first, 0)[:-4]
            _write_at(descriptor, head + crc32(head).to_bytes(4), 0)
            os.fsync(descriptor)
            sync_folder(self._folder)
        except BaseException:
            os.close(descriptor)
            path.unlink()
            raise
        self._serial += 1
        segment = _Segment(path, first, first, _HEADER.size, size, descriptor)
        if self._segments:
            self._segments[-1].following = segment
        self._segments.append(segment)
        return segment

    def _end(self, segment: _Segment) -> None:
        """Write the end of a segment, and truncate its unused space. Blocks."""
        ended = _Record(_Kind.END, b"").encoded()
        _write_at(segment.descriptor, ended, segment.end)
        os.ftruncate(segment.descriptor, segment.end + len(ended))
        os.fsync(segment.descriptor)
        segment.size = segment.end + len(ended)

    def _remove_settled(self) -> None:
        """As `_remove`, but keeps the last segment, so that it may run while records are written. Blocks."""
        with self._rotating:  # a new last segment may be about to begin
            self._remove(1)

    def _remove(self, kept: int = 0) -> None:
        """Remove the segments whose files are all settled, oldest first, except the last `kept` ones."""
        while len(self._segments) > kept and self._segments[0].next <= self.settled:
            segment = self._segments.popleft()
            os.close(segment.descriptor)
            segment.path.unlink()
            sync_folder(self._folder)

    def _keep(self, command_id: UUID, refused: Sequence[Refusal]) -> None:
        """Keep refused files where people find them. Blocks."""
        folder = self._folder / "refused"
        folder.mkdir(mode=0o700, exist_ok=True)
        for number, (file, error) in enumerate(refused):
            about = {
                "package_id": str(self._package_id),
                "relative_path": file.relative_path,
                "media_type": file.media_type,
                "problem": error.problem,
                "detail": error.detail,
            }
            for ending, data in (("data", file.data), ("json", json.dumps(about, indent=1).encode() + b"\n")):
                with (folder / f"{command_id}-{number}.{ending}").open("wb") as kept:
                    kept.write(data)
                    kept.flush()
                    os.fsync(kept.fileno())
            _log.warning("%r was refused and is kept in %s: %s", file.relative_path, folder, error.detail)
        sync_folder(folder)

    # --- reading ---

    def _read(self, count: int | None) -> tuple[list[AddedFile], tuple[_Segment, int]]:
        """The files of the next batch, and where the batch after it begins. Blocks. Raises CorruptError."""
        segment, offset = self._at or (self._segments[0], _HEADER.size)
        while segment.next <= self._taken and segment.following is not None:  # it may be gone
            segment, offset = segment.following, _HEADER.size
        ends: list[tuple[_Segment, int]] = []

        def files() -> Iterator[AddedFile]:
            for record, where, end in _records(segment, offset):
                if record.kind is _FILE:
                    ends.append((where, end))
                    yield _file(record.body)

        skipped = self._taken - segment.first if self._at is None else 0
        found = files()
        deque(islice(found, skipped), maxlen=0)
        ends.clear()
        batch = first_batch(found) if count is None else list(islice(found, count))
        if len(batch) < (count or 1):
            raise CorruptError(f"the spool {self._folder} lacks files of the batch from file {self._taken:,} on")
        return batch, ends[len(batch) - 1]

    # --- opening and closing ---

    def _open(self) -> tuple[int, int]:
        """Lock the folder, and read its contents. Returns what `_left` returns. Blocks."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._recover()
            return self._left()
        except BlockingIOError:
            self._let_go()
            raise ConfigurationError(
                f"another process uses the spool {self._folder}; give each process its own"
            ) from None
        except OSError as error:
            self._let_go()
            raise ConfigurationError(f"the spool {self._folder} cannot be used: {error.strerror}") from error
        except BaseException:
            self._let_go()
            raise

    def _recover(self) -> None:
        """Read all segments, and end the one that a dead process left open."""
        foreign: UUID | None = None
        paths = sorted(self._folder.glob("*.segment"))
        for path in paths:
            self._serial = int(path.stem) + 1
            opened = _open_segment(path)
            if opened is None:
                if path != paths[-1]:
                    raise CorruptError(f"{path} has no header of a segment")
                path.unlink()  # its process died while creating it
                continue
            segment, package_id = opened
            foreign = package_id if package_id != self._package_id else foreign
            before = self._segments[-1] if self._segments else None
            self._segments.append(segment)
            if before is None:
                self.settled = segment.first
            elif segment.first == before.next:
                before.following = segment
            else:
                raise CorruptError(f"{path} begins with file {segment.first:,} instead of {before.next:,}")
            self._scan(segment)
        self._next = self._segments[-1].next if self._segments else 0
        left = self._next - self.settled
        if foreign is not None and left:
            raise ConfigurationError(f"the spool {self._folder} holds {left:,} files of package {foreign}")
        self._planned = {number: plan for number, plan in self._planned.items() if number >= self.settled}
        self._taken = self.settled
        self._remove()

    def _scan(self, segment: _Segment) -> None:
        """Find the end of a segment, and read its batches and marks. Raises CorruptError."""
        ended = _Record(_Kind.END, b"").encoded()
        sealed = os.pread(segment.descriptor, len(ended), segment.size - len(ended)) == ended
        whole = segment.size - len(ended) if sealed else segment.size
        while segment.end < whole and (record := _record_at(segment.descriptor, segment.end, whole)) is not None:
            match record.kind:
                case _Kind.FILE:
                    segment.next += 1
                case _Kind.BATCH:
                    number, count, command_id = _BATCH.unpack(record.body)
                    self._planned[number] = _Planned(count, UUID(bytes=command_id))
                case _Kind.MARK:
                    self.settled = max(self.settled, *_MARK.unpack(record.body))
                case _Kind.END:
                    break
            segment.end += _RECORD.size + len(record.body)
        if sealed and segment.end != whole:
            raise CorruptError(f"{segment.path} is damaged at byte {segment.end:,}; the files before it can be sent")
        if not sealed:
            self._end(segment)

    def _left(self) -> tuple[int, int]:
        """The number of files that are not settled, and the bytes of their data."""
        if not self._segments:
            return 0, 0
        sizes = (_data_bytes(each.body) for each, *_ in _records(self._segments[0], _HEADER.size) if each.kind is _FILE)
        left = list(islice(sizes, self.settled - self._segments[0].first, None))
        return len(left), sum(left)

    def _close(self) -> None:
        if self._segments and self._failure is None:
            last = self._segments[-1]
            with suppress(OSError):  # the next process ends it
                if last.end + _RECORD.size < last.size:
                    self._end(last)
                self._remove()
        self._let_go()

    def _let_go(self) -> None:
        for segment in self._segments:
            os.close(segment.descriptor)
        self._segments.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _open_segment(path: Path) -> tuple[_Segment, UUID] | None:
    """A segment whose records are not read yet, and its package; None if its header is incomplete."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    head = os.pread(descriptor, _HEADER.size, 0)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC) or crc32(head[:-4]) != int.from_bytes(head[-4:]):
        os.close(descriptor)
        return None
    _, package_id, first, _ = _HEADER.unpack(head)
    size = os.fstat(descriptor).st_size
    return _Segment(path, first, first, _HEADER.size, size, descriptor), UUID(bytes=package_id)


def _records(segment: _Segment, offset: int) -> Iterator[tuple[_Record, _Segment, int]]:
    """The records from here to the end of the spool, each with the place of its end. Raises CorruptError."""
    current: _Segment | None = segment
    while current is not None:
        end = current.end
        while offset < end:
            record = _record_at(current.descriptor, offset, end)
            if record is None:
                raise CorruptError(f"{current.path} is damaged at byte {offset:,}")
            offset += _RECORD.size + len(record.body)
            yield record, current, offset
        current, offset = current.following, _HEADER.size


def _record_at(descriptor: int, offset: int, end: int) -> _Record | None:
    """The record at this offset; None if there is no complete one before `end`."""
    head = os.pread(descriptor, _RECORD.size, offset)
    if len(head) < _RECORD.size:
        return None
    kind, length, checksum = _RECORD.unpack(head)
    if kind not in _KINDS or offset + _RECORD.size + length > end:
        return None
    body = os.pread(descriptor, length, offset + _RECORD.size)
    if len(body) < length or _checksum(kind, body) != checksum:
        return None
    return _Record(_Kind(kind), body)


_KINDS = frozenset(_Kind)


def _checksum(kind: int, body: bytes) -> int:
    return crc32(body, crc32(b"%d %d" % (kind, len(body))))


def _file(body: bytes) -> AddedFile:
    path, media_type = _NAMES.unpack_from(body)
    middle = _NAMES.size + path
    data = middle + media_type
    return AddedFile(body[_NAMES.size : middle].decode(), body[middle:data].decode() or None, body[data:])


def _data_bytes(body: bytes) -> int:
    """The length of the data in a file's record, in bytes."""
    path, media_type = _NAMES.unpack_from(body)
    return len(body) - _NAMES.size - int(path) - int(media_type)


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def _allocate(descriptor: int, size: int) -> None:
    """Reserve disk space if the system can; otherwise a full disk may stop sending as well."""
    allocate: Callable[[int, int, int], None] | None = getattr(os, "posix_fallocate", None)
    if allocate is None:
        os.ftruncate(descriptor, size)
    else:
        allocate(descriptor, 0, size)


def _sync(descriptor: int) -> None:
    sync: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)
    sync(descriptor)
