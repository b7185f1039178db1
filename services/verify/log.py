"""Checking the log: every event of every package in order, and that what it names is in the blob store."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from uuid import UUID

from blake3 import blake3

from schemas.digests import manifest_digest
from schemas.events import FileIngested, PackageFinalized
from services.blobs.port import BlobStore
from services.errors import CorruptError
from services.log.port import Log, RecordedEvent
from services.verify.history import PackageHistory
from services.verify.report import Report

Progress = Callable[[Report], None]

_PROGRESS_EVERY = 1000
_BLOBS_AT_ONCE = 16
_REMEMBERED_KEYS = 200_000


class LogCheck:
    """One pass over the log. `check_bytes` reads and hashes every blob as well."""

    def __init__(self, log: Log, blobs: BlobStore, report: Report, *, check_bytes: bool, progress: Progress) -> None:
        self._log = log
        self._blobs = blobs
        self._report = report
        self._check_bytes = check_bytes
        self._progress = progress
        self._histories: dict[UUID, PackageHistory] = {}
        self._last_at: dict[int, int] = {}
        self._known: set[tuple[str, int, int, bytes, bytes]] = set()

    async def run(self) -> None:
        """Read to the end as it is now. Raises UnavailableError; what is wrong with the log goes into the report."""
        waiting: set[asyncio.Task[None]] = set()
        try:
            async for event in self._log.read():
                self._follow(event, waiting)
                if len(waiting) >= _BLOBS_AT_ONCE:
                    done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
                if self._report.events % _PROGRESS_EVERY == 0:
                    self._progress(self._report)
        except CorruptError as error:
            self._report.add("undecodable", "log", f"reading stopped: {error.detail}")
        finally:
            if waiting:
                await asyncio.gather(*waiting)
        for history in self._histories.values():
            if history.open_command is not None:
                self._report.unfinished_commands += 1
                self._report.add(
                    "unfinished-command",
                    f"package {history.package_id}",
                    f"command {history.open_command[0]} waits for its retry",
                )
        self._progress(self._report)

    def _follow(self, event: RecordedEvent, waiting: set[asyncio.Task[None]]) -> None:
        report = self._report
        report.events += 1
        partition = self._log.partition_of(event.package_id)
        place = f"package {event.package_id} event {event.sequence}"
        if event.created_at < self._last_at.get(partition, 0):
            report.add("created-at", place, f"created_at decreases within partition {partition}")
        self._last_at[partition] = event.created_at
        history = self._histories.get(event.package_id)
        if history is None:
            history = self._histories[event.package_id] = PackageHistory(event.package_id)
            report.packages += 1
        claim = history.follow(event, report.add)
        match event.payload:
            case FileIngested() as file:
                report.files += 1
                receipt = file.receipt
                if receipt.backend_id != self._blobs.backend_id:
                    report.add("blob", place, f"lies in backend {receipt.backend_id!r}, which is not the one at hand")
                elif self._is_new((receipt.key, receipt.offset, receipt.length, file.blake3, file.sha256)):
                    check = self._check_blob(
                        place, receipt.key, receipt.offset, receipt.length, file.blake3, file.sha256
                    )
                    waiting.add(asyncio.create_task(check))
            case PackageFinalized(manifest_key=str() as key):
                report.manifests += 1
                if claim is not None:
                    waiting.add(asyncio.create_task(self._check_manifest(place, key, claim)))
            case PackageFinalized():
                report.manifests += 1

    def _is_new(self, claim: tuple[str, int, int, bytes, bytes]) -> bool:
        """Whether the place was not checked yet for these digests: what one event says of it vouches for no other."""
        if len(self._known) >= _REMEMBERED_KEYS:
            self._known.clear()
        before = len(self._known)
        self._known.add(claim)
        return len(self._known) > before

    async def _check_blob(self, place: str, key: str, offset: int, length: int, b3: bytes, sha256: bytes) -> None:
        size = await self._blobs.size(key)
        self._report.blobs += 1
        if size is None or size < offset + length:
            found = "is missing" if size is None else f"has {size:,} bytes, {offset + length:,} are needed"
            self._report.add("blob", place, f"blob {key} {found}")
            return
        if not self._check_bytes:
            return
        one, two = blake3(), hashlib.sha256()
        try:
            async for chunk in self._blobs.read(key, offset, length):
                one.update(chunk)
                two.update(chunk)
                self._report.bytes += len(chunk)
        except CorruptError as error:
            self._report.add("blob", place, error.detail)
            return
        if one.digest() != b3 or two.digest() != sha256:
            self._report.add("blob-bytes", place, f"blob {key} does not have the digests that were acknowledged")

    async def _check_manifest(self, place: str, key: str, expected: bytes) -> None:
        size = await self._blobs.size(key)
        self._report.blobs += 1
        if size != len(expected):
            found = "is missing" if size is None else f"has {size:,} bytes, not {len(expected):,}"
            self._report.add("manifest-blob", place, f"blob {key} {found}")
            return
        stored = b"".join([chunk async for chunk in self._blobs.read(key, 0, size)])
        if manifest_digest(stored) != manifest_digest(expected):
            self._report.add("manifest-blob", place, f"blob {key} is not the manifest that its address names")
