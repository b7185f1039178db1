"""Push: a file or tree becomes a package, small files in batches, large ones alone, resumable, into any registry.

Everything that can be known beforehand is checked before the package is created: names, kinds of files, links.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from services.blobs.port import Declared
from services.bundle import HeldFiles, NamedFile
from services.client.batches import Batch, batches, hold
from services.client.push_state import PushState
from services.client.sources import BodySource, BytesSource, CountedSource, FileSource
from services.client.transfers import DEFAULT_CONCURRENCY, NoProgress, TransferProgress, at_once
from services.client.tree import TreeFile, walk
from services.core.commands import Acknowledgement
from services.core.content_address import ContentAddress
from services.core.paths import NONE_UNPORTABLE, PathPair, Unportable
from services.errors import (
    AnswerExpiredError,
    CommandReusedError,
    ConflictError,
    CorruptError,
    IllegalPackageStateError,
    RejectedError,
    UnavailableError,
    UnknownContentError,
)
from services.registry import Registry
from services.streams import CHUNK_BYTES
from services.threads import to_its_end
from services.views.models import MAX_PAGE, File, all_pages

_BATCHES_AT_ONCE = 4
"""So many batches are in memory at a time, of 8 MiB at most each, and as much again on their way."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push made. `sequence` is that of the package's last event; `size_bytes` counts every file.

    `unportable_count` and `unportable_paths` are those of the finalization's `Acknowledgement`.
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
    finalize: bool = True,
    concurrency: int = DEFAULT_CONCURRENCY,
    state: PushState | None = None,
    progress: TransferProgress | None = None,
) -> Pushed:
    """Create a package, send what lies at `path` and finalize it. Memory is bounded by `concurrency` chunks of 1 MiB.

    Small files go many at a time, and what the store holds already is named instead of sent.
    With the `state` of an interrupted push it goes on there: what the package holds already is compared, not sent. For
    that the registry's view has to be there.

    Raises:
        InvalidPathError, InvalidRequestError: something at `path` cannot be pushed; nothing was created.
        ContentMismatchError: a file changed while it was read.
        ConflictError, CommandReusedError: what was interrupted was another tree than is there now.
        CorruptError: what arrived is not what was sent.
        What the operations of `Registry` raise; the package stays open then, and the push can be resumed.
    """
    told = progress or NoProgress()
    current = state or PushState(uuid4(), resumed=False, kept=False)
    files = await asyncio.to_thread(walk, path)
    told.expect(len(files), sum(file.stamp.size_bytes for file in files))
    current.began = True  # from here on a lost answer may hide a package
    about = (name, producer, subject, retention_class, actor, metadata or {})
    try:
        created = await registry.create(*about, command_id=current.command_id("create"))
        package_id, last = created.package_id, created.sequence
    except AnswerExpiredError as error:
        if not current.resumed:
            raise
        package_id, last = UUID(str(error.facts["package_id"])), 1  # finalized long ago: all that is left is to compare
    except RejectedError:
        current.began = current.resumed
        raise
    present = await _present(registry, package_id) if current.resumed else {}
    gone = present.keys() - {file.relative_path for file in files}
    if gone:
        raise ConflictError(f"the interrupted push has sent {min(gone)!r}, which is not there any more")

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
        if current.resumed and last != len(files) + 2:  # an event of the creation, one a file, one of this
            raise CorruptError(
                f"package {package_id} was frozen with {last - 2:,} files where the tree has {len(files):,}: "
                "something that an earlier run had sent arrived after it was gone from the tree"
            )
    elif present:
        last = max(last, len(files) + 1)  # one event a file, after the one of the creation
    current.done = True
    size_bytes = sum(file.stamp.size_bytes for file in files)
    return Pushed(package_id, manifest, last, len(files), size_bytes, *unportable)


