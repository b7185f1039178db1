"""The guard of a checkpoint: whether the log is still the one that the view was folded from, before anything is added.

The log's identity tells another log. A log that was restored from an older copy keeps its identity; it ends before the
checkpoint, or, once it was written on, holds another record where the view folded its last one. Both are refused: what
would be folded has another past than what the view holds. Nothing resets by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    position = Position(checkpoint.position.log, offsets)
    check_within(position, end or await log.end(position), name)
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


def folds_again(
    name: str, committed: Mapping[int, tuple[int, str]], stands: Position, partitions: Iterable[int]
) -> bool:
    """Whether an operator has set the group of the view `name` back to the log's start with the log's own tools.

    `committed` is what the group has, read after `stands`, where the view stands. Our commits carry metadata, and those
    tools write none. An offset that they have set to where the view stands changes nothing. An offset that is missing
    (deleted, or expired) says nothing.

    Raises CorruptError: some offsets were set, but not those of all partitions to the start. The view cannot follow:
    it cannot take one partition out of totals, and skips nothing.
    """
    set_by_others = {p: offset for p, (offset, metadata) in committed.items() if not metadata}
    foreign = {p: offset for p, offset in set_by_others.items() if offset != stands.offsets.get(p, 0)}
    if not foreign:
        return False

    def at_start(partition: int) -> bool:
        if partition in committed:
            return committed[partition] == (0, "")
        return not stands.offsets.get(partition)  # where the view has folded nothing, there may be no commit to reset

    if all(at_start(partition) for partition in partitions):
        return True
    partition, offset = min(foreign.items())
    raise CorruptError(
        f"the group of the view {name} was set to offset {offset} of partition {partition} with other tools, and the "
        f"view stands at {stands.offsets.get(partition, 0)}. Only a reset of all partitions to the earliest offset is "
        f"followed. To fold the view again, run `artifact-store replay {name}`; to go on from where it stands, delete "
        "the group's offsets"
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
