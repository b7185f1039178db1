"""Subscriptions and their data: secrets, cursors, held packages, deliveries, orders.

They are kept in tables of the views' database that belong to no projection, so that no replay empties them. Gateways
change subscriptions. The one process that delivers changes cursors, held packages and deliveries. If both change the
same row, the subscription's `epoch` shows which change came later: a gateway that moves a cursor increments it, and the
deliverer's progress of the previous epoch is dropped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from operator import attrgetter
from typing import Any
from uuid import UUID, uuid4, uuid5

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Index,
    Integer,
    MetaData,
    Row,
    Select,
    Table,
    Text,
    Uuid,
    delete,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncConnection

from artifact_store.documents.subscription_shapes import Filters
from artifact_store.errors import CommandReusedError, ConflictError, InvalidPositionError, NotFoundError
from artifact_store.models import EventFilter
from artifact_store.position import Position
from services.runtime.clock import Clock, system_clock
from services.views.bulk import delete_rows, find_rows, insert_rows, on_postgresql, update_rows
from services.views.database import Views, add_missing_columns
from services.webhooks.messages import new_secret

MOST_OF_OWNER = 2_000
"""Maximum number of subscriptions of one principal."""

OVERLAP_SECONDS = 86_400
"""How long messages are also signed with the previous secret."""

KEPT_DELIVERIES = 500
"""How many deliveries of each subscription are kept: the newest ones."""

LAPSE_SECONDS = 10.0
"""After this long without a heartbeat another process may take over."""

_MOST_SECRETS = 5
_NAMESPACE = UUID("0b2f6a4e-6f0d-4b55-9f0c-53f1f7b0a1d2")
_MICROS = 1_000_000
_FROZEN_SECONDS = 20
"""PostgreSQL ends a save whose process is silent for this long: whoever takes over needs the rows that it locks."""

_LOCK = 0x77656268  # any number, the same for every process of ours

metadata = MetaData()

webhook_subscriptions = Table(
    "webhook_subscriptions",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("basis", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("filters", Text, nullable=False),
    Column("secrets", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("cause", Text),
    Column("resumes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)
Index("webhook_subscriptions_by_owner", webhook_subscriptions.c.owner, webhook_subscriptions.c.id)

webhook_cursors = Table(
    "webhook_cursors",
    metadata,
    Column("subscription_id", Uuid, primary_key=True),
    Column("epoch", BigInteger, nullable=False),
    Column("position", Text, nullable=False),
    Column("deliveries", BigInteger, nullable=False),
    Column("trouble", Text),
)
"""How far a subscription has come: all events before `position` are delivered, not wanted, or held back.

`deliveries` counts the attempts so far, and so numbers them. `trouble` is why nothing is delivered now.
"""

webhook_held = Table(
    "webhook_held",
    metadata,
    Column("subscription_id", Uuid, primary_key=True),
    Column("package_id", Uuid, primary_key=True),
    Column("partition", Integer, nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("sequence", BigInteger),
    Column("attempts", Integer, nullable=False),
    Column("since", BigInteger, nullable=False),
    Column("next_at", BigInteger, nullable=False),
    Column("parked", Boolean, nullable=False),
    Column("cause", Text, nullable=False),
    Column("asked_to_wait", Boolean),
)
"""Packages whose events from `offset` on wait in the log, because the first of them was not accepted."""

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("subscription_id", Uuid, primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", Text, nullable=False),
    Column("event_id", Uuid, nullable=False),
    Column("event_type", Text, nullable=False),
    Column("package_id", Uuid),
    Column("sequence", BigInteger),
    Column("partition", Integer),
    Column("offset", BigInteger),
    Column("attempt", Integer, nullable=False),
    Column("begun_at", BigInteger, nullable=False),
    Column("milliseconds", BigInteger, nullable=False),
    Column("status", Integer),
    Column("answer", Text),
    Column("error", Text),
)

webhook_orders = Table(
    "webhook_orders",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("subscription_id", Uuid, nullable=False),
    Column("kind", Text, nullable=False),
    Column("package_id", Uuid),
    Column("partition", Integer),
    Column("offset", BigInteger),
    Column("created_at", BigInteger, nullable=False),
)
"""Orders of owners outside the stream: a test, or one event again. The deliverer removes an order once it is done."""

webhook_deliverer = Table(
    "webhook_deliverer",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("holder", Uuid),
    Column("beat", BigInteger, nullable=False),
    Column("changes", BigInteger, nullable=False),
)
"""One row: which process delivers, its heartbeat, and a counter of changes that it has yet to process."""


_held_values = attrgetter(*webhook_held.columns.keys()[1:])
_delivery_values = attrgetter(*webhook_deliveries.columns.keys()[1:])
"""The values of a HeldPackage and of a Delivery in the order of their table's columns, without the subscription."""


