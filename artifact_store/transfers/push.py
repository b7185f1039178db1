"""Push: makes a package of a file or a tree, in any registry.

Small files are sent in batches, large ones alone. Names, kinds of files and links are checked before the package is
created. A batch fills at most one pack, so that the client can name the pack that the batch becomes; bytes that the
store has already are then named and not sent. The same tree always makes the same batches.

An interrupted push leaves only its id behind, in one small file that is locked while the push runs. Every command id is
derived from that id, so if the same push is run again, it gets the first answer to each step and continues. Two equal
pushes at the same time are two separate pushes.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4, uuid5

from blake3 import blake3

from artifact_store.archives.bundle import PACK_BYTES, SMALL_FILE_BYTES, HeldFiles, NamedFile, PackLayout, SmallFile
from artifact_store.byte_streams import CHUNK_BYTES, to_its_end
from artifact_store.client.bodies import BodySource, BytesSource, CountedSource, FileSource
from artifact_store.errors import (
    AnswerExpiredError,
    CommandReusedError,
    ConflictError,
    CorruptError,
    IllegalPackageStateError,
    RejectedError,
    UnavailableError,
    UnknownContentError,
)
from artifact_store.manifest import ContentAddress
from artifact_store.models import MAX_PAGE, Acknowledgement, Declared, File, all_pages
from artifact_store.registry import Registry
from artifact_store.rules import NONE_UNPORTABLE, PathPair, Unportable
from artifact_store.transfers.parallel import DEFAULT_CONCURRENCY, NoProgress, TransferProgress, at_once
from artifact_store.transfers.tree import TreeFile, walk
from artifact_store.user_files import state_folder

_MOST_AT_ONCE = 64

BATCH_FILES = 1_000
"""The most files in a batch: a transaction of the log can take this many events together with others."""

FEWEST_FILES = 8
"""Fewer files are sent alone, in parallel: each is then a separate blob, which is shared and healed separately."""

_BATCHES_AT_ONCE = 4
"""At most this many batches are in memory at a time, each of up to 8 MiB, and the same amount in flight."""


@dataclass(slots=True)
class PushState:
    """The state of one push.

    `resumed`: an earlier run began it. `kept`: a later run can resume it. `began`: something was sent. `done`: it is
    complete, so its state is dropped.
    """

    push_id: UUID
    resumed: bool
    kept: bool
    began: bool = False
    done: bool = False

    def command_id(self, step: str) -> UUID:
        """The command id of one step, which is the same in every run."""
        return uuid5(self.push_id, step)


def default_folder() -> Path | None:
    """The folder for the state of pushes: `artifact-store/pushes` in the user's state folder (XDG Base Directory 0.8).

    None if the user has no home.
    """
    return state_folder("pushes")


@contextmanager
def push_state(folder: Path | None, identity: dict[str, Any], *, fresh: bool = False) -> Iterator[PushState]:
    """The state of the push that `identity` (JSON values) describes, locked inside the block.

    `fresh` ignores the state of an interrupted run. Without a folder, or with one that cannot be written, no state is
    kept and the push cannot be resumed. Blocks for a moment.
    """
    descriptor, path = _lock(folder, identity)
    if descriptor is None or path is None:
        yield PushState(uuid4(), resumed=False, kept=False)
        return
    try:
        known = None if fresh else _read(descriptor)
        state = PushState(known or uuid4(), resumed=known is not None, kept=True)
        if known is None and not _write(descriptor, state.push_id):
            _forget(descriptor, path)
            yield PushState(uuid4(), resumed=False, kept=False)
            return
        try:
            yield state
        finally:
            if state.done or not (state.began or state.resumed):
                _forget(descriptor, path)
    finally:
        os.close(descriptor)


def _lock(folder: Path | None, identity: dict[str, Any]) -> tuple[int | None, Path | None]:
    """The first state file of this push that no running process has locked, opened and locked."""
    if folder is None:
        return None, None
    try:
        # Not JCS, which would refuse NaN, surrogates and large numbers here: the registry refuses them with a reason.
        name = blake3(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
        for each in (folder.parent, folder):  # one by one, because `parents` ignores the mode
            each.mkdir(parents=True, exist_ok=True, mode=0o700)
        for number in range(_MOST_AT_ONCE):
            path = folder / f"{name}.{number}.json"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            if _try_lock(descriptor, path):
                return descriptor, path
            os.close(descriptor)
    except (OSError, RecursionError):  # RecursionError: the registry also refuses that many levels
        return None, None
    return None, None


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    try:
        # Another push may have finished and removed the file between our opening and locking it.
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> UUID | None:
    try:
        return UUID(json.loads(os.pread(descriptor, 4096, 0))["push_id"])
    except (ValueError, KeyError, TypeError):
        return None  # new, or truncated while it was written, when nothing had been sent under its id


def _forget(descriptor: int, path: Path) -> None:
    """Empty the file, so that it is not a state any more, and remove it. Failures are ignored."""
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
    with suppress(OSError):
        path.unlink()


def _write(descriptor: int, push_id: UUID) -> bool:
    """Store the id. Returns whether that succeeded."""
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"push_id": str(push_id)}).encode(), 0)
        os.fsync(descriptor)
    except OSError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Batch:
    """Small files that are sent together."""

    files: Sequence[TreeFile]

    def __str__(self) -> str:
        return f"one of the files from {self.files[0].relative_path!r} to {self.files[-1].relative_path!r}"

    @property
    def step(self) -> str:
        """The name of this step of a push, which is unique to these files."""
        paths = "\0".join(file.relative_path for file in self.files)
        return f"files:{blake3(paths.encode()).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Held:
    """A batch in memory: its files, and their names as parts of the pack with this BLAKE3 (32 raw bytes)."""

    files: Sequence[SmallFile]
    named: Sequence[NamedFile]
    pack: bytes


def batches(files: Iterable[TreeFile]) -> Iterator[Batch | TreeFile]:
    """The small files in batches, the others alone, ordered by the first file of each."""
    waiting: list[TreeFile] = []
    size = 0
    for file in files:
        if file.stamp.size_bytes > SMALL_FILE_BYTES:
            yield file
            continue
        if waiting and (len(waiting) == BATCH_FILES or size + file.stamp.size_bytes > PACK_BYTES):
            yield from _together(waiting)
            waiting, size = [], 0
        waiting.append(file)
        size += file.stamp.size_bytes
    yield from _together(waiting)


def _together(files: list[TreeFile]) -> Sequence[Batch | TreeFile]:
    return [Batch(files)] if len(files) >= FEWEST_FILES else files


def hold(batch: Batch) -> Held:
    """Read the files. Blocks. Raises ContentMismatchError if one has changed since the walk; OSError."""
    layout, pack = PackLayout(), blake3()
    files: list[SmallFile] = []
    places: list[tuple[bytes, int]] = []
    for file in batch.files:
        data = FileSource(file.path, file.stamp).read_now()
        digest = blake3(data).digest()
        place = layout.place(digest, len(data))
        if place is None:
            raise RuntimeError("a batch is more than a pack")
        _, offset, new = place
        if new:
            pack.update(data)
        files.append(SmallFile(file.relative_path, file.media_type, data))
        places.append((digest, offset))
    name = pack.digest()
    named = [
        NamedFile(file.relative_path, file.media_type, len(file.data), digest, name, offset)
        for file, (digest, offset) in zip(files, places, strict=True)
    ]
    return Held(files, named, name)


@dataclass(frozen=True, slots=True)
class Pushed:
    """The result of a push. `sequence` is that of the package's last event; `size_bytes` counts all files.

    For `unportable_count` and `unportable_paths`, see `Acknowledgement`.
    """

    package_id: UUID
    manifest_digest: ContentAddress | None
    sequence: int
    files: int
    size_bytes: int
    unportable_count: int = 0
    unportable_paths: tuple[PathPair, ...] = ()


async def push(
    registry: Registry,
    path: Path,
    *,
    name: str,
    producer: str,
    subject: str,
    retention_class: str,
    actor: str = "anonymous",
    metadata: dict[str, Any] | None = None,
    files: Sequence[TreeFile] | None = None,
    finalize: bool = True,
    concurrency: int = DEFAULT_CONCURRENCY,
    state: PushState | None = None,
    progress: TransferProgress | None = None,
) -> Pushed:
    """Create a package, send the file or tree at `path`, and finalize the package.

    Memory is bounded by `concurrency` chunks of 1 MiB. Small files are sent in batches. Bytes that the store has
    already are named instead of sent. With the `state` of an interrupted push, continues it: files that the package has
    already are compared instead of sent, which needs the registry's view.

    `files` is what `walk(path)` found, if the caller has called it already.

    Raises:
        InvalidPathError, InvalidRequestError: something at `path` cannot be pushed; nothing was created.
        ContentMismatchError: a file changed while it was read.
        ConflictError, CommandReusedError: the tree is not that of the interrupted push.
        CorruptError: the bytes did not arrive as they were sent.
        Errors of the operations of `Registry`. The package then stays open, and the push can be resumed.
    """
    told = progress or NoProgress()
    current = state or PushState(uuid4(), resumed=False, kept=False)
    if files is None:
        files = await asyncio.to_thread(walk, path)
    told.expect(len(files), sum(file.stamp.size_bytes for file in files))
    current.began = True  # from now on, a lost answer may hide a created package
    about = (name, producer, subject, retention_class, actor, metadata or {})
    try:
        created = await registry.create(*about, command_id=current.command_id("create"))
        package_id, last = created.package_id, created.sequence
    except AnswerExpiredError as error:
        if not current.resumed:
            raise
        package_id, last = UUID(str(error.facts["package_id"])), 1  # it was finalized long ago, so only compare
    except RejectedError:
        current.began = current.resumed
        raise
    present = await _present(registry, package_id) if current.resumed else {}
    gone = present.keys() - {file.relative_path for file in files}
    if gone:
        raise ConflictError(f"the interrupted push has sent {min(gone)!r}, which no longer exists")

    async def send(item: Batch | TreeFile) -> None:
        nonlocal last
        last = max(last, await sender.send(item))

    missing = []
    for file in files:
        known = present.get(file.relative_path)
        if known is None:
            missing.append(file)
            continue
        await _compare(file, known)
        told.advance(file.stamp.size_bytes)
        told.finish_file()
    sender = _Sender(registry, package_id, actor, current, told)
    await at_once(batches(missing), concurrency, send)
    manifest, unportable = None, NONE_UNPORTABLE
    if finalize:
        manifest, last, unportable = await _finalize(registry, package_id, actor, current)
        if current.resumed and last != len(files) + 2:  # one event for the creation, each file and the finalization
            raise CorruptError(
                f"package {package_id} was frozen with {last - 2:,} files where the tree has {len(files):,}: "
                "something that an earlier run had sent arrived after it was gone from the tree"
            )
    elif present:
        last = max(last, len(files) + 1)  # one event for the creation and one for each file
    current.done = True
    size_bytes = sum(file.stamp.size_bytes for file in files)
    return Pushed(package_id, manifest, last, len(files), size_bytes, *unportable)


async def _finalize(
    registry: Registry, package_id: UUID, actor: str, state: PushState
) -> tuple[ContentAddress | None, int, Unportable]:
    """The package's manifest, the sequence of its last event, and its clashing paths."""
    try:
        done = await registry.finalize(package_id, actor, command_id=state.command_id("finalize"))
    except AnswerExpiredError:
        if not state.resumed:
            raise
        # The interrupted push got this far, and all files were compared: the package is complete.
        package = await registry.get_package(package_id)
        return package.manifest_digest, package.last_event_sequence, NONE_UNPORTABLE
    manifest = None if done.manifest_digest is None else ContentAddress.of_digest(done.manifest_digest)
    return manifest, done.sequence, Unportable(done.unportable_count, done.unportable_paths)


