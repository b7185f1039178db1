"""Copies a log, record by record, into another one with the same number of partitions; and compares the two.

A copy keeps partitions, keys, values, headers, times and order, and so all content of the log, administrative records
included. Offsets change, because transactions take offsets too. The progress of a copy is not stored: the target's
content shows it, which must be the beginning of the source.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from uuid import UUID

from artifact_store.errors import ConfigurationError, CorruptError, NotFoundError
from schemas.codec import UndecodableEventError, decode
from services.archive.chains import Follower, PartitionChain, by_all, came_again, partition_chains, scanned
from services.archive.export import Progress, Tell
from services.archive.load import Batches
from services.log.port import Log, LogFiller, Record
from services.verify.notes import Notes

Place = tuple[int, int]
"""Partition and offset."""

_TELL_EVERY = 1_000


@dataclass(frozen=True, slots=True)
class Copied:
    """The result of a copy: how many records the target holds, and how many of them were there before."""

    log: UUID
    records: int
    resumed: int
    skipped: int


async def copy_log(
    source: Log,
    target: Log,
    filler: LogFiller,
    *,
    skip: Collection[Place] = (),
    progress: Tell = lambda _: None,
) -> Copied:
    """Copy the records that the source has now to the target, which `filler` fills, except those to `skip`.

    The target is created when it is missing. It must be empty, or hold the beginning of the same copy: then the copy
    continues, and each record is in the target once, however often the copy was interrupted. In the end the target is
    read back.

    Raises:
        ConfigurationError: both are one log, their numbers of partitions differ, or the target could lose events.
        NotFoundError: a record to skip does not exist. CorruptError: the target holds something else. Nothing was
            appended.
        ConflictError: somebody writes to the target.
        UnavailableError: call again with the same arguments to continue.
    """
    end = await source.end()
    for partition, offset in skip:
        await _require_record(source, partition, offset, end.offsets.get(partition, 0))
    await target.migrate()
    await _require_pair(source, target)
    await filler.begin()
    there = await partition_chains(target, by_all, headers=True)
    starts = await _matched(source, end.offsets, there, skip)
    total = sum(end.offsets.values()) - sum(starts.values())
    waiting, copied = Batches(filler), 0
    whole = {p: PartitionChain(chain.count, chain.digest) for p, chain in there.items()}
    async for record in scanned(source, end.offsets, starts=starts, headers=True):
        if (record.partition, record.offset) in skip:
            continue
        whole[record.partition].add(by_all(record), record.offset)
        await waiting.add(record.partition, record)
        copied += 1
        if copied % _TELL_EVERY == 0:
            progress(Progress("copying", copied, total))
    await waiting.flush()
    await filler.settle()
    progress(Progress("reading back", 0))
    for p, chain in (await partition_chains(target, by_all, headers=True)).items():
        if not chain.has_same(whole[p]):
            raise CorruptError(f"partition {p} of the target does not hold what was copied: somebody else wrote to it")
    resumed = sum(chain.count for chain in there.values())
    return Copied(await target.identity(), resumed + copied, resumed, len(skip))


async def _require_record(log: Log, partition: int, offset: int, end: int) -> None:
    there = scanned(log, {partition: offset + 1}, starts={partition: offset})
    if offset >= end or not [record async for record in there]:
        raise NotFoundError(
            f"the source has no record at offset {offset} of partition {partition} that could be skipped"
        )


async def _require_pair(original: Log, copy: Log) -> None:
    if await original.identity() == await copy.identity():
        raise ConfigurationError("a log is not a copy of itself: name two logs")
    partitions, others = await original.partitions(), await copy.partitions()
    if partitions != others:
        raise ConfigurationError(
            f"the one log has {partitions} partitions, the other {others}: a copy has as many as its original; "
            "`artifact-store log export` and `log import` bring events into a log of another number"
        )


async def _matched(
    source: Log, ends: Mapping[int, int], there: dict[int, PartitionChain], skip: Collection[Place]
) -> dict[int, int]:
    """By partition, the source's offset after the records that the target holds. Raises CorruptError if the target
    holds something else."""
    starts = dict.fromkeys(ends, 0)
    left = sum(chain.count for chain in there.values())
    if not left:
        return starts
    follower = Follower(there, "the target")
    async with aclosing(scanned(source, ends, headers=True)) as records:
        async for record in records:
            if (record.partition, record.offset) in skip:
                continue
            if follower.covers(record.partition, by_all(record), record.offset):
                starts[record.partition] = record.offset + 1
                left -= 1
                if not left:
                    break
    follower.finish()
    return starts


@dataclass(frozen=True, slots=True)
class Comparison:
    """How many records the original has, how many of them the copy lacks at its end, and how many it repeats."""

    records: int
    missing: int
    repeated: int


async def compare_logs(original: Log, copy: Log, *, skip: Collection[Place] = ()) -> Comparison:
    """Check that in each partition the copy is a beginning of the original: keys, values, headers, times and order.

    Repeated events, which mirrors write after a restart, are skipped in both, as every reader does, and counted in the
    copy. Records of the original in `skip` were left out of the copy. Changes nothing.

    Raises:
        CorruptError: they differ; names the first partition that differs, and where.
        NotFoundError: a record to skip does not exist.
        ConfigurationError: the two cannot be original and copy.
        UnavailableError.
    """
    await _require_pair(original, copy)
    ends = (await original.end()).offsets
    for partition, offset in skip:
        await _require_record(original, partition, offset, ends.get(partition, 0))
    there = {p: PartitionChain() for p in range(await copy.partitions())}
    repeated = 0
    copy_end = (await copy.end()).offsets
    with Notes() as notes:
        async for record in scanned(copy, copy_end, headers=True):
            if _came_again(notes, record):
                repeated += 1
            else:
                there[record.partition].add(by_all(record), record.offset)
    follower = Follower(there, "the copy")
    with Notes() as notes:
        async for record in scanned(original, ends, headers=True):
            left_out = (record.partition, record.offset) in skip
            if not left_out and not _came_again(notes, record):
                follower.covers(record.partition, by_all(record), record.offset)
    follower.finish()
    records = sum(chain.count for chain in follower.seen.values())
    return Comparison(records, records - sum(chain.count for chain in there.values()), repeated)


def _came_again(notes: Notes, record: Record) -> bool:
    try:
        return came_again(notes, decode(record.value))
    except UndecodableEventError:
        return False
