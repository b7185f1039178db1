"""Small files of a tree in batches: read together, packed by the rule that a store follows, sent or only named.

A batch fills one pack at most, so that this end can name the pack that the batch becomes: what is stored already is
then named instead of sent. The same tree makes the same batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from blake3 import blake3

from services.blobs.packs import PACK_BYTES, PackLayout
from services.bundle import SMALL_FILE_BYTES, NamedFile, SmallFile
from services.client.sources import FileSource
from services.client.tree import TreeFile

BATCH_FILES = 1_000
"""Most files of a batch: as many events as a transaction of the log takes together with others."""

FEWEST_FILES = 8
"""Fewer go alone, all at the same time: each is then a blob by itself, which is shared and healed by itself."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Some small files that go together."""

    files: Sequence[TreeFile]

    def __str__(self) -> str:
        return f"one of the files from {self.files[0].relative_path!r} to {self.files[-1].relative_path!r}"

    @property
    def step(self) -> str:
        """The name of this step of a push: that of the same files, and of no others."""
        paths = "\0".join(file.relative_path for file in self.files)
        return f"files:{blake3(paths.encode()).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Held:
    """A batch in memory: its files, and how they would be named in the pack of this BLAKE3 (32 raw bytes)."""

    files: Sequence[SmallFile]
    named: Sequence[NamedFile]
    pack: bytes


def batches(files: Iterable[TreeFile]) -> Iterator[Batch | TreeFile]:
    """The files in batches as far as they are small, and the others, in the order of the first of each."""
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
    """Read the files. Blocks. Raises ContentMismatchError: one has changed since the walk; OSError."""
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
