"""Pull: writes a finalized package as files into a folder, with every byte checked against its manifest.

The manifest is checked against the package's content address, and each file against the manifest; a file that fails
the check never gets its name. Equal files that exist already are kept, so an interrupted pull can be run again.

Every name in a package counts as hostile. Folders are opened one segment at a time, relative to the folder above and
without following links (openat(2), O_NOFOLLOW), so nothing is written outside, whatever changes meanwhile. A file has a
temporary name until it is complete. Files are not synced (fsync(2)): after a power failure a file may be empty.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from threading import Event, Lock
from uuid import UUID, uuid4

from blake3 import blake3

from artifact_store.archives.bundle import SMALL_FILE_BYTES, StreamedFile
from artifact_store.byte_streams import CHUNK_BYTES, to_its_end
from artifact_store.errors import (
    ConflictError,
    CorruptError,
    IllegalPackageStateError,
    InvalidPathError,
    UnavailableError,
)
from artifact_store.manifest import ContentAddress, Manifest, ManifestFile, decode, manifest_digest
from artifact_store.registry import Registry, find_frozen
from artifact_store.rules import add_folders, check_path
from artifact_store.transfers.parallel import DEFAULT_CONCURRENCY, NoProgress, TransferProgress, at_once
from artifact_store.transfers.push import FEWEST_FILES

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""Errors of file systems without hard links (link(2))."""

_logger = logging.getLogger(__name__)

_MOST_CONFLICTS_SHOWN = 10

_RENAMED = ".file"
"""The suffix for a file whose path other files need as a folder."""

READ_BY_PROGRAMS = frozenset(
    {
        # settings of the shell, and of programs that are started in the folder
        *(".env", ".envrc", ".npmrc", ".yarnrc", ".yarnrc.yml", ".bazelrc", ".exrc", ".vimrc", ".gdbinit"),
        # folders whose settings name commands
        *(".git", ".hg", ".cargo", ".vscode"),
        # what Python imports unasked
        *("sitecustomize.py", "usercustomize.py"),
        # what counts where the destination is a home folder
        *(".ssh", ".profile", ".bashrc", ".bash_profile", ".zshenv", ".zshrc", ".gitconfig"),
    }
)
"""Names of files that programs read without being asked, and that can make them run commands.

Files that people run on purpose (`Makefile`, `package.json`, scripts) are not included.
"""

_WORTH_STREAMING = 4
"""Use a stream only if at least one in this many of its files is wanted."""

_WRITING_AT_ONCE = 6
"""How many groups of small files, of about 1 MiB each, are written at a time: creating a file may be mostly waiting."""

_WRITTEN_AT_ONCE_BYTES = 64 * 1024
"""Writing a chunk of up to this size takes less time than handing it to a thread."""


class Destination:
    """One folder, held open until `close`. Its methods block on the disk; `holds` reads a whole file."""

    def __init__(self, folder: Path, renamed: Mapping[str, str] | None = None) -> None:
        """Open the folder, and create it if needed. The folder itself may be a link. Raises ConflictError.

        `renamed` maps paths to the paths under which those files are written.
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
        self._numbers = count()  # taking the next number is thread-safe

    def close(self) -> None:
        """Close the folder."""
        os.close(self._root)

    def holds(self, relative_path: str, size_bytes: int, digest: bytes, given_up: Event) -> bool | None:
        """Whether the existing file has this length and BLAKE3 (32 raw bytes); None if there is no file.

        If it has, it is kept: no other file of the package replaces it. Also returns False after `given_up` is set.
        Raises ConflictError: there is something other than a regular file, or a folder in the path is not a folder.
        """
        with self._folder(relative_path, create=False) as (folder, name):
            if folder is None:
                return None
            try:
                # Without O_NONBLOCK, opening a pipe would wait for a writer.
                descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            except FileNotFoundError:
                return None
            except OSError as error:
                why = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
                raise ConflictError(f"{relative_path!r} exists and cannot be used as a file: {why}") from None
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise ConflictError(f"{relative_path!r} exists and is not a regular file")
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
        """Raise ConflictError if a name in the path is longer than the folder's file system allows."""
        relative_path = self._renamed.get(relative_path, relative_path)
        if len(relative_path.encode()) <= self._name_bytes:
            return
        for part in relative_path.split("/"):
            if len(part.encode()) <= self._name_bytes:
                continue
            try:
                # Some file systems do not count bytes, so the file system itself is asked.
                os.stat(part, dir_fd=self._root, follow_symlinks=False)
            except OSError as error:
                if error.errno == errno.ENAMETOOLONG:
                    raise ConflictError(
                        f"nothing was written: {relative_path!r} has a name that is too long for this file system"
                    ) from None

    def is_empty(self) -> bool:
        """Whether the folder is empty."""
        with os.scandir(self._root) as entries:
            return next(entries, None) is None

    def write_files(self, files: Iterable[tuple[str, bytes]], *, replace: bool) -> None:
        """Write whole files and give each its name atomically. May run in several threads at a time.

        The previous file's folder is kept open, because the next file is usually in it too. Raises ConflictError as
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
        """A file with a temporary name in its folder. It is removed unless it was put into place."""
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
        """The open folder of the path (None if it does not exist), and the path's last segment."""
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
                    raise ConflictError(f"{way!r} is not a folder that can be written to: {error.strerror}") from None
                os.close(current)
                current = below
            yield current, name
        finally:
            os.close(current)