class State(StrEnum):
    """The state that a subscription's owner, or its receiver, has set."""

    ACTIVE = "active"
    PAUSED = "paused"
    DISABLED = "disabled"
    """The receiver answered that it is permanently gone (410). Resuming makes the subscription active again."""


class Kind(StrEnum):
    """Why something was sent."""

    EVENT = "event"
    REPEAT = "repeat"
    """An event again, as its owner asked."""
    TEST = "test"


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret for signing messages, valid until `until` (µs since 1970; None: the newest)."""

    secret: str
    until: int | None = None


@dataclass(frozen=True, slots=True)
class Subscription:
    """One subscription: where events go, which ones, and with whose rights."""

    subscription_id: UUID
    owner: str
    basis: Mapping[str, Any]
    """The basis of the owner's rights: see `Principal.basis`."""
    url: str
    wanted: EventFilter
    secrets: tuple[Secret, ...]
    state: State
    cause: str | None
    resumes: int
    """How often somebody resumed it. Each time, waiting events are tried at once."""
    created_at: int
    epoch: int
    position: Position
    deliveries: int
    trouble: str | None = None

    def signing(self, now: int) -> tuple[str, ...]:
        """The secrets to sign with now (µs since 1970), the newest first."""
        return tuple(one.secret for one in self.secrets if one.until is None or one.until > now)


@dataclass(slots=True)
class HeldPackage:
    """A package whose events from `offset` on a subscription has yet to get.

    `since` is when the first attempt failed, `next_at` when the next one is due (µs since 1970). `asked_to_wait` says
    whether the receiver set that time (`Retry-After`).
    """

    package_id: UUID
    partition: int
    offset: int
    sequence: int | None
    attempts: int
    since: int
    next_at: int
    parked: bool
    cause: str
    asked_to_wait: bool = False


@dataclass(frozen=True, slots=True)
class Delivery:
    """One attempt and its result. `status` and `answer` are the receiver's; `error` says why there is no answer."""

    kind: Kind
    event_id: UUID
    event_type: str
    package_id: UUID | None
    sequence: int | None
    partition: int | None
    offset: int | None
    attempt: int
    begun_at: int
    milliseconds: int
    status: int | None = None
    answer: str | None = None
    error: str | None = None
    number: int = 0


@dataclass(frozen=True, slots=True)
class Order:
    """Something to send outside the stream: a test, or the event at `offset` again."""

    order_id: UUID
    subscription_id: UUID
    kind: Kind
    package_id: UUID | None
    partition: int | None
    offset: int | None


@dataclass(slots=True)
class Progress:
    """The progress of one subscription that the deliverer saves."""

    subscription_id: UUID
    epoch: int
    position: Position
    deliveries: int
    trouble: str | None
    held: Mapping[UUID, HeldPackage]
    """The current state of packages whose rows changed."""
    released: frozenset[UUID]
    """Packages whose rows are to be deleted."""
    made: Sequence[Delivery] = ()
    gone: str | None = None
    """Why the receiver wants no more events; the subscription is then disabled."""
    orders: Sequence[UUID] = field(default=())
    """Orders that are done."""


