"""Snapshots: copies of the partitions' state files in the blob store, for a writer that begins on an empty disk.

A snapshot is a folder of named objects, `snapshots/<log>/<partition>/<position>-<format>-<token>/`: the file in parts,
and finally `index`, which completes it and has the parts' digests. The newest two of a partition that this release can
use are kept. An unusable snapshot is skipped: the log has everything. Parts are not compressed: they are mostly
digests, and zlib takes five times as long as everything else to halve their size.

Beside each snapshot lies a witness, `snapshots/witnesses/<topic>/<partition>/<position>-<time>-<log>-<digest>`, whose
name identifies the state's last record. It shows a writer on any machine that the log lost that record, even if the
topic was created again and the log is another one. A writer whose own file proves a loss stores a witness as well.

Others who may write to the bucket must not decide what a writer trusts. With a key, indexes and witnesses have a tag,
BLAKE3 keyed with it. An object with a missing or wrong tag is ignored.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event as Flag
from typing import Any, TypeVar
from uuid import UUID

from blake3 import blake3

from artifact_store.errors import ArtifactStoreError, UnavailableError
from services.log.port import PartitionNotOwnedError, SnapshotStore
from services.log.state.loss import SNAPSHOT, Witness
from services.log.state.state_file import FORMAT, Anchor, LogPartition, StateFile, copy_file
from services.runtime.file_system import PRIVATE_FOLDER, private_file

SNAPSHOT_OFFSETS = 50_000
"""A snapshot is made when the log has advanced by this many offsets since the last one."""

SNAPSHOT_SECONDS = 60.0
"""The least time between two snapshots."""

SNAPSHOT_SHARE = 0.1
"""The largest share of the time that making snapshots may take."""

CLOSING_OFFSETS = 10_000
"""On a clean close, a snapshot is made after this many offsets already; fewer are read in about a second."""

KEPT = 2
PART_BYTES = 4 << 20

_FORMAT = 1
_UNNAMED_FORMAT = 4
"""The format of state files in snapshots whose names have no format."""
_FOLDER = re.compile(r"([0-9]{1,20})-(?:([0-9]{1,9})-)?[^-/]+")
_WITNESS = re.compile(r"(([0-9]{20})-([0-9]{20})-([0-9a-f]{32})-([0-9a-f]{64}))(?:-([0-9a-f]{64}))?")
_ANSWER_SECONDS = 60.0
_LIST_SECONDS = 10.0
"""How long a take-over waits for the store's list. Without an answer it continues, because the log has everything."""
_LOOK_SECONDS = 0.1
_TEMPORARY = "snapshot-"
_LEFT_SECONDS = 3_600.0

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


class SnapshotError(UnavailableError):
    """The snapshot is incomplete or wrong, or the store cannot be reached."""


@dataclass(frozen=True, slots=True, order=True)
class Snapshot:
    """A snapshot in the store: where it ends in the log, and the prefix of its objects."""

    next_offset: int
    prefix: str
    format: int
    """The format of the state file in it."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The store's objects of a partition: complete snapshots of its log, and witnesses, which may be of other logs."""

    snapshots: Sequence[Snapshot] = ()
    witnesses: Sequence[Witness] = ()


@dataclass(slots=True)
class _Progress:
    """The progress of a partition's last snapshot; `not_before` is a time of the monotonic clock."""

    next_offset: int = 0
    not_before: float = 0.0
    running: Future[None] | None = None


