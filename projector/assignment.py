"""One membership in a projection's group: what is assigned, where each partition is read on, and batches to apply.

The view's own checkpoint says where reading begins. What is committed to the log's group is for people to see. They may
reset it to the log's start as a whole: then the view is folded again. Anything else that they set stops the projector.
A batch keeps the offsets that it was read from, so that the checkpoint's guard can tell whether it is still the next.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from uuid import UUID

from artifact_store.errors import CorruptError, PushBackError, UnavailableError
from artifact_store.position import Position
from services.log.port import Batch, Log, Record, Subscription
from services.log.records import Skips
from services.views.database import Views
from services.views.engine.checkpoints import (
    Checkpoint,
    StaleCheckpointError,
    check_continues,
    folds_again,
    live_row,
    load_checkpoint,
    require_same_log,
)
from services.views.engine.generations import reset
from services.views.engine.source import DecodedBatch, decode
from services.views.projections import Projection

logger = logging.getLogger(__name__)

_BATCH_RECORDS = 10_000
_BATCH_BYTES = 4 << 20
"""A batch ends when it has as many records or bytes as this; the last poll may go over it by what it brings."""

_POLL_RECORDS = 2_500
_FEWEST_RECORDS = 10
"""So many are asked for in one poll; fewer, when those before them were so large that more might not fit."""

_FIRST_SIZE = 16 << 10
"""What a record is taken to have before one was seen, in bytes: little in the first poll costs nothing."""

IDENTITY_SECONDS = 5.0
"""How often the log's identity and the view's generation are asked for when nothing comes."""

_RESET_SECONDS = 10.0
"""How long an assignment may wait for those who read a view that is to be folded again; the next one tries again."""


class Assignment:
    """Reads a projection's share of the log. Used by one task."""

    def __init__(
        self,
        views: Views,
        log: Log,
        projection: Projection,
        settled: Callable[[], Awaitable[None]],
    ) -> None:
        """`settled` is waited for before an assignment begins or ends: it returns when no batch is on its way into the
        view.
        """
        self._views = views
        self._log = log
        self._projection = projection
        self._settled = settled
        self._identity: UUID | None = None
        self._generation: UUID | None = None
        self._reset = False
        self._next: dict[int, int] = {}
        self._unclaimed: dict[int, int] = {}
        self._subscription: Subscription | None = None
        self._skips = Skips(log)
        self._unshown: dict[int, int] = {}
        self._usual_size = _FIRST_SIZE
        self._looked = time.monotonic()
        self._quiet_since: float | None = None

    @property
    def idle(self) -> bool:
        """Whether partitions were assigned, be it none, and nothing has come from them for IDENTITY_SECONDS.

        Before that nobody can tell: what is assigned has yet to arrive.
        """
        return self._quiet_since is not None and time.monotonic() > self._quiet_since + IDENTITY_SECONDS

    async def join(self) -> None:
        """Join the group; partitions are assigned while polling.

        Raises LogIdentityError, UnavailableError, ConfigurationError.
        """
        self._identity = await self._log.identity()
        checkpoint = await load_checkpoint(self._views, self._projection, self._identity)
        self._generation = checkpoint.generation
        self._subscription = await self._log.subscribe(self._projection.name, self._start_offsets, self._settled)

    async def next_batch(self, timeout_seconds: float) -> tuple[DecodedBatch, Checkpoint] | None:
        """Wait until there is something to apply; None when there is nothing within the time.

        With the batch comes the checkpoint that it was read from, in the partitions that the batch moves.

        Raises:
            StaleCheckpointError: what is assigned cannot be read on from here, or the view has another generation by
                now; join again.
            CorruptError: the log does not go on from what the view has folded.
            LogIdentityError: the log was made anew since the membership began.
            UnavailableError: the log or the database cannot be reached.
        """
        records: list[Record] = []
        starts: dict[int, int] = {}
        ends: dict[int, int] = {}
        size = 0
        while True:
            async with self._of_one_log():
                batch = await self._joined().poll(self._most(size), 0.0 if ends else timeout_seconds)
            self._check(batch, ends)
            if gone := ends.keys() - self._joined().assigned:  # for whoever has them now to read
                records = [record for record in records if record.partition not in gone]
                for partition in gone:
                    del starts[partition], ends[partition]
            if self._unclaimed:
                await self._claim()
            for partition, offset in batch.next_offsets.items():
                starts.setdefault(partition, self._next[partition])
                ends[partition] = self._next[partition] = offset
            records += batch.records
            if batch.records:
                brought = sum(len(record.value) for record in batch.records)
                size += brought
                self._usual_size = brought // len(batch.records)
            if not batch.next_offsets or len(records) >= _BATCH_RECORDS or size >= _BATCH_BYTES:
                break
        if not ends:
            # A client that misses that its topic was deleted and made anew may wait for minutes without a word.
            if time.monotonic() > self._looked + IDENTITY_SECONDS:
                await self._require_same_log()
                await self._require_same_generation()
            return None
        self._quiet_since = time.monotonic()
        decoded = await decode(self._log, records, self._skips, ends)
        await self._require_same_log()
        return decoded, self._checkpoint(starts)

    async def show(self, next_offsets: Mapping[int, int]) -> None:
        """Commit what the view holds to the group, with the view's generation, for the log's own tools.

        Also what could not be shown before, and where an assignment began when another went without showing it.
        """
        assigned = self._joined().assigned
        self._unshown = {p: offset for p, offset in {**self._unshown, **next_offsets}.items() if p in assigned}
        if not self._unshown:
            return
        try:
            await self._joined().commit(self._unshown, str(self._generation))
        except (UnavailableError, PushBackError) as error:  # only shown: the view has it, and it is tried again
            logger.info("%s: progress was not shown: %s", self._projection.name, error.detail)
        else:
            self._unshown = {}

    async def leave(self) -> None:
        """Leave the group at once."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.close()

    async def _start_offsets(self, partitions: Sequence[int]) -> Mapping[int, int]:
        await self._settled()
        if self._identity is None:
            raise StaleCheckpointError("asked for offsets before joining")
        checkpoint = await load_checkpoint(self._views, self._projection, self._identity)
        if checkpoint.generation != self._generation:
            self._reset = True  # partitions that are held already stand in the older generation: join anew for all
        name = self._projection.name
        if partitions:
            await check_continues(self._log, name, checkpoint, partitions)
        # Asked for after the checkpoint: what another member claims and folds meanwhile must not look like a reset.
        committed = await self._log.committed(name)
        if not self._reset and folds_again(name, committed, checkpoint.position, range(await self._log.partitions())):
            await self._begin_anew(checkpoint.generation)
        starts = {p: checkpoint.position.offsets.get(p, 0) for p in partitions}
        self._unclaimed.update({p: offset for p, offset in starts.items() if p in committed and not committed[p][1]})
        self._next.update(starts)
        self._unshown.update({p: offset for p, offset in starts.items() if committed.get(p, (0, ""))[0] != offset})
        self._quiet_since = time.monotonic()
        if starts:
            logger.info("%s: assigned partitions %s", self._projection.name, starts)
        return starts

    async def _begin_anew(self, generation: UUID) -> None:
        """Empty the view, because an operator has reset the whole group to the log's start.

        Of several members that see this one resets the view, which is still of the generation that was looked at; the
        others, and the next assignment of all of them, find a view that stands at the start. Always raises
        StaleCheckpointError.
        """
        name = self._projection.name
        logger.warning(
            "%s: the group was reset to the log's start with other tools: the view is emptied and folded again", name
        )
        await reset(self._views, self._projection, expected=generation, patience_seconds=_RESET_SECONDS)
        raise StaleCheckpointError(f"the view {name} begins anew")

    async def _claim(self) -> None:
        """Commit, under the view's generation, where reading begins in partitions whose offset somebody else has set.

        Before anything is folded there: whoever is assigned them next must not take that offset for a fresh rewind.
        """
        assigned = self._joined().assigned
        claimed = {p: offset for p, offset in self._unclaimed.items() if p in assigned}
        self._unclaimed.clear()
        if claimed:
            await self._joined().commit(claimed, str(self._generation))

    def _most(self, size: int) -> int:
        """How many records to ask for when a batch has this many bytes, going by the size of the last ones."""
        fitting = (_BATCH_BYTES - size) // max(1, self._usual_size)
        return max(_FEWEST_RECORDS, min(_POLL_RECORDS, fitting))

    def _check(self, batch: Batch, ends: Mapping[int, int]) -> None:
        """Refuse what does not go on from where reading stands: a rebalance came between."""
        moved = any(self._next[p] != offset for p, offset in ends.items())
        firsts = {record.partition: record.offset for record in reversed(batch.records)}
        early = any(offset < self._next.get(p, 0) for p, offset in firsts.items())
        if self._reset or moved or early:
            raise StaleCheckpointError(f"the partitions of {self._projection.name} were assigned anew")

    @asynccontextmanager
    async def _of_one_log(self) -> AsyncIterator[None]:
        """What looks like a log that was cut may be another one: LogIdentityError then, instead of CorruptError."""
        try:
            yield
        except CorruptError:
            await self._require_same_log()
            raise

    async def _require_same_log(self) -> None:
        """Asked behind the reading: a log that is still the same was so while it was read, since no identity returns.

        A client goes on at its offset when a topic was deleted and made anew under its feet, as if nothing had been.
        """
        if self._identity is None:
            raise StaleCheckpointError("read before joining")
        require_same_log(self._projection, self._identity, await self._log.identity())
        self._looked = time.monotonic()

    async def _require_same_generation(self) -> None:
        """Without a batch there is no guard that would tell: what a reset has emptied might stay so until one comes."""
        async with self._views.reading() as connection:
            live = await live_row(connection, self._projection)
        if live.generation != self._generation:
            raise StaleCheckpointError(f"the view {self._projection.name} has another generation by now")

    def _checkpoint(self, starts: Mapping[int, int]) -> Checkpoint:
        if self._generation is None or self._identity is None:
            raise StaleCheckpointError("read before joining")
        return Checkpoint(self._generation, Position(self._identity, starts))

    def _joined(self) -> Subscription:
        if self._subscription is None:
            raise StaleCheckpointError("read before joining")
        return self._subscription
