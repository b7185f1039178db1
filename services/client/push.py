"""Push: a file or tree becomes a package, many files at a time, resumable, into any registry.

Everything that can be known beforehand is checked before the package is created: names, kinds of files, links.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from services.blobs.port import Declared
from services.client.push_state import PushState
from services.client.sources import BodySource, BytesSource, CountedSource, FileSource
from services.client.transfers import DEFAULT_CONCURRENCY, NoProgress, TransferProgress, at_once
from services.client.tree import TreeFile, walk
from services.core.content_address import ContentAddress
from services.errors import CommandReusedError, ConflictError, RejectedError, UnavailableError
from services.registry import Registry
from services.streams import CHUNK_BYTES
from services.views.models import MAX_PAGE, File


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push made. `sequence` is that of the package's last event; `size_bytes` counts every file."""

    package_id: UUID
    manifest_digest: ContentAddress | None
    sequence: int
    files: int
    size_bytes: int


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

    With the `state` of an interrupted push it goes on there: what the package holds already is compared, not sent.

    Raises:
        InvalidPathError, InvalidRequestError: something at `path` cannot be pushed; nothing was created.
        ContentMismatchError: a file changed while it was read.
        ConflictError, CommandReusedError: what was interrupted was another tree than is there now.
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
    except RejectedError:
        current.began = current.resumed
        raise
    present = await _present(registry, created.package_id) if current.resumed else {}
    gone = present.keys() - {file.relative_path for file in files}
    if gone:
        raise ConflictError(f"the interrupted push has sent {min(gone)!r}, which is not there any more")
    last = created.sequence

    async def send(file: TreeFile) -> None:
        nonlocal last
        known = present.get(file.relative_path)
        if known is not None:
            await _compare(file, known)
            told.advance(file.stamp.size_bytes)
        else:
            source = CountedSource(await _source(file), told.advance)
            last = max(last, await _ingest(registry, created.package_id, file, source, actor, current))
        told.finish_file()

    await at_once(files, concurrency, send)
    manifest = None
    if finalize:
        done = await registry.finalize(created.package_id, actor, command_id=current.command_id("finalize"))
        last = done.sequence
        manifest = None if done.manifest_digest is None else ContentAddress.of_digest(done.manifest_digest)
    elif present:
        last = max(last, len(files) + 1)  # one event a file, after the one of the creation
    current.done = True
    return Pushed(created.package_id, manifest, last, len(files), sum(file.stamp.size_bytes for file in files))


async def _ingest(
    registry: Registry, package_id: UUID, file: TreeFile, source: BodySource, actor: str, state: PushState
) -> int:
    try:
        done = await registry.ingest(
            package_id,
            file.relative_path,
            file.media_type,
            source,
            actor,
            declared=Declared(size_bytes=file.stamp.size_bytes),
            command_id=state.command_id(f"file:{file.relative_path}"),
        )
    except CommandReusedError:
        raise CommandReusedError(f"{file.relative_path!r} is not what the interrupted push has sent") from None
    return done.sequence


async def _source(file: TreeFile) -> BodySource:
    """Small files are read at once, so that their digest goes before them; large ones are read while they are sent."""
    source = FileSource(file.path, file.stamp)
    return BytesSource(await source.read_whole()) if file.stamp.size_bytes <= CHUNK_BYTES else source


async def _present(registry: Registry, package_id: UUID) -> Mapping[str, File]:
    """What the package holds by its view; nothing when the view is out of reach, since a repeat does no harm."""
    found: dict[str, File] = {}
    cursor = None
    try:
        while True:
            page = await registry.list_files(package_id, limit=MAX_PAGE, cursor=cursor)
            found.update((file.relative_path, file) for file in page.items)
            cursor = page.next
            if cursor is None:
                return found
    except UnavailableError:
        return {}


async def _compare(file: TreeFile, known: File) -> None:
    same = known.size_bytes == file.stamp.size_bytes
    if not same or await FileSource(file.path, file.stamp).blake3() != known.blake3:
        raise ConflictError(f"{file.relative_path!r} is not what the interrupted push has sent")
