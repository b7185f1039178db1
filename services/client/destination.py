"""The folder that a package is pulled into: every name is hostile, nothing is written outside and through no link.

Folders are opened one segment at a time relative to the one above, without following links, so that nothing that
changes meanwhile can lead elsewhere (openat(2), O_NOFOLLOW).

A file has another name until it is whole, so that no half of one is ever seen, wherever a process ends. Nothing is
forced to the disk (fsync(2)): after a power failure a file that was there may be empty.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from threading import Event, Lock
from uuid import uuid4

from blake3 import blake3

from services.core.paths import check_path
from services.errors import ConflictError
from services.streams import CHUNK_BYTES

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""How file systems refuse a second name that know none (link(2))."""


class Destination:
    """One folder, held open until `close`. Its methods block on the disk; `holds` while it reads a whole file."""

    def __init__(self, folder: Path, renamed: Mapping[str, str] | None = None) -> None:
        """Open the folder, creating it if need be; it may itself be named through a link. Raises ConflictError.

        Files whose path is a key of `renamed` get the path that it names.
        """
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._root = os.open(folder.resolve(), _FOLDER)
        except NotADirectoryError:
            raise ConflictError(f"{folder} is no folder") from None
        self._name_bytes = os.fpathconf(self._root, "PC_NAME_MAX")
        self._renamed = renamed or {}
        self._placed = _Placed()
        self._name = uuid4().hex
        self._numbers = count()  # asking it for the next one is safe in threads

    def close(self) -> None:
        """Let go of the folder."""
        os.close(self._root)

    def holds(self, relative_path: str, size_bytes: int, digest: bytes, given_up: Event) -> bool | None:
        """Whether the file that is there has this length and BLAKE3 (32 raw bytes); None when there is none.

        One that has is kept: no other file of the package replaces it. False as well once it is `given_up`.
        Raises ConflictError: something is there that is no regular file, or a folder on the way is none.
        """
        with self._folder(relative_path, create=False) as (folder, name):
            if folder is None:
                return None
            try:
                # Without O_NONBLOCK the opening of a pipe would wait for a writer.
                descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            except FileNotFoundError:
                return None
            except OSError as error:
                why = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
                raise ConflictError(f"{relative_path!r} is there and cannot be taken for a file: {why}") from None
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise ConflictError(f"{relative_path!r} is there and no regular file")
            if found.st_size != size_bytes:
                return False
            hashed = blake3()
            while not given_up.is_set() and (chunk := os.read(descriptor, CHUNK_BYTES)):
                hashed.update(chunk)
            if given_up.is_set() or hashed.digest() != digest:
                return False
            self._placed.keep(found)
            return True
        finally:
            os.close(descriptor)

    def check_names(self, relative_path: str) -> None:
        """Raise ConflictError when a name in the path is longer than the folder's file system takes."""
        relative_path = self._renamed.get(relative_path, relative_path)
        if len(relative_path.encode()) <= self._name_bytes:
            return
        for part in relative_path.split("/"):
            if len(part.encode()) <= self._name_bytes:
                continue
            try:
                # Some count other units than bytes: it has the last word.
                os.stat(part, dir_fd=self._root, follow_symlinks=False)
            except OSError as error:
                if error.errno == errno.ENAMETOOLONG:
                    raise ConflictError(
                        f"nothing was written: {relative_path!r} holds a longer name than this file system takes"
                    ) from None

    def is_empty(self) -> bool:
        """Whether nothing at all is in the folder."""
        with os.scandir(self._root) as entries:
            return next(entries, None) is None

    def write_files(self, files: Iterable[tuple[str, bytes]], *, replace: bool) -> None:
        """Write whole files and give each its name in one step; may run in several threads at a time.

        The folder of the file before is kept open, since the next one mostly lies there too. Raises ConflictError as
        `Landing.put_into_place`.
        """
        last, folder = "", -1
        try:
            for relative_path, data in files:
                above, _, name = self._renamed.get(relative_path, relative_path).rpartition("/")
                if folder < 0 or above != last:
                    with self._folder(relative_path, create=True) as (found, _):
                        if found is None:
                            raise ConflictError(f"the folder of {relative_path!r} is gone")
                        if folder >= 0:
                            os.close(folder)
                        last, folder = above, os.dup(found)
                landing = self._landing(folder, name, relative_path)
                try:
                    landing.write(data)
                    landing.put_into_place(replace=replace)
                finally:
                    landing.discard()
        finally:
            if folder >= 0:
                os.close(folder)

    @contextmanager
    def new_file(self, relative_path: str) -> Iterator[Landing]:
        """A file under a temporary name beside its place; removed unless it was put into place."""
        with self._folder(relative_path, create=True) as (folder, name):
            if folder is None:
                raise ConflictError(f"the folder of {relative_path!r} is gone")
            landing = self._landing(folder, name, relative_path)
            try:
                yield landing
            finally:
                landing.discard()

    def _landing(self, folder: int, name: str, relative_path: str) -> Landing:
        temporary = f".artifact-store-{self._name}-{next(self._numbers)}.part"
        return Landing(folder, name, relative_path, temporary, self._placed)

    @contextmanager
    def _folder(self, relative_path: str, *, create: bool) -> Iterator[tuple[int | None, str]]:
        """The open folder of the path, and the path's last segment; no folder when it is not there."""
        check_path(relative_path)
        *above, name = self._renamed.get(relative_path, relative_path).split("/")
        current = os.dup(self._root)
        try:
            for depth, part in enumerate(above, start=1):
                try:
                    if create:
                        with suppress(FileExistsError):
                            os.mkdir(part, dir_fd=current)
                    below = os.open(part, _FOLDER, dir_fd=current)
                except FileNotFoundError:
                    yield None, name
                    return
                except OSError as error:
                    way = "/".join(above[:depth])
                    raise ConflictError(f"{way!r} is no folder that can be written into: {error.strerror}") from None
                os.close(current)
                current = below
            yield current, name
        finally:
            os.close(current)