class Snapshots:
    """Snapshots of one log. Their work runs in a separate thread, and on the store's event loop."""

    def __init__(self, store: SnapshotStore, loop: asyncio.AbstractEventLoop, key: bytes | None = None) -> None:
        """`key` is 32 bytes that all writers share. Without it, everything in the store is trusted."""
        self._store = store
        self._key = key
        self._loop = loop
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="log-snapshot")
        self._closed = Flag()
        self._progress: dict[int, _Progress] = {}
        self._running: set[Future[None]] = set()

    def offer(self, origin: LogPartition, path: Path, next_offset: int, *, closing: bool = False) -> None:
        """Make a snapshot of the state file, which ends at `next_offset`, if it is time for one. Does not block."""
        progress = self._progress.setdefault(origin.partition, _Progress(not_before=time.monotonic()))
        new, wanted = next_offset - progress.next_offset, CLOSING_OFFSETS if closing else SNAPSHOT_OFFSETS
        busy = progress.running is not None and not progress.running.done()
        if new < wanted or self._closed.is_set():
            return
        if closing or (not busy and time.monotonic() > progress.not_before):
            what = f"no snapshot of partition {origin.partition} was made"
            progress.running = self._later(what, self._make, origin, path, progress, next_offset, wanted)

    def restored(self, partition: int, next_offset: int) -> None:
        """Note that a writer continued from the snapshot that ends there, which need not be made again."""
        self._progress[partition] = _Progress(next_offset, time.monotonic())

    def look(self, origin: LogPartition, stopping: Callable[[], bool]) -> Stored:
        """What the store has of the partition.

        Blocks for at most some seconds. Raises SnapshotError; PartitionNotOwnedError if `stopping` became true.
        """
        return self._result(self._begin(self._look(origin)), stopping, _LIST_SECONDS)

    def witness_of(
        self, snapshot: Snapshot, origin: LogPartition, folder: Path, stopping: Callable[[], bool]
    ) -> Witness:
        """The witness for a snapshot of an older release, which wrote none: fetches the snapshot for its last record.

        Blocks. Raises SnapshotError, StateFileError, PartitionNotOwnedError.
        """
        try:
            folder.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
            with TemporaryDirectory(dir=folder, prefix=_TEMPORARY) as temporary:
                copy = Path(temporary) / "copy.db"
                self.fetch(snapshot, origin, copy, stopping)
                file = StateFile.open(copy, origin)
                file.close()
        except OSError as error:
            raise SnapshotError(f"it cannot be written to the disk: {error.strerror}") from error
        return Witness(SNAPSHOT, origin.identity, file.anchor, snapshot.prefix)

    def testify(self, origin: LogPartition, witnesses: Iterable[Witness]) -> None:
        """Store these witnesses, so that writers on other machines find them. Does not block."""
        for witness in witnesses:
            self._later(f"no witness of partition {origin.partition} was left", self._put_witness, origin, witness)

    def forget(self, origin: LogPartition, witnesses: Iterable[Witness]) -> None:
        """Remove these witnesses with the snapshots that they belong to. Does not block."""
        for witness in witnesses:
            self._later(
                f"no witness of partition {origin.partition} was removed", self._remove_witness, origin, witness
            )

    def fetch(self, snapshot: Snapshot, origin: LogPartition, target: Path, stopping: Callable[[], bool]) -> None:
        """Write the snapshot's file to `target`; blocks. Raises SnapshotError, PartitionNotOwnedError."""
        index = self._index(snapshot, origin, stopping)
        try:
            digests = [part["blake3"] for part in index["parts"]]
            with private_file(target).open("wb") as file:
                coming = self._begin(self._store.get_object(_part_key(snapshot, 0)))
                for number, digest in enumerate(digests, start=1):
                    data = self._result(coming, stopping)
                    if number < len(digests):  # the next part is fetched while this one is checked
                        coming = self._begin(self._store.get_object(_part_key(snapshot, number)))
                    if data is None or blake3(data).hexdigest() != digest:
                        raise SnapshotError(f"part {number} is missing or damaged")
                    file.write(data)
                if file.tell() != index["size"]:
                    raise SnapshotError("it has another size than it should")
        except (KeyError, TypeError) as error:
            raise SnapshotError(f"it cannot be read ({type(error).__name__})") from error
        except OSError as error:
            raise SnapshotError(f"it cannot be written to the disk: {error.strerror}") from error

    def close(self, seconds: float) -> None:
        """Wait at most `seconds` for running snapshots, then give them up; blocks."""
        wait(list(self._running), seconds)
        self._closed.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _make(self, origin: LogPartition, path: Path, progress: _Progress, stands: int, wanted: int) -> None:
        """Make a snapshot, unless one exists less than `wanted` offsets before the file's position `stands`.

        It may have been made meanwhile, or by another process. A snapshot beyond that position comes from a successor,
        or has records that were lost.
        """
        began = time.monotonic()
        try:
            if not progress.next_offset:
                whole = self._whole(origin)
                progress.next_offset = max(
                    (found.next_offset for found in whole if found.next_offset <= stands), default=0
                )
            if progress.next_offset > stands - wanted:
                return
            _remove_leftovers(path.parent)
            with TemporaryDirectory(dir=path.parent, prefix=_TEMPORARY) as folder:
                copy = Path(folder) / "copy.db"
                copy_file(path, copy)
                file = StateFile.open(copy, origin)
                file.close()
                self._upload(copy, origin, file.anchor)
            next_offset = file.anchor.next_offset
            progress.next_offset = next_offset
            took = time.monotonic() - began
            _LOG.info("a snapshot of partition %d at offset %d took %.2f s", origin.partition, next_offset, took)
            self._prune(origin, next_offset)
        finally:
            ended = time.monotonic()
            progress.not_before = max(began + SNAPSHOT_SECONDS, ended + (ended - began) / SNAPSHOT_SHARE)

    def _later(self, failed: str, work: Callable[..., None], *arguments: Any) -> Future[None]:
        """Do some work in the snapshots' thread. Failures are logged; a later call tries again."""

        def do() -> None:
            try:
                work(*arguments)
            except (ArtifactStoreError, OSError) as error:
                text = error.detail if isinstance(error, ArtifactStoreError) else str(error.strerror)
                _LOG.warning("%s: %s", failed, text)
            except Exception:  # noqa: BLE001 - nobody would hear of it; the cause is logged whole
                _LOG.exception("%s", failed)

        running = self._thread.submit(do)
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        return running

    def _upload(self, copy: Path, origin: LogPartition, anchor: Anchor) -> None:
        next_offset = anchor.next_offset
        folder = f"{next_offset:020d}-{FORMAT}-{secrets.token_hex(4)}"
        snapshot = Snapshot(next_offset, f"{_prefix(origin)}{folder}/", FORMAT)
        parts: list[dict[str, str]] = []
        size = 0
        with copy.open("rb") as source:
            while piece := source.read(PART_BYTES):
                self._wait(self._store.put_object(_part_key(snapshot, len(parts)), piece))
                parts.append({"blake3": blake3(piece).hexdigest()})
                size += len(piece)
        index: dict[str, object] = {**_identity(origin), "position": next_offset, "size": size, "parts": parts}
        if self._key is not None:
            index["tag"] = _tag(self._key, index)
        self._put_witness(origin, Witness(SNAPSHOT, origin.identity, anchor, snapshot.prefix))
        self._wait(self._store.put_object(f"{snapshot.prefix}index", json.dumps(index).encode()))

    def _put_witness(self, origin: LogPartition, witness: Witness) -> None:
        about = {"log": str(witness.log), "topic": origin.topic, "partition": origin.partition, "from": witness.where}
        self._wait(self._store.put_object(self._witness_key(origin, witness), json.dumps(about).encode()))

    def _remove_witness(self, origin: LogPartition, witness: Witness) -> None:
        """Remove the witness last: while it exists, the rest of its snapshot need not be fetched."""
        of_its_log = replace(origin, identity=witness.log)
        for key in self._wait(self._store.list_objects(_prefix(of_its_log))):
            found = _snapshot_of(key, of_its_log)
            if found is not None and found.next_offset == witness.anchor.next_offset:
                self._wait(self._store.delete_object(key))
        self._wait(self._store.delete_object(self._witness_key(origin, witness)))

    def _prune(self, origin: LogPartition, next_offset: int) -> None:
        """Remove snapshots older than the newest KEPT ones that end at `next_offset` or before.

        Newer ones may still be incomplete. Snapshots of a newer format are left to the releases that know it.
        """
        whole = sorted(found for found in self._whole(origin) if found.next_offset <= next_offset)
        if len(whole) < KEPT:
            return
        oldest_kept = whole[-KEPT]
        pruned: set[int] = set()
        for key in sorted(
            self._wait(self._store.list_objects(_prefix(origin))), key=lambda key: not key.endswith("/index")
        ):
            found = _snapshot_of(key, origin)
            if found is not None and found.format <= FORMAT and found < oldest_kept:
                self._wait(self._store.delete_object(key))
                pruned.add(found.next_offset)
        for key in self._wait(self._store.list_objects(_witnesses(origin))):
            witness = self._witness_of(origin, key)
            if witness is not None and witness.log == origin.identity and witness.anchor.next_offset in pruned:
                self._wait(self._store.delete_object(key))

    def _whole(self, origin: LogPartition) -> list[Snapshot]:
        """The complete snapshots in this release's format."""
        keys = self._wait(self._store.list_objects(_prefix(origin)))
        return [found for found in _whole_of(keys, origin) if found.format == FORMAT]

    async def _look(self, origin: LogPartition) -> Stored:
        keys, witnesses = await asyncio.gather(
            self._store.list_objects(_prefix(origin)), self._store.list_objects(_witnesses(origin))
        )
        read = [self._witness_of(origin, key) for key in witnesses]
        return Stored(_whole_of(keys, origin), [witness for witness in read if witness is not None])

    def _index(self, snapshot: Snapshot, origin: LogPartition, stopping: Callable[[], bool]) -> dict[str, Any]:
        data = self._result(self._begin(self._store.get_object(f"{snapshot.prefix}index")), stopping)
        return read_index(data or b"", {**_identity(origin), "position": snapshot.next_offset}, self._key)

    def _witness_key(self, origin: LogPartition, witness: Witness) -> str:
        anchor = witness.anchor
        name = f"{anchor.next_offset:020d}-{anchor.last_created_at:020d}-{witness.log.hex}-{anchor.digest.hex()}"
        return f"{_witnesses(origin)}{name}" + (f"-{_tag(self._key, [*_place(origin), name])}" if self._key else "")

    def _witness_of(self, origin: LogPartition, key: str) -> Witness | None:
        """The witness in this object; None for a foreign object."""
        found = _WITNESS.fullmatch(key.rpartition("/")[2])
        if found is None:
            return None
        if self._key and not hmac.compare_digest(found[6] or "", _tag(self._key, [*_place(origin), found[1]])):
            return None
        anchor = Anchor(int(found[2]), bytes.fromhex(found[5]), int(found[3]))
        return Witness(SNAPSHOT, UUID(found[4]), anchor, key)

    def _wait(self, act: Coroutine[Any, Any, _T]) -> _T:
        """Run `act` on the loop, for the snapshots' thread. Raises SnapshotError, PartitionNotOwnedError at the end."""
        return self._result(self._begin(act), self._closed.is_set)

    def _begin(self, act: Coroutine[Any, Any, _T]) -> Future[_T]:
        try:
            return asyncio.run_coroutine_threadsafe(act, self._loop)
        except RuntimeError:  # the loop is closed
            act.close()
            raise SnapshotError("the process ends") from None

    def _result(self, running: Future[_T], stopping: Callable[[], bool], seconds: float = _ANSWER_SECONDS) -> _T:
        deadline = time.monotonic() + seconds
        while not running.done() and not wait([running], _LOOK_SECONDS).done:
            if stopping():
                running.cancel()
                raise PartitionNotOwnedError("the partition was handed over meanwhile")
            if time.monotonic() > deadline:
                running.cancel()
                raise SnapshotError("the blob store gave no answer in time")
        try:
            return running.result()
        except CancelledError:
            raise SnapshotError("the process ends") from None
        except ArtifactStoreError as error:
            raise SnapshotError(error.detail) from error
        # Any failure of the blob store is harmless, because the log has everything.
        except Exception as error:
            raise SnapshotError(f"the blob store failed ({type(error).__name__})") from error