class _Placed:
    """The files that are in place, by device and inode: no other file of the package may replace them."""

    __slots__ = ("lock", "seen")

    def __init__(self) -> None:
        self.lock = Lock()
        self.seen: set[tuple[int, int]] = set()

    def keep(self, file: os.stat_result) -> None:
        """Keep an existing file. A file with several names may be replaced under another of its names."""
        if file.st_nlink == 1:
            self.seen.add((file.st_dev, file.st_ino))


class Landing:
    """One file that is being written, under a temporary name until it is complete.

    Uses plain system calls, because a tree may have a hundred thousand files.
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
        """Append a chunk."""
        written = os.write(self._file, chunk)
        while written < len(chunk):
            written += os.write(self._file, memoryview(chunk)[written:])
        self.size_bytes += written

    def put_into_place(self, *, replace: bool) -> None:
        """Give the file its name atomically.

        Raises ConflictError: the name exists now or, with `replace`, it is not a regular file, or it is another file
        that was just put there, because this file system treats both names as the same.
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
        """Link a second name, which fails if the name exists, unlike rename(2); `discard` removes the first name."""
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
        """Remove the temporary name, if it still exists."""
        self._close()
        if self._placed:
            return
        with suppress(FileNotFoundError):
            os.unlink(self._temporary, dir_fd=self._folder)

    def _close(self) -> None:
        if self._file >= 0:
            file, self._file = self._file, -1
            os.close(file)


@dataclass(frozen=True, slots=True)
class Pulled:
    """The result of a pull. `size_bytes` counts all files; `kept` counts the files that existed already.

    `renamed` maps paths of files that were written elsewhere to their new paths. `read_by_programs` holds the paths, up
    to a name of `READ_BY_PROGRAMS`, that can make programs in the folder run what the package says.
    """

    package_id: UUID
    manifest_digest: ContentAddress
    files: int
    size_bytes: int
    kept: int
    renamed: Mapping[str, str] = field(default_factory=dict)
    read_by_programs: tuple[str, ...] = ()


async def pull(
    registry: Registry,
    which: UUID | ContentAddress,
    destination: Path,
    *,
    force: bool = False,
    rename: bool = False,
    concurrency: int = DEFAULT_CONCURRENCY,
    progress: TransferProgress | None = None,
) -> Pulled:
    """Write the package's files into `destination`, which is created if needed. Memory is bounded.

    Equal files that exist already are kept. Different ones are an error before anything is written, unless `force`
    replaces them. Nothing else in the folder is touched.

    Packages of earlier releases may hold a file whose path is also a folder of other files. With `rename` such a file
    `PATH` is written as `PATH.file`, or as `PATH.file-2` and so on if the package has that path.

    Raises:
        PackageNotFoundError: no such package. IllegalPackageStateError: it is not finalized.
        CorruptError: the manifest or bytes do not match their digests, or a path would lead out of the folder.
        ConflictError: something else is in the way, or two files need one place and `rename` is not set.
    """
    told = progress or NoProgress()
    package_id, address = await _package(registry, which)
    manifest = await read_manifest(registry, package_id, address)
    told.expect(len(manifest.files), sum(file.size_bytes for file in manifest.files))
    renamed = await asyncio.to_thread(_renamed, manifest.files, rename=rename)
    folder = await asyncio.to_thread(Destination, destination, renamed)
    try:
        given_up = Event()
        wanted = await to_its_end(partial(_missing, folder, manifest.files, given_up, force=force), given_up)
        _tell_kept(manifest.files, wanted, told)
        kept = len(manifest.files) - len(wanted)

        async def fetch(file: ManifestFile) -> None:
            await _fetch(registry, folder, file, told, replace=force)
            told.finish_file()

        together = _together(manifest.files, wanted)
        if together is not None:
            arrived = await _fetch_together(registry, package_id, folder, together, told, replace=force)
            wanted = [file for file in wanted if file.relative_path not in arrived]
        await at_once(wanted, concurrency, fetch)
    finally:
        folder.close()
    total = sum(file.size_bytes for file in manifest.files)
    warned_of = await asyncio.to_thread(_read_by_programs, manifest.files)
    return Pulled(package_id, address, len(manifest.files), total, kept, renamed, warned_of)