@dataclass(frozen=True, slots=True)
class Beat:
    """The deliverer's row."""

    holder: UUID | None
    beat: int
    changes: int


class Heartbeat:
    """Judges from reads of the deliverer's row whether a process delivers: its beat changes every 2 s."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: tuple[UUID | None, int] | None = None
        self._since = 0.0

    def has_lapsed(self, found: Beat) -> bool:
        """Whether no process holds the row, or the beat has not changed in the reads of the last LAPSE_SECONDS."""
        if self._seen != (found.holder, found.beat):
            self._seen, self._since = (found.holder, found.beat), self._clock()
        return found.holder is None or self._clock() - self._since > LAPSE_SECONDS


async def create_tables(views: Views) -> None:
    """Create missing tables and columns. Safe to repeat, also by several processes at once.

    Raises as `Views.writing`.
    """
    async with views.writing() as connection:
        if views.dialect == "postgresql":  # two processes that create a table at once would collide in the catalogue
            await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        await connection.run_sync(_create)


def _create(connection: Connection) -> None:
    metadata.create_all(connection)
    add_missing_columns(connection, metadata.tables.values())
    if connection.execute(select(webhook_deliverer.c.id)).first() is None:
        connection.execute(insert(webhook_deliverer).values(id=1, holder=None, beat=0, changes=0))


class Subscriptions:
    """The subscriptions in one views database. Besides the named errors, methods raise as `Views.reading`."""

    def __init__(self, views: Views, clock: Clock = system_clock) -> None:
        self._views = views
        self._clock = clock

    # What gateways do.

    async def create(
        self,
        owner: str,
        basis: Mapping[str, Any],
        url: str,
        wanted: EventFilter,
        position: Position,
        key: UUID | None = None,
    ) -> Subscription:
        """Create a subscription that gets events after `position`. A repeat of its owner's `key` returns the first one.

        Raises ConflictError if the owner has too many, CommandReusedError if the key came with another URL or filter.
        """
        table = webhook_subscriptions
        made = Subscription(
            uuid4() if key is None else uuid5(_NAMESPACE, f"{key} {owner}"),
            owner,
            basis,
            url,
            wanted,
            (Secret(new_secret()),),
            State.ACTIVE,
            cause=None,
            resumes=0,
            created_at=self._clock(),
            epoch=1,
            position=position,
            deliveries=0,
        )
        async with self._views.writing() as connection:
            with suppress(NotFoundError):
                first = await _found(connection, made.subscription_id, owner)
                if (first.url, first.wanted) != (url, wanted):
                    raise CommandReusedError("this Idempotency-Key made another subscription: use a new one")
                return first
            count = await connection.execute(select(func.count()).select_from(table).where(table.c.owner == owner))
            if count.scalar_one() >= MOST_OF_OWNER:
                raise ConflictError(
                    f"{owner} has {MOST_OF_OWNER:,} subscriptions, which is the most: delete some first"
                )
            await connection.execute(insert(table).values(id=made.subscription_id, **_columns(made)))
            await connection.execute(
                insert(webhook_cursors).values(
                    subscription_id=made.subscription_id, epoch=1, position=str(position), deliveries=0
                )
            )
            await _announce(connection)
        return made

    async def find(self, subscription_id: UUID, owner: str | None) -> Subscription:
        """The subscription, if it is of this owner (None: of anybody). Raises NotFoundError."""
        async with self._views.reading() as connection:
            return await _found(connection, subscription_id, owner)

    async def page(self, owner: str | None, limit: int, after: UUID | None = None) -> list[Subscription]:
        """Subscriptions of this owner, or of anybody, in the order of their ids."""
        query = _joined().order_by(webhook_subscriptions.c.id).limit(limit)
        if owner is not None:
            query = query.where(webhook_subscriptions.c.owner == owner)
        if after is not None:
            query = query.where(webhook_subscriptions.c.id > after)
        async with self._views.reading() as connection:
            return [_subscription(row) for row in await connection.execute(query)]

    async def change(
        self,
        subscription_id: UUID,
        owner: str | None,
        *,
        state: State | None = None,
        url: str | None = None,
        wanted: EventFilter | None = None,
        basis: Mapping[str, Any] | None = None,
    ) -> Subscription:
        """Change the given fields. Resuming tries waiting events at once. Raises NotFoundError."""
        changes: dict[str, Any] = {}
        if state is not None:
            changes |= {"state": state, "cause": None}
        if state is State.ACTIVE:
            changes["resumes"] = webhook_subscriptions.c.resumes + 1
        if url is not None:
            changes["url"] = url
        if wanted is not None:
            changes["filters"] = Filters.of(wanted).model_dump_json()
        if basis is not None:
            changes["basis"] = json.dumps(basis)
        async with self._views.writing() as connection:
            await _found(connection, subscription_id, owner)
            if changes:
                table = webhook_subscriptions
                await connection.execute(update(table).where(table.c.id == subscription_id).values(**changes))
            await _announce(connection)
            return await _found(connection, subscription_id, owner)

    async def rotate(self, subscription_id: UUID, owner: str | None) -> Subscription:
        """Create a new secret, which comes first in the result. The previous one stays valid for OVERLAP_SECONDS.

        Raises NotFoundError.
        """
        async with self._views.writing() as connection:
            found = await _found(connection, subscription_id, owner)
            now = self._clock()
            before, *older = (one for one in found.secrets if one.until is None or one.until > now)
            ended = Secret(before.secret, now + OVERLAP_SECONDS * _MICROS)
            secrets = (Secret(new_secret()), ended, *older)[:_MOST_SECRETS]
            table = webhook_subscriptions
            await connection.execute(
                update(table).where(table.c.id == subscription_id).values(secrets=_secrets_text(secrets))
            )
            await _announce(connection)
            return await _found(connection, subscription_id, owner)

    async def remove(self, subscription_id: UUID, owner: str | None) -> None:
        """Delete the subscription and everything that belongs to it. Raises NotFoundError."""
        async with self._views.writing() as connection:
            await _found(connection, subscription_id, owner)
            for table in (webhook_cursors, webhook_held, webhook_deliveries, webhook_orders):
                await connection.execute(delete(table).where(table.c.subscription_id == subscription_id))
            subscriptions = webhook_subscriptions
            await connection.execute(delete(subscriptions).where(subscriptions.c.id == subscription_id))
            await _announce(connection)

    async def rewind(self, subscription_id: UUID, owner: str | None, position: Position) -> Subscription:
        """Deliver again everything after `position`. Raises NotFoundError, and InvalidPositionError if the subscription
        has not reached the position yet.
        """
        held = webhook_held.c
        async with self._views.writing() as connection:
            found = await _found(connection, subscription_id, owner, lock=True)
            if found.position.log == position.log and not found.position.covers(position):
                raise InvalidPositionError(
                    "the subscription has not reached this position yet: it will get what follows"
                )
            for row in (
                await connection.execute(select(webhook_held).where(held.subscription_id == subscription_id))
            ).all():
                if row.offset >= position.offsets.get(row.partition, 0) or found.position.log != position.log:
                    await connection.execute(
                        delete(webhook_held).where(
                            held.subscription_id == subscription_id, held.package_id == row.package_id
                        )
                    )
            cursors = webhook_cursors
            await connection.execute(
                update(cursors)
                .where(cursors.c.subscription_id == subscription_id)
                .values(epoch=cursors.c.epoch + 1, trouble=None, position=str(position))
            )
            await _announce(connection)
            return await _found(connection, subscription_id, owner)

    async def order_test(self, subscription_id: UUID, owner: str | None) -> UUID:
        """Ask for a test message; returns its id. Raises NotFoundError."""
        async with self._views.writing() as connection:
            await _found(connection, subscription_id, owner)
            return await self._order(connection, subscription_id, Kind.TEST)

    async def order_repeat(self, subscription_id: UUID, owner: str | None, event_id: UUID) -> None:
        """Ask for one event again. If its package waits for this event, the package continues after it.

        Raises NotFoundError, also if the kept deliveries do not contain the event.
        """
        made = webhook_deliveries.c
        async with self._views.writing() as connection:
            await _found(connection, subscription_id, owner)
            row = (
                await connection.execute(
                    select(made.package_id, made.partition, made.offset)
                    .where(made.subscription_id == subscription_id, made.event_id == event_id)
                    .where(made.kind != Kind.TEST)
                    .limit(1)
                )
            ).first()
            if row is None:
                raise NotFoundError(
                    f"the last {KEPT_DELIVERIES} deliveries of the subscription have no event {event_id}: "
                    "redeliver from a position or time instead"
                )
            await self._order(connection, subscription_id, Kind.REPEAT, row)

    async def _order(
        self, connection: AsyncConnection, subscription_id: UUID, kind: Kind, event: Row[*tuple[Any, ...]] | None = None
    ) -> UUID:
        order_id = uuid4()
        of = {} if event is None else {name: getattr(event, name) for name in ("package_id", "partition", "offset")}
        await connection.execute(
            insert(webhook_orders).values(
                id=order_id, subscription_id=subscription_id, kind=kind, created_at=self._clock(), **of
            )
        )
        await _announce(connection)
        return order_id

    async def deliveries(self, subscription_id: UUID, limit: int, before: int | None = None) -> list[Delivery]:
        """The subscription's deliveries with numbers below `before`, the newest first."""
        made = webhook_deliveries.c
        query = select(webhook_deliveries).where(made.subscription_id == subscription_id)
        if before is not None:
            query = query.where(made.number < before)
        async with self._views.reading() as connection:
            rows = await connection.execute(query.order_by(made.number.desc()).limit(limit))
            return [_delivery(row) for row in rows]

    async def active(self) -> int:
        """How many subscriptions are active, according to their owners."""
        table = webhook_subscriptions
        count = select(func.count()).select_from(table).where(table.c.state == State.ACTIVE)
        async with self._views.reading() as connection:
            return (await connection.execute(count)).scalar_one()

    async def held(self, subscription_ids: Iterable[UUID]) -> dict[UUID, list[HeldPackage]]:
        """The packages that these subscriptions hold back, by subscription."""
        async with self._views.reading() as connection:
            return await _held(connection, list(subscription_ids))

    # What the deliverer does.

    async def beat(self) -> Beat:
        """The deliverer's row. A database user without the right to see subscriptions may read it, and count
        subscriptions."""
        table = webhook_deliverer.c
        async with self._views.reading() as connection:
            row = (await connection.execute(select(table.holder, table.beat, table.changes))).one()
            return Beat(row.holder, row.beat, row.changes)

    async def claim(self, me: UUID, seen: Beat) -> bool:
        """Take over from the process that held the row when it was `seen`. Returns whether that succeeded."""
        table = webhook_deliverer
        async with self._views.writing() as connection:
            before = table.c.holder.is_(None) if seen.holder is None else table.c.holder == seen.holder
            done = await connection.execute(
                update(table).where(before, table.c.beat == seen.beat).values(holder=me, beat=seen.beat + 1)
            )
            return done.rowcount == 1

    async def release(self, me: UUID) -> None:
        """Let another process deliver at once."""
        table = webhook_deliverer
        async with self._views.writing() as connection:
            await connection.execute(update(table).where(table.c.holder == me).values(holder=None))

    async def load(self) -> tuple[list[Subscription], dict[UUID, list[HeldPackage]]]:
        """All subscriptions, and the packages that they hold back."""
        async with self._views.reading(snapshot=True, long=True) as connection:
            found = [_subscription(row) for row in await connection.execute(_joined())]
            return found, await _held(connection, None)

    async def orders(self) -> list[Order]:
        """Orders that are not done, the oldest first."""
        async with self._views.reading() as connection:
            rows = await connection.execute(select(webhook_orders).order_by(webhook_orders.c.created_at))
            return [Order(r.id, r.subscription_id, Kind(r.kind), r.package_id, r.partition, r.offset) for r in rows]

    async def renew(self, me: UUID) -> bool:
        """Renew the heartbeat; on PostgreSQL without waiting for a save. Returns False if another process delivers."""
        async with self._views.writing() as connection:
            return await _beat(connection, me)

    async def save(self, me: UUID, progress: Sequence[Progress]) -> bool:
        """Save the deliverer's progress in one transaction. Returns False, and saves nothing, if another process
        delivers.

        If a subscription's epoch has passed, only its deliveries are saved; if it was deleted, nothing. Safe to repeat:
        nothing is saved twice.
        """
        cursors = webhook_cursors.c
        try:
            async with self._views.writing() as connection:
                if on_postgresql(connection):
                    idle = f"SET LOCAL idle_in_transaction_session_timeout = '{_FROZEN_SECONDS}s'"
                    await connection.execute(text(idle))
                ids = [one.subscription_id for one in progress]
                columns = (cursors.subscription_id, cursors.epoch, cursors.deliveries)
                rows = await find_rows(connection, columns, ids, lock=True)
                epochs, made = {row[0]: row[1] for row in rows}, {row[0]: row[2] for row in rows}
                there = [one for one in progress if one.subscription_id in epochs]
                current = [one for one in there if one.epoch == epochs[one.subscription_id]]
                passed = [one for one in there if one.epoch != epochs[one.subscription_id]]
                await _save_cursors(connection, current, passed, made)
                await _save_held(connection, current)
                await _save_deliveries(connection, there, made)
                for one in current:
                    if one.gone is not None:
                        subscriptions = webhook_subscriptions
                        await connection.execute(
                            update(subscriptions)
                            .where(subscriptions.c.id == one.subscription_id)
                            .values(state=State.DISABLED, cause=one.gone)
                        )
                if done := [order for one in progress for order in one.orders]:
                    await connection.execute(delete(webhook_orders).where(webhook_orders.c.id.in_(done)))
                # Last, so that the row is locked only briefly: beats, and gateways that announce a change, need it.
                if not await _beat(connection, me):
                    raise _DeposedError
        except _DeposedError:
            return False
        return True