def _identity(origin: LogPartition) -> dict[str, object]:
    return {"format": _FORMAT, "log": str(origin.identity), "topic": origin.topic, "partition": origin.partition}


def read_index(data: bytes, expected: Mapping[str, object], key: bytes | None) -> dict[str, Any]:
    """A snapshot's index, with a tag of this `key` and the `expected` content. Raises SnapshotError.

    Anyone who may write to the bucket may have written it.
    """
    try:
        index = json.loads(data)
        if not isinstance(index, dict) or {name: index.get(name) for name in expected} != expected:
            raise SnapshotError("its index is of another partition, log or format")
        if key is not None:
            tag = str(index.pop("tag", "")).encode(errors="surrogatepass")
            if not hmac.compare_digest(tag, _tag(key, index).encode()):
                raise SnapshotError("its tag is not one of this deployment's key, ARTIFACT_STORE_STATE_KEY")
    except (ValueError, RecursionError):
        raise SnapshotError("its index cannot be read") from None
    return index


def _place(origin: LogPartition) -> list[object]:
    return [origin.topic, origin.partition]


def _tag(key: bytes, what: object) -> str:
    return blake3(json.dumps(what, sort_keys=True).encode(), key=key).hexdigest()


def _prefix(origin: LogPartition) -> str:
    return f"snapshots/{origin.identity}/{origin.partition}/"