def _read_by_programs(files: Iterable[ManifestFile]) -> tuple[str, ...]:
    found: set[str] = set()
    for file in files:
        parts = file.relative_path.split("/")
        # Some file systems ignore case.
        named = next((depth for depth, part in enumerate(parts, start=1) if part.lower() in READ_BY_PROGRAMS), None)
        if named is not None:
            found.add("/".join(parts[:named]))
    return tuple(sorted(found))


async def read_manifest(registry: Registry, package_id: UUID, address: ContentAddress) -> Manifest:
    """The package's manifest, checked against `address` and for values that no package has. Raises CorruptError."""
    data = await registry.get_manifest_bytes(package_id)
    if manifest_digest(data) != address.digest:
        raise CorruptError(f"the manifest of package {package_id} does not have the address {address}")
    manifest = await asyncio.to_thread(decode, data)
    if manifest.package.id != package_id:
        raise CorruptError(f"the manifest of package {package_id} is the one of package {manifest.package.id}")
    await asyncio.to_thread(_check_files, manifest.files)
    return manifest


async def _package(registry: Registry, which: UUID | ContentAddress) -> tuple[UUID, ContentAddress]:
    if isinstance(which, ContentAddress):
        return await find_frozen(registry, which), which
    package = await registry.get_package(which)
    if package.manifest_digest is None:
        with suppress(IllegalPackageStateError):  # the view may lag; a manifest is waited for up to the log's end
            await registry.get_manifest_bytes(which)
            package = await registry.get_package(which)
    if package.manifest_digest is None:
        raise IllegalPackageStateError(f"package {which} is open; it can be pulled once it is finalized")
    return which, package.manifest_digest


def _check_files(files: Sequence[ManifestFile]) -> None:
    """Raise CorruptError for values that no package has. Blocks."""
    seen: set[str] = set()
    for file in files:
        try:
            check_path(file.relative_path)
            if file.size_bytes < 0 or len(bytes.fromhex(file.blake3)) != 32:
                raise ValueError("no size or no digest")
        except (InvalidPathError, ValueError, TypeError, AttributeError) as error:
            raise CorruptError(f"the manifest's entry {str(file.relative_path)[:100]!r} is invalid: {error}") from None
        if file.relative_path in seen:
            raise CorruptError(f"the manifest names {file.relative_path!r} twice")
        seen.add(file.relative_path)


def _renamed(files: Sequence[ManifestFile], *, rename: bool) -> Mapping[str, str]:
    """New paths for files whose path is also a folder of other files. Blocks.

    Raises ConflictError if there is such a file and `rename` is not set.
    """
    renamed: dict[str, str] = {}
    taken = {file.relative_path for file in files}
    add_folders(taken, list(taken))
    # A path and the paths below it are neighbours if `/` sorts before every other character.
    paths = sorted((file.relative_path for file in files), key=lambda path: path.replace("/", "\0"))
    for above, path in pairwise(paths):
        if not path.startswith(above + "/"):
            continue
        if not rename:
            raise ConflictError(
                f"nothing was written: the package holds {above!r} and {path!r}, and no folder can hold both; "
                f"`--rename` (`rename=True`) writes the first one as {above + _RENAMED!r}"
            )
        names = (f"{above}{_RENAMED}{'' if number == 1 else f'-{number}'}" for number in count(1))
        renamed[above] = next(name for name in names if name not in taken)
        taken.add(renamed[above])
    return renamed


def _missing(folder: Destination, files: Sequence[ManifestFile], given_up: Event, *, force: bool) -> list[ManifestFile]:
    """The files to fetch. Raises ConflictError if different files are in their place.

    Blocks while it reads existing files. When `given_up` is set, it ends early and the result is meaningless.
    """
    for file in files:
        folder.check_names(file.relative_path)
    if folder.is_empty():
        return list(files)
    missing: list[ManifestFile] = []
    different: list[str] = []
    for file in files:
        if given_up.is_set():
            return []
        there = folder.holds(file.relative_path, file.size_bytes, bytes.fromhex(file.blake3), given_up)
        if there:
            continue
        if there is not None and not force:
            different.append(file.relative_path)
        missing.append(file)
    if different:
        more = len(different) - _MOST_CONFLICTS_SHOWN
        shown = ", ".join(map(repr, different[:_MOST_CONFLICTS_SHOWN])) + (f" and {more} more" if more > 0 else "")
        raise ConflictError(f"nothing was written: there are different files with the names {shown}")
    return missing