class _DeposedError(Exception):
    """Another process delivers: the transaction is rolled back."""


async def _beat(connection: AsyncConnection, me: UUID) -> bool:
    table = webhook_deliverer
    done = await connection.execute(update(table).where(table.c.holder == me).values(beat=table.c.beat + 1))
    return done.rowcount == 1


async def _announce(connection: AsyncConnection) -> None:
    """Make the deliverer look for changes."""
    table = webhook_deliverer
    await connection.execute(update(table).values(changes=table.c.changes + 1))


async def _save_cursors(
    connection: AsyncConnection, current: Sequence[Progress], passed: Sequence[Progress], made: Mapping[UUID, int]
) -> None:
    """`made` is the number of deliveries that were saved before, by subscription."""
    cursors, texts = webhook_cursors.c, _texts([one.position for one in current])
    counts = {one.subscription_id: max(one.deliveries, made[one.subscription_id]) for one in (*current, *passed)}
    await update_rows(
        connection,
        (cursors.subscription_id, cursors.position, cursors.deliveries, cursors.trouble),
        [
            (one.subscription_id, text, counts[one.subscription_id], one.trouble)
            for one, text in zip(current, texts, strict=True)
        ],
    )
    await update_rows(
        connection,
        (cursors.subscription_id, cursors.deliveries),
        [(one.subscription_id, counts[one.subscription_id]) for one in passed],
    )


