"""The guard of a checkpoint: whether the log is still the one that the view was folded from, before anything is added.

The log's identity tells another log. A log that was restored from an older copy keeps its identity; it ends before the
checkpoint, or, once it was written on, holds another record where the view folded its last one. Both are refused: what
would be folded has another past than what the view holds. Nothing resets by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import aclosing

from services.errors import CorruptError
from services.log.port import Log, Record
from services.log.position import Position
from services.views.checkpoints import Checkpoint, LastRecord


async def check_continues(
    log: Log, name: str, checkpoint: Checkpoint, partitions: Iterable[int], *, end: Position | None = None
) -> None:
    """Return if the log goes on, in these partitions, from what the view `name` has folded; reads a record of each.

    `end` is the log's, from after the checkpoint; without it the log is asked. Raises CorruptError, which names the
    replay that would accept the log as it is; UnavailableError.
    """
    wanted = sorted(set(partitions))
    offsets = {p: checkpoint.position.offsets[p] for p in wanted if p in checkpoint.position.offsets}
    check_within(Position(checkpoint.position.log, offsets), end or await log.end(), name)
    last = {p: checkpoint.last[p] for p in wanted if p in checkpoint.last}
    if not last:
        return
    try:
        found = await _records_at(log, {p: record.offset for p, record in last.items()})
    except CorruptError as error:
        raise CorruptError(f"the view {name} cannot go on: {error.detail}. {_mend(name)}") from error
    for partition, record in last.items():
        if partition not in found or LastRecord.of(found[partition]) != record:
            raise CorruptError(
                f"the view {name} folded a record at offset {record.offset} of partition {partition} that the log does "
                f"not hold any more: it was restored from an older copy and written on. {_mend(name)}"
            )


def check_within(position: Position, end: Position, name: str) -> None:
    """Raise CorruptError when a view stands beyond the log's end: the log has lost what the view has seen."""
    for partition, offset in position.offsets.items():
        if offset > end.offsets.get(partition, 0):
            raise CorruptError(
                f"the view {name} stands at offset {offset} of partition {partition}, beyond the log's end at "
                f"{end.offsets.get(partition, 0)}: the log was truncated or restored from an older copy. {_mend(name)}"
            )


def _mend(name: str) -> str:
    return f"Bring the whole log back, or accept the loss and fold again with `artifact-store replay {name}`"


async def _records_at(log: Log, offsets: dict[int, int]) -> dict[int, Record]:
    """The records at these offsets, by partition, where there are any."""
    found: dict[int, Record] = {}
    batches = log.scan(offsets, {p: offset + 1 for p, offset in offsets.items()})
    async with aclosing(batches):
        async for batch in batches:
            found |= {record.partition: record for record in batch.records}
    return found