async def _finalize(
    registry: Registry, package_id: UUID, actor: str, state: PushState
) -> tuple[ContentAddress | None, int, Unportable]:
    """The package's manifest, its last event's sequence, and what cannot be unpacked everywhere."""
    try:
        done = await registry.finalize(package_id, actor, command_id=state.command_id("finalize"))
    except AnswerExpiredError:
        if not state.resumed:
            raise
        # The interrupted push got as far as this. All files were compared, so the package is what was to be made.
        package = await registry.get_package(package_id)
        return package.manifest_digest, package.last_event_sequence, NONE_UNPORTABLE
    manifest = None if done.manifest_digest is None else ContentAddress.of_digest(done.manifest_digest)
    return manifest, done.sequence, Unportable(done.unportable_count, done.unportable_paths)


class _Sender:
    """Brings files and batches of them into one package; what is stored already is named, not sent."""

    def __init__(
        self, registry: Registry, package_id: UUID, actor: str, state: PushState, told: TransferProgress
    ) -> None:
        self._registry = registry
        self._package_id = package_id
        self._actor = actor
        self._state = state
        self._told = told
        self._turns = asyncio.Semaphore(_BATCHES_AT_ONCE)

    async def send(self, item: Batch | TreeFile) -> int:
        """The sequence of its last event."""
        try:
            if isinstance(item, TreeFile):
                return await self._send_file(item)
            async with self._turns:
                return await self._send_batch(item)
        except CommandReusedError:
            what = repr(item.relative_path) if isinstance(item, TreeFile) else str(item)
            raise CommandReusedError(f"{what} is not what the interrupted push has sent") from None

    async def _send_batch(self, batch: Batch) -> int:
        held = await to_its_end(partial(hold, batch))
        command = self._state.command_id(batch.step)
        done = await self._name(held.pack, held.named, command)
        if done is None:
            bundle = HeldFiles(held.files)
            done = await self._registry.ingest_files(self._package_id, bundle, self._actor, command_id=command)
        for file, ingested in zip(held.named, done.files, strict=True):
            if file.blake3 != ingested.blake3:
                raise CorruptError(f"{file.relative_path!r} arrived as other bytes than were sent; do not finalize")
        for sent in batch.files:
            self._told.advance(sent.stamp.size_bytes)
            self._told.finish_file()
        return done.sequence

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
        """Name the files instead of sending them, if the blob that holds them is stored; None when it is not."""
        if not await self._registry.known_blobs([blob]):
            return None
        try:
            return await self._registry.ingest_named(self._package_id, files, self._actor, command_id=command)
        except UnknownContentError:  # it was there and is damaged, or just going away
            return None


async def _source(file: TreeFile) -> tuple[BodySource, bytes]:
    """The file's bytes and their BLAKE3, so that it goes before them; what fits into memory is read once for both."""
    source = FileSource(file.path, file.stamp)
    if file.stamp.size_bytes > CHUNK_BYTES:
        return source, await source.blake3()
    whole = BytesSource(await source.read_whole())
    return whole, whole.digest


async def _present(registry: Registry, package_id: UUID) -> Mapping[str, File]:
    """What the package holds by now, whole.

    Files that are missed here would be sent once more in other batches, which are other commands, and one that is not
    in the tree any more would stay in the package. Raises UnavailableError when that cannot be known.
    """
    try:
        with suppress(IllegalPackageStateError):  # it is open: to know that, the view was brought to the log's end
            await registry.get_manifest_bytes(package_id)
        pages = all_pages(lambda cursor: registry.list_files(package_id, limit=MAX_PAGE, cursor=cursor))
        return {file.relative_path: file async for page in pages for file in page.items}
    except UnavailableError as error:
        raise UnavailableError(f"what the interrupted push has sent cannot be listed now: {error.detail}") from error


async def _compare(file: TreeFile, known: File) -> None:
    same = known.size_bytes == file.stamp.size_bytes
    if not same or await FileSource(file.path, file.stamp).blake3() != known.blake3:
        raise ConflictError(f"{file.relative_path!r} is not what the interrupted push has sent")