def _texts(positions: Iterable[Position]) -> list[str]:
    """The texts of these positions. Most subscriptions are equally far, so equal positions share one text."""
    made: dict[tuple[Any, ...], str] = {}
    found = []
    for position in positions:
        key = (position.log, *position.offsets.items())
        if key not in made:
            made[key] = str(position)
        found.append(made[key])
    return found


async def _save_held(connection: AsyncConnection, current: Sequence[Progress]) -> None:
    held = webhook_held
    old = [(one.subscription_id, package_id) for one in current for package_id in (*one.released, *one.held)]
    await delete_rows(connection, (held.c.subscription_id, held.c.package_id), old)
    rows = [(one.subscription_id, *_held_values(row)) for one in current for row in one.held.values()]
    await insert_rows(connection, held, rows)


async def _save_deliveries(connection: AsyncConnection, there: Sequence[Progress], made: Mapping[UUID, int]) -> None:
    """Save the new deliveries. Remove as many of the oldest ones from subscriptions that have too many."""
    of_all = [(one.subscription_id, row) for one in there for row in one.made]
    new = [(id_, row) for id_, row in of_all if row.number > made[id_]]
    deliveries = webhook_deliveries
    old = [(id_, row.number - KEPT_DELIVERIES) for id_, row in new if row.number > KEPT_DELIVERIES]
    await delete_rows(connection, (deliveries.c.subscription_id, deliveries.c.number), old)
    await insert_rows(connection, deliveries, [(id_, *_delivery_values(row)) for id_, row in new])