def _part_key(snapshot: Snapshot, number: int) -> str:
    return f"{snapshot.prefix}{number:06d}"


def _snapshot_of(key: str, origin: LogPartition) -> Snapshot | None:
    """The snapshot that the object belongs to; None for a foreign object."""
    folder, _, _ = key.removeprefix(_prefix(origin)).partition("/")
    found = _FOLDER.fullmatch(folder)
    if found is None:
        return None
    return Snapshot(int(found[1]), f"{_prefix(origin)}{folder}/", int(found[2] or _UNNAMED_FORMAT))


def _whole_of(keys: Iterable[str], origin: LogPartition) -> list[Snapshot]:
    found = [_snapshot_of(key, origin) for key in keys if key.endswith("/index")]
    return [snapshot for snapshot in found if snapshot is not None]


def _witnesses(origin: LogPartition) -> str:
    return f"snapshots/witnesses/{origin.topic}/{origin.partition}/"


def _remove_leftovers(folder: Path) -> None:
    """Delete the copies that killed processes have left."""
    limit = time.time() - _LEFT_SECONDS
    for left in folder.glob(f"{_TEMPORARY}*"):
        if left.is_dir() and left.stat().st_mtime < limit:
            for file in left.iterdir():
                file.unlink(missing_ok=True)
            left.rmdir()