class _Placed:
    """The files that are in their places, by device and inode: no other file of the package may replace them."""

    __slots__ = ("lock", "seen")

    def __init__(self) -> None:
        self.lock = Lock()
        self.seen: set[tuple[int, int]] = set()

    def keep(self, file: os.stat_result) -> None:
        """A file that was there; one with several names may be replaced under another of them."""
        if file.st_nlink == 1:
            self.seen.add((file.st_dev, file.st_ino))


class Landing:
    """One file on its way to its place, under another name until it is whole.

    By bare system calls, because a tree may hold a hundred thousand files.
    """

    __slots__ = ("_file", "_folder", "_name", "_others", "_path", "_placed", "_temporary", "size_bytes")

    def __init__(self, folder: int, name: str, relative_path: str, temporary: str, others: _Placed) -> None:
        self._folder = folder
        self._name = name
        self._path = relative_path
        self._temporary = temporary
        self._others = others
        self._file = os.open(temporary, _NEW_FILE, 0o666, dir_fd=folder)
        self._placed = False
        self.size_bytes = 0

    def write(self, chunk: bytes) -> None:
        """Append."""
        written = os.write(self._file, chunk)
        while written < len(chunk):
            written += os.write(self._file, memoryview(chunk)[written:])
        self.size_bytes += written

    def put_into_place(self, *, replace: bool) -> None:
        """Give the file its name in one step.

        Raises ConflictError: something is there now, or, with `replace`, something that is no regular file, or another
        file that was just put there: to this file system both names are one.
        """
        if replace:
            self._replace()
        else:
            self._link()

    def _replace(self) -> None:
        ours = os.fstat(self._file)
        with self._others.lock:
            there = self._there()
            if there is not None and not stat.S_ISREG(there.st_mode):
                raise ConflictError(f"something took the place of {self._path!r} meanwhile")
            if there is not None and (there.st_dev, there.st_ino) in self._others.seen:
                raise ConflictError(f"{self._path!r} and another file of the package have one name in this folder")
            self._others.seen.add((ours.st_dev, ours.st_ino))
            self._rename()

    def _link(self) -> None:
        """A second name, which another file of that name refuses, unlike rename(2); `discard` takes the first one."""
        self._close()
        try:
            os.link(
                self._temporary, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder, follow_symlinks=False
            )
        except FileExistsError:
            raise ConflictError(f"something took the place of {self._path!r} meanwhile") from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if self._there() is not None:
                raise ConflictError(f"something took the place of {self._path!r} meanwhile") from None
            self._rename()

    def _there(self) -> os.stat_result | None:
        try:
            return os.stat(self._name, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def _rename(self) -> None:
        self._close()
        os.rename(self._temporary, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._placed = True

    def discard(self) -> None:
        """Remove the temporary name, if it is still there."""
        self._close()
        if self._placed:
            return
        with suppress(FileNotFoundError):
            os.unlink(self._temporary, dir_fd=self._folder)

    def _close(self) -> None:
        if self._file >= 0:
            file, self._file = self._file, -1
            os.close(file)