def _joined() -> Select[Any]:
    subscriptions, cursors = webhook_subscriptions, webhook_cursors
    return select(
        subscriptions, cursors.c.epoch, cursors.c.position, cursors.c.deliveries, cursors.c.trouble
    ).join_from(subscriptions, cursors, subscriptions.c.id == cursors.c.subscription_id)


async def _found(
    connection: AsyncConnection, subscription_id: UUID, owner: str | None, *, lock: bool = False
) -> Subscription:
    query = _joined().where(webhook_subscriptions.c.id == subscription_id)
    if owner is not None:
        query = query.where(webhook_subscriptions.c.owner == owner)
    row = (await connection.execute(query.with_for_update(of=webhook_cursors) if lock else query)).first()
    if row is None:
        raise NotFoundError(f"there is no subscription {subscription_id}")
    return _subscription(row)


async def _held(connection: AsyncConnection, ids: Sequence[UUID] | None) -> dict[UUID, list[HeldPackage]]:
    query = select(webhook_held).order_by(webhook_held.c.since)
    if ids is not None:
        query = query.where(webhook_held.c.subscription_id.in_(ids))
    found: dict[UUID, list[HeldPackage]] = {}
    for row in await connection.execute(query):
        values = {**row._asdict(), "asked_to_wait": bool(row.asked_to_wait)}
        found.setdefault(values.pop("subscription_id"), []).append(HeldPackage(**values))
    return found


