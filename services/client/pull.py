"""Pull: a finalized package becomes files in a folder, every byte checked against its manifest.

The manifest is checked against the package's content address, each file against the manifest, and nothing that fails
ever gets its name. What is there already and equal is left alone, so that an interrupted pull can be run again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from threading import Event
from uuid import UUID

from blake3 import blake3

from schemas.digests import manifest_digest
from services.bundle import SMALL_FILE_BYTES, StreamedFile
from services.client.batches import FEWEST_FILES
from services.client.destination import Destination, Landing
from services.client.transfers import DEFAULT_CONCURRENCY, NoProgress, TransferProgress, at_once
from services.core.content_address import ContentAddress
from services.core.paths import add_folders, check_path
from services.errors import (
    ConflictError,
    CorruptError,
    IllegalPackageStateError,
    InvalidPathError,
    UnavailableError,
)
from services.manifest import Manifest, ManifestFile, decode
from services.registry import Registry, find_frozen
from services.threads import to_its_end

_logger = logging.getLogger(__name__)

_MOST_CONFLICTS_SHOWN = 10
_RENAMED = ".file"
"""What the path of a file gets at its end where other files need it as a folder."""

_WORTH_STREAMING = 4
"""At least every fourth file of a stream must be wanted."""

_WRITING_AT_ONCE = 6
"""Groups of small files, of about 1 MiB each: on some file systems, making a file is mostly waiting."""

_WRITTEN_AT_ONCE_BYTES = 64 * 1024
"""Up to here writing takes less time than handing the chunk to a thread."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a pull gave. `size_bytes` counts every file; `kept` are the files that were there already.

    `renamed` names the files that were written under another path, with that path.
    """

    package_id: UUID
    manifest_digest: ContentAddress
    files: int
    size_bytes: int
    kept: int
    renamed: Mapping[str, str] = field(default_factory=dict)


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
    """Bring the package's files into `destination`, which is created if need be. Memory is bounded.

    Files that are there and equal are kept; different ones are an error before anything is written, unless `force`
    says that they are to be replaced. Nothing else in the folder is touched.

    Packages of earlier releases may hold a file whose path is a folder of other files, which no folder can hold. With
    `rename` such a file `PATH` is written as `PATH.file`, or as `PATH.file-2` and so on where the package holds that.

    Raises:
        PackageNotFoundError: no such package. IllegalPackageStateError: it is not finalized.
        CorruptError: manifest or bytes are not what they must be, or a path would lead out of the folder.
        ConflictError: something else is in the way, or two files need one place and there is no `rename`.
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
    return Pulled(package_id, address, len(manifest.files), total, kept, renamed)


async def read_manifest(registry: Registry, package_id: UUID, address: ContentAddress) -> Manifest:
    """The package's manifest, checked against `address` and for what no package holds. Raises CorruptError."""
    data = await registry.get_manifest_bytes(package_id)
    if manifest_digest(data) != address.digest:
        raise CorruptError(f"the manifest of package {package_id} is not what {address} stands for")
    manifest = await asyncio.to_thread(decode, data)
    if manifest.package.id != package_id:
        raise CorruptError(f"the manifest of package {package_id} is that of package {manifest.package.id}")
    await asyncio.to_thread(_check_files, manifest.files)
    return manifest


async def _package(registry: Registry, which: UUID | ContentAddress) -> tuple[UUID, ContentAddress]:
    if isinstance(which, ContentAddress):
        return await find_frozen(registry, which), which
    package = await registry.get_package(which)
    if package.manifest_digest is None:
        with suppress(IllegalPackageStateError):  # the view may lag: a manifest is waited for up to the log's end
            await registry.get_manifest_bytes(which)
            package = await registry.get_package(which)
    if package.manifest_digest is None:
        raise IllegalPackageStateError(f"package {which} is open; it can be pulled once it is finalized")
    return which, package.manifest_digest


def _check_files(files: Sequence[ManifestFile]) -> None:
    """Raise CorruptError for what no package holds. Blocks."""
    seen: set[str] = set()
    for file in files:
        try:
            check_path(file.relative_path)
            if file.size_bytes < 0 or len(bytes.fromhex(file.blake3)) != 32:
                raise ValueError("no size or no digest")
        except (InvalidPathError, ValueError, TypeError, AttributeError) as error:
            raise CorruptError(f"the manifest's entry {str(file.relative_path)[:100]!r} cannot be: {error}") from None
        if file.relative_path in seen:
            raise CorruptError(f"the manifest names {file.relative_path!r} twice")
        seen.add(file.relative_path)


def _renamed(files: Sequence[ManifestFile], *, rename: bool) -> Mapping[str, str]:
    """Other paths for files whose own path is a folder of other files. Blocks.

    Raises ConflictError when there is such a file, unless `rename` allows another path.
    """
    renamed: dict[str, str] = {}
    taken = {file.relative_path for file in files}
    add_folders(taken, list(taken))
    # A path and those below it are neighbours once `/` comes before every other character.
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
    """The files that are to be fetched. Raises ConflictError when others are in their place.

    Blocks while it reads what is there; it ends early, with nothing that means anything, once it is `given_up`.
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
        raise ConflictError(f"nothing was written: other files are there by the name of {shown}")
    return missing


def _tell_kept(files: Iterable[ManifestFile], wanted: list[ManifestFile], told: TransferProgress) -> None:
    fetched = {file.relative_path for file in wanted}
    for file in files:
        if file.relative_path not in fetched:
            told.advance(file.size_bytes)
            told.finish_file()


@dataclass(frozen=True, slots=True)
class _Together:
    """Small files, by their paths, that are worth asking for in one stream, which begins behind the path `after`."""

    files: dict[str, ManifestFile]
    after: str | None


def _together(files: Sequence[ManifestFile], wanted: Sequence[ManifestFile]) -> _Together | None:
    """None when one by one is better: few are wanted, or few of what the stream would bring. By the order of paths."""
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
    """Small files out of one stream, groups written while the next are on their way; the paths that are in place.

    A stream that fails is no error: what it did not bring is fetched alone, which says what is wrong with which file.
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
                    raise CorruptError(f"{group.relative_path!r} is larger than what was asked for")
                found = [(together.files.get(file.relative_path), file.data) for file in group]
                writing.add(asyncio.create_task(write([(file, data) for file, data in found if file is not None])))
                await settle(_WRITING_AT_ONCE - 1)
        await settle(0)
    except (UnavailableError, CorruptError) as error:
        _logger.warning("what is left is fetched file by file: %s", error.detail)
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
        # A range, although it is the whole: the bytes are checked here, once.
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