def _tell_kept(files: Iterable[ManifestFile], wanted: list[ManifestFile], told: TransferProgress) -> None:
    fetched = {file.relative_path for file in wanted}
    for file in files:
        if file.relative_path not in fetched:
            told.advance(file.size_bytes)
            told.finish_file()


@dataclass(frozen=True, slots=True)
class _Together:
    """Small files by path, to fetch in one stream that begins after the path `after`."""

    files: dict[str, ManifestFile]
    after: str | None


def _together(files: Sequence[ManifestFile], wanted: Sequence[ManifestFile]) -> _Together | None:
    """The small files to fetch in one stream. None if too few are wanted, or too few of those in the stream."""
    small = {file.relative_path: file for file in wanted if file.size_bytes <= SMALL_FILE_BYTES}
    if len(small) < FEWEST_FILES:
        return None
    start = next(number for number, file in enumerate(files) if file.relative_path in small)
    brought = sum(file.size_bytes <= SMALL_FILE_BYTES for file in files[start:])
    if _WORTH_STREAMING * len(small) < brought:
        return None
    return _Together(small, files[start - 1].relative_path if start else None)


async def _fetch_together(
    registry: Registry,
    package_id: UUID,
    folder: Destination,
    together: _Together,
    told: TransferProgress,
    *,
    replace: bool,
) -> set[str]:
    """Fetch small files in one stream, writing groups while the next ones arrive. Returns the paths that are in place.

    A stream that fails is not an error: the rest is fetched file by file, which shows what is wrong with which file.
    """
    arrived: set[str] = set()
    writing: set[asyncio.Task[None]] = set()

    async def write(files: list[tuple[ManifestFile, bytes]]) -> None:
        await to_its_end(partial(_write_small, folder, files, replace=replace))
        for file, _ in files:
            arrived.add(file.relative_path)
            told.advance(file.size_bytes)
            told.finish_file()

    async def settle(most: int) -> None:
        while len(writing) > most:
            done, _ = await asyncio.wait(writing, return_when=asyncio.FIRST_COMPLETED)
            writing.difference_update(done)
            for task in done:
                task.result()

    try:
        groups = registry.read_files(package_id, after=together.after, largest=SMALL_FILE_BYTES)
        async with aclosing(groups):
            async for group in groups:
                if isinstance(group, StreamedFile):
                    raise CorruptError(f"{group.relative_path!r} is larger than requested")
                found = [(together.files.get(file.relative_path), file.data) for file in group]
                writing.add(asyncio.create_task(write([(file, data) for file, data in found if file is not None])))
                await settle(_WRITING_AT_ONCE - 1)
        await settle(0)
    except (UnavailableError, CorruptError) as error:
        _logger.warning("fetching the remaining files one by one: %s", error.detail)
    finally:
        await asyncio.gather(*writing, return_exceptions=True)
    return arrived


def _write_small(folder: Destination, files: Sequence[tuple[ManifestFile, bytes]], *, replace: bool) -> None:
    """Check and write whole files. Blocks. Raises CorruptError, ConflictError."""
    for file, data in files:
        if len(data) != file.size_bytes or blake3(data).digest() != bytes.fromhex(file.blake3):
            raise CorruptError(f"the bytes of {file.relative_path!r} are not those that its manifest names")
    folder.write_files(((file.relative_path, data) for file, data in files), replace=replace)


async def _fetch(
    registry: Registry, folder: Destination, file: ManifestFile, told: TransferProgress, *, replace: bool
) -> None:
    with folder.new_file(file.relative_path) as landing:
        try:
            await _receive(registry, landing, file, told)
        except BaseException:
            told.advance(-landing.size_bytes)
            raise
        landing.put_into_place(replace=replace)


async def _receive(registry: Registry, landing: Landing, file: ManifestFile, told: TransferProgress) -> None:
    hashed = blake3()
    if file.size_bytes:
        # Request a range, although it is the whole file, so that the bytes are only checked here.
        async for chunk in await registry.open_content(file.file_id, 0, file.size_bytes):
            if landing.size_bytes + len(chunk) > file.size_bytes:
                raise CorruptError(f"{file.relative_path!r} has more bytes than its manifest says")
            if len(chunk) > _WRITTEN_AT_ONCE_BYTES:
                await to_its_end(partial(_write, landing, hashed, chunk))
            else:
                _write(landing, hashed, chunk)
            told.advance(len(chunk))
    if landing.size_bytes != file.size_bytes or hashed.digest() != bytes.fromhex(file.blake3):
        raise CorruptError(f"the bytes of {file.relative_path!r} are not those that its manifest names")


def _write(landing: Landing, hashed: blake3, chunk: bytes) -> None:
    landing.write(chunk)
    hashed.update(chunk)