def _columns(made: Subscription) -> dict[str, Any]:
    return {
        "owner": made.owner,
        "basis": json.dumps(made.basis),
        "url": made.url,
        "filters": Filters.of(made.wanted).model_dump_json(),
        "secrets": _secrets_text(made.secrets),
        "state": made.state,
        "cause": made.cause,
        "resumes": made.resumes,
        "created_at": made.created_at,
    }


def _subscription(row: Row[*tuple[Any, ...]]) -> Subscription:
    return Subscription(
        subscription_id=row.id,
        owner=row.owner,
        basis=json.loads(row.basis),
        url=row.url,
        wanted=Filters.model_validate_json(row.filters).to_filter(),
        secrets=tuple(Secret(**one) for one in json.loads(row.secrets)),
        state=State(row.state),
        cause=row.cause,
        resumes=row.resumes,
        created_at=row.created_at,
        epoch=row.epoch,
        position=Position.parse(row.position),
        deliveries=row.deliveries,
        trouble=row.trouble,
    )


def _delivery(row: Row[*tuple[Any, ...]]) -> Delivery:
    values = row._asdict()
    del values["subscription_id"]
    return Delivery(**{**values, "kind": Kind(row.kind)})


def _secrets_text(secrets: Iterable[Secret]) -> str:
    return json.dumps([asdict(one) for one in secrets])
