"""The local adapter of the blob port: blobs as files of a folder, all at their content-addressed keys.

A body is written to `incoming/` in the same file system, hashed on the way, made durable, and then renamed to its key,
which costs no copy. So no other kind of key is ever needed here.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar
from uuid import uuid4

from artifact_store.byte_streams import ended
from artifact_store.errors import CorruptError, UnavailableError
from artifact_store.manifest import content_key
from artifact_store.models import Declared
from artifact_store.user_files import sync_folder
from services.blobs.intake import PIECE_BYTES, Cleanups, Intake, Mistrusted
from services.blobs.port import (
    DAMAGED,
    IDLE_SECONDS,
    PROVEN_SECONDS,
    RESUMABLE,
    Digests,
    PartStore,
    StoredBlob,
    checked_key,
    checked_object_key,
    checked_removable_key,
)
from services.blobs.resumable.object_parts import PART_BYTES, ObjectParts
from services.blobs.resumable.states import sweep_states
from services.runtime.clock import StoreClock
from services.runtime.file_system import PRIVATE_FILE, PRIVATE_FOLDER, secure_folder

_P = ParamSpec("_P")
_T = TypeVar("_T")

_NOTHING_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}
"""The system's errors for a path at which there is no blob."""


class LocalBlobStore:
    """Blobs in a folder on this machine. File work runs in threads. Belongs to one event loop."""

    def __init__(self, root: Path, *, threads: int = 16, part_bytes: int = PART_BYTES) -> None:
        """`root` is the folder, which `migrate` creates; `threads` limits how many files are worked on at a time.

        `part_bytes` is the size of the parts of uploads over several requests.
        """
        self._root = root
        self._incoming = root / "incoming"
        self._threads = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="blob-file")
        self._cleanups = Cleanups()
        self._clock = StoreClock()
        self._mistrusted = Mistrusted[str]()
        self._proven_until = 0.0
        self._durable_folders: set[Path] = set()  # their own entries were synced by this process
        self._parts = ObjectParts(self, part_bytes=part_bytes)

    @property
    def backend_id(self) -> str:
        """`local`."""
        return "local"

    @property
    def parts(self) -> PartStore:
        """See the port."""
        return self._parts

    async def store(self, body: AsyncIterable[bytes], *, declared: Declared, max_bytes: int) -> StoredBlob:
        """See the port."""
        intake = Intake(body, declared=declared, max_bytes=max_bytes)
        if declared.blake3 is not None and declared.size_bytes is not None:
            key = content_key(declared.blake3)
            if key not in self._mistrusted and await self.size(key) == declared.size_bytes:
                return await self._store_known(intake, key)
        draft = _Draft(self._incoming / f"{uuid4()}.part")
        try:
            await self._work(draft.open)
            while piece := await intake.take(PIECE_BYTES):
                await self._work(draft.write, piece)
            digests = await intake.digests()
            key = content_key(digests.blake3)
            await self._work(self._keep, draft, self._path(key))
            self._mistrusted.discard(key)
        except BaseException:
            await self._cleanups.run(self._work(draft.discard))
            raise
        return self._stored(digests)

    async def store_bytes(self, data: bytes, digests: Digests) -> StoredBlob:
        """See the port."""
        key = content_key(digests.blake3)
        path, draft = self._path(key), _Draft(self._incoming / f"{uuid4()}.part")

        def write() -> None:
            try:
                draft.open()
                draft.write(data)
                self._keep(draft, path)
            except BaseException:
                draft.discard()
                raise

        await self._work(write)
        self._mistrusted.discard(key)
        return self._stored(digests)

    async def _store_known(self, intake: Intake, key: str) -> StoredBlob:
        """Read a body that seems to be stored: it must match its declaration, and the file must have the same bytes."""
        there = self.read(key, 0, await self.size(key) or 0)
        same = True
        async with aclosing(there):  # type: ignore[type-var]  # it is a generator
            while piece := await intake.take(PIECE_BYTES):
                try:
                    same = same and await anext(there, b"") == piece
                except CorruptError:  # it is gone or truncated
                    same = False
        stored = self._stored(await intake.digests())
        await self.secure(key)
        if await self.size(key) != stored.length:
            raise UnavailableError(f"blob {key} was set aside as damaged while it was sent again: retry")
        if not same:
            self.mistrust(key)
            raise UnavailableError(f"blob {key} does not hold its own bytes: retry, so that they are replaced")
        return stored

    async def read(self, key: str, offset: int, length: int) -> AsyncIterator[bytes]:
        """See the port."""
        path = self._path(key)
        opened: list[int] = []  # a cancelled reader must close what its thread opens, too
        try:
            await self._work(lambda: opened.append(_open_for_read(path)))
            (file,) = opened
            total = await self._work(lambda: os.fstat(file).st_size)
            end = offset + length
            if total < end:
                raise CorruptError(f"blob {key} has {total} bytes, {end} are expected")
            while offset < end:
                chunk = await self._work(os.pread, file, min(PIECE_BYTES, end - offset), offset)
                if not chunk:
                    raise CorruptError(f"blob {key} ended at {offset} while it was read, {end} bytes are expected")
                offset += len(chunk)
                yield chunk
        finally:
            for file in opened:
                os.close(file)

    async def size(self, key: str) -> int | None:
        """See the port."""
        path = self._path(key)
        return await self._work(_size, path)

    async def secure(self, key: str) -> None:
        """See the port."""
        await self._work(self._secure, self._path(key).parent)

    def mistrust(self, key: str) -> None:
        """See the port."""
        self._mistrusted.add(key)

    async def set_aside(self, key: str) -> str | None:
        """See the port."""
        path, aside = self._path(key), f"{DAMAGED}{key}"

        def move() -> bool:
            target = self._path(aside)
            self._make_folder(target.parent)
            try:
                path.replace(target)
            except FileNotFoundError:
                return False
            sync_folder(target.parent)
            sync_folder(path.parent)
            return True

        return aside if await self._work(move) else None

    async def fresh_uploads(self) -> frozenset[str]:
        """See the port. There are none, because every body is renamed to its content-addressed key."""
        return frozenset()

    async def remove_uploads(self, *, before: datetime, orphaned: Callable[[str], bool]) -> int:
        """See the port. There are none here either."""
        return 0

    async def put_object(self, key: str, data: bytes) -> None:
        """See the port."""
        path = self._root / checked_object_key(key)
        await self._work(lambda: self._write_object(path, data, os.replace))

    async def create_object(self, key: str, data: bytes) -> bool:
        """See the port."""
        path = self._root / checked_object_key(key)

        def create() -> bool:
            try:
                self._write_object(path, data, os.link)
            except FileExistsError:
                return path.read_bytes() == data
            return True

        return await self._work(create)

    def _write_object(self, path: Path, data: bytes, place: Callable[[Path, Path], None]) -> None:
        """Write a draft and let `place` give it its name, durably."""
        draft = _Draft(self._incoming / f"{uuid4()}.part")
        try:
            draft.open()
            draft.write(data)
            draft.sync()
            self._make_folder(path.parent)
            place(draft.path, path)
            sync_folder(path.parent)
        finally:
            draft.discard()

    async def get_object(self, key: str) -> bytes | None:
        """See the port."""
        return await self._work(_content, self._root / checked_object_key(key))

    async def list_objects(self, prefix: str) -> list[str]:
        """See the port."""
        folder = self._root / checked_object_key(prefix)

        def keys() -> list[str]:
            walked = os.walk(folder, onerror=_pass_over_missing)  # an upload's folder may be removed meanwhile
            paths = (Path(at, name) for at, _, names in walked for name in names)
            return sorted(path.relative_to(self._root).as_posix() for path in paths)

        return await self._work(keys)

    async def delete_object(self, key: str) -> None:
        """See the port. Keeps the folder, because another object may be about to be written there, except that of an
        upload."""
        path = self._root / checked_removable_key(key)

        def delete() -> None:
            path.unlink(missing_ok=True)
            if key.startswith(RESUMABLE):
                with suppress(OSError):  # there are other objects, or another task creates one and will have to retry
                    path.parent.rmdir()
                    self._durable_folders.discard(path.parent)

        await self._work(delete)

    async def migrate(self) -> None:
        """See the port."""

        def create() -> None:
            self._root.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
            secure_folder(self._root)
            self._make_folder(self._incoming)

        await self._work(create)

    async def check(self) -> None:
        """See the port. Writes a small file and removes it."""
        draft = _Draft(self._incoming / f"{uuid4()}.part")

        def probe() -> None:
            if self._proven_until > time.monotonic() and os.access(self._incoming, os.W_OK | os.X_OK):
                space = os.statvfs(self._incoming)
                if space.f_bavail and (space.f_favail or not space.f_files):
                    return
            try:
                draft.open()
                draft.write(b"ok")
                draft.sync()
            finally:
                draft.discard()
            self._proven_until = time.monotonic() + PROVEN_SECONDS

        await self._work(probe)

    @property
    def clock(self) -> StoreClock:
        """See the port. The system's clock, because files have no separate one."""
        return self._clock

    async def now(self) -> datetime:
        """See the port. The time of a new file, which is the server's on a network file system.

        If no file can be created, as for a reader, the system's time.
        """
        draft = _Draft(self._incoming / f"{uuid4()}.part")

        def probe() -> float:
            try:
                draft.open()
                return draft.path.stat().st_mtime
            except OSError:
                return time.time()
            finally:
                with suppress(OSError):
                    draft.discard()

        return datetime.fromtimestamp(await self._work(probe), UTC)

    async def sweep(self, *, now: datetime, idle_seconds: float = IDLE_SECONDS) -> int:
        """See the port. A file that is being written has a recent modification time, however long the writing takes."""
        limit = now.timestamp() - idle_seconds

        def remove_idle() -> int:
            swept = 0
            for path in self._incoming.iterdir():
                with suppress(FileNotFoundError):  # finished, or removed by another sweep
                    if path.stat().st_mtime <= limit:
                        path.unlink()
                        swept += 1
            return swept

        return await self._work(remove_idle) + await sweep_states(self, now=now, idle_seconds=idle_seconds)

    async def close(self) -> None:
        """See the port."""
        await self._cleanups.drain()
        await asyncio.to_thread(self._threads.shutdown)

    def _path(self, key: str) -> Path:
        return self._root / checked_key(key)

    def _stored(self, digests: Digests) -> StoredBlob:
        key = content_key(digests.blake3)
        return StoredBlob(self.backend_id, key, 0, digests.length, digests.blake3, digests.sha256)

    def _keep(self, draft: _Draft, path: Path) -> None:
        draft.sync()
        self._make_folder(path.parent)
        # These bytes are verified; an existing file may be damaged. Of two simultaneous equal files, the later wins.
        draft.path.replace(path)
        self._secure(path.parent)

    def _secure(self, folder: Path) -> None:
        """Make the names of the blobs in a folder durable.

        This is also needed for an existing file: its writer may not have done so yet, or may have died before that.
        """
        self._make_folder(folder)
        sync_folder(folder)

    def _make_folder(self, folder: Path) -> None:
        if folder == self._root or (folder in self._durable_folders and folder.is_dir()):  # it may have been removed
            return
        self._make_folder(folder.parent)
        folder.mkdir(PRIVATE_FOLDER, exist_ok=True)
        sync_folder(folder.parent)
        self._durable_folders.add(folder)

    async def _work(self, act: Callable[_P, _T], *args: _P.args, **named: _P.kwargs) -> _T:
        """Run file work in a thread. A cancelled caller still waits for the thread, so that the thread never uses
        objects that are already closed."""
        running = asyncio.get_running_loop().run_in_executor(self._threads, partial(act, *args, **named))
        try:
            return await ended(running)
        except FileNotFoundError:
            if self._incoming.is_dir():
                raise UnavailableError("a file of the blob folder was removed while it was in use") from None
            raise UnavailableError(
                f"there is no blob folder at {self._root}: `artifact-store migrate` creates it"
            ) from None
        except OSError as error:
            self._proven_until = 0.0
            raise UnavailableError(f"the blob folder {self._root} cannot be used: {error.strerror}") from error


class _Draft:
    """A file in `incoming/` before it gets its key. Its methods block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1

    def open(self) -> None:
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_FILE)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]

    def sync(self) -> None:
        """Make the content durable and close the file."""
        os.fsync(self._file)
        self._close()

    def discard(self) -> None:
        """Close and remove the file, if it exists."""
        self._close()
        self.path.unlink(missing_ok=True)

    def _close(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def _open_for_read(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _NOTHING_THERE:
            raise
        raise CorruptError(f"blob {path.name[:80]} is missing") from None


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError as error:
        if error.errno not in _NOTHING_THERE:
            raise
        return None


def _pass_over_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