class _Sender:
    """Sends files and batches into one package. Bytes that are stored already are named, not sent."""

    def __init__(
        self, registry: Registry, package_id: UUID, actor: str, state: PushState, told: TransferProgress
    ) -> None:
        self._registry = registry
        self._package_id = package_id
        self._actor = actor
        self._state = state
        self._told = told
        self._turns = asyncio.Semaphore(_BATCHES_AT_ONCE)
        self._first_read: asyncio.Event | None = None

    async def send(self, item: Batch | TreeFile) -> int:
        """Send a batch or a file, and return the sequence of its last event."""
        try:
            if isinstance(item, TreeFile):
                return await self._send_file(item)
            async with self._turns:
                return await self._send_batch(item)
        except CommandReusedError:
            what = repr(item.relative_path) if isinstance(item, TreeFile) else str(item)
            raise CommandReusedError(f"{what} is not what the interrupted push has sent") from None

    async def _send_batch(self, batch: Batch) -> int:
        held = await self._read(batch)
        command = self._state.command_id(batch.step)
        done = await self._name(held.pack, held.named, command)
        if done is None:
            bundle = HeldFiles(held.files)
            done = await self._registry.ingest_files(self._package_id, bundle, self._actor, command_id=command)
        for file, ingested in zip(held.named, done.files, strict=True):
            if file.blake3 != ingested.blake3:
                raise CorruptError(f"{file.relative_path!r} did not arrive as it was sent; do not finalize")
        for sent in batch.files:
            self._told.advance(sent.stamp.size_bytes)
            self._told.finish_file()
        return done.sequence

    async def _read(self, batch: Batch) -> Held:
        """Read the files, the first batch alone, so that it can go while the others are read.

        Threads that read at the same time share Python's lock, and all of them would be done late.
        """
        if self._first_read is None:
            self._first_read = asyncio.Event()
            try:
                return await to_its_end(partial(hold, batch))
            finally:
                self._first_read.set()
        await self._first_read.wait()
        return await to_its_end(partial(hold, batch))

    async def _send_file(self, file: TreeFile) -> int:
        path, size = file.relative_path, file.stamp.size_bytes
        command = self._state.command_id(f"file:{path}")
        source, digest = await _source(file)
        done = await self._name(digest, [NamedFile(path, file.media_type, size, digest, digest)], command)
        if done is not None:
            self._told.advance(size)
        else:
            done = await self._registry.ingest(
                self._package_id,
                path,
                file.media_type,
                CountedSource(source, self._told.advance),
                self._actor,
                declared=Declared(size_bytes=size, blake3=digest),
                command_id=command,
            )
        self._told.finish_file()
        return done.sequence

    async def _name(self, blob: bytes, files: Sequence[NamedFile], command: UUID) -> Acknowledgement | None:
        """Name the files instead of sending them, if their blob is stored. Returns None if it is not."""
        if not await self._registry.known_blobs([blob]):
            return None
        try:
            return await self._registry.ingest_named(self._package_id, files, self._actor, command_id=command)
        except UnknownContentError:  # it exists, but is damaged or being removed
            return None


async def _source(file: TreeFile) -> tuple[BodySource, bytes]:
    """The file's bytes and their BLAKE3, which is sent first. A file that fits into memory is read once for both."""
    source = FileSource(file.path, file.stamp)
    if file.stamp.size_bytes > CHUNK_BYTES:
        return source, await source.blake3()
    whole = BytesSource(await source.read_whole())
    return whole, whole.digest


async def _present(registry: Registry, package_id: UUID) -> Mapping[str, File]:
    """All files that the package has by now.

    A file that is missed here would be sent again in another batch, which is another command, and a file that is no
    longer in the tree would stay in the package. Raises UnavailableError if the files cannot be listed.
    """
    try:
        with suppress(IllegalPackageStateError):  # it is open; to find out, the view was brought to the log's end
            await registry.get_manifest_bytes(package_id)
        pages = all_pages(lambda cursor: registry.list_files(package_id, limit=MAX_PAGE, cursor=cursor))
        return {file.relative_path: file async for page in pages for file in page.items}
    except UnavailableError as error:
        raise UnavailableError(f"what the interrupted push sent cannot be listed now: {error.detail}") from error


async def _compare(file: TreeFile, known: File) -> None:
    same = known.size_bytes == file.stamp.size_bytes
    if not same or await FileSource(file.path, file.stamp).blake3() != known.blake3:
        raise ConflictError(f"{file.relative_path!r} is not what the interrupted push has sent")
