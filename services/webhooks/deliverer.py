"""The process that delivers: it reads the log once for all subscriptions, and gives each its events.

One process delivers at a time; others stand by. It holds a row with a heartbeat, and saves nothing once another process
holds the row, so two never move the same cursor. A vanished process is replaced after LAPSE_SECONDS. A process with a
slow database stays: it sends nothing new until it has renewed its heartbeat and saved, and then continues where it was.

One tail reads the newest events and keeps them for a while. A subscription that is further behind reads the log itself
until it can join the tail; a few do so at a time. A subscription without room leaves the tail and costs nothing until
it has room again. Progress is saved once a second. If the process dies, deliveries since the last save are repeated. A
process that cannot read the log stands by, so that another one may deliver.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import UUID, uuid4

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from artifact_store.errors import ArtifactStoreError, UnavailableError
from artifact_store.events import AdministrativePayload, PackageFinalized, RecordedEvent
from artifact_store.position import Position
from services.core.access import Grants
from services.log.port import Log, partition_read
from services.registry.origins import Origins, find_origins
from services.runtime.clock import Clock, system_clock
from services.runtime.logs import Repeats
from services.runtime.processes import wait_for_stop
from services.views.database import Views
from services.views.queries import Queries
from services.webhooks.messages import CONTENT_TYPE, TEST_TYPE, signed_headers, test_body
from services.webhooks.outbox import Message, Outbox, Policy
from services.webhooks.subscriptions import (
    LAPSE_SECONDS,
    Heartbeat,
    Kind,
    Order,
    Progress,
    State,
    Subscription,
    Subscriptions,
)
from services.webhooks.targets import Answer, Targets

logger = logging.getLogger(__name__)

LATE_SECONDS = 5.0
"""A process that could not beat or save for this long sends nothing new until it can. Shorter than LAPSE_SECONDS, so
that it stops before another process may begin."""

_BEAT_SECONDS = 2.0
_SAVE_SECONDS = 1.0
_SAVING_SECONDS = 60.0
"""How long one save may take. After that its connection is considered lost, and another is tried."""

_LOOK_SECONDS = 0.5
_RIGHTS_SECONDS = 1.0
_STANDBY_SECONDS = 2.0
_AGAIN_SECONDS = 5.0
_BLIND_SECONDS = 10.0
"""After this long without the log a process stands by."""

_END_SECONDS = 5.0

_KEPT_EVENTS = 5_000
_KEPT_BYTES = 16 << 20
"""How many of the newest events are kept in memory, and how many bytes."""

_EVENT_BYTES = 2_000
_NEAR_EVENTS = 5_000
"""The tail begins at the earliest cursor that is at most this many events behind, so that a restart reads them once."""

_READERS = 8
"""How many subscriptions may read the log themselves at a time."""

_READ_EVENTS = 100
_READ_BYTES = 2 << 20
"""How many events of a held package are read at a time, and how many bytes."""

_TURN_SECONDS = 10.0
_PATIENCE_SECONDS = 2.0
_BREATH = 20

GrantsOf = Callable[[Mapping[str, Any]], Grants]
"""Returns the rights that a principal's `basis` gives now; see `Authenticator.grants_of`."""


class _LostError(Exception):
    """Another process delivers, or may do so by now."""


class DeliveryMetrics:
    """The deliverer's metrics for Prometheus."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        self.attempts = Counter(
            "artifact_store_webhook_attempts",
            "Attempts to deliver an event, by outcome; `parked` counts packages that were parked",
            ("outcome",),
            registry=registry,
        )
        self.seconds = Histogram(
            "artifact_store_webhook_delivery_seconds",
            "Time from an event's creation until a receiver accepted it at the first attempt",
            registry=registry,
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600),
        )
        self.subscriptions = Gauge(
            "artifact_store_webhook_subscriptions",
            "Subscriptions by state: `served`, `failing` (the receiver has refused an event three times in a row), "
            "`behind` the newest events, or `idle` (paused, disabled, or without rights)",
            ("state",),
            registry=registry,
        )
        self.parked = Gauge(
            "artifact_store_webhook_parked_packages",
            "Packages that subscriptions hold back until their owners act",
            registry=registry,
        )
        self.delivering = Gauge(
            "artifact_store_webhook_deliverer",
            "1 in the process that delivers, 0 in those on standby",
            registry=registry,
        )


class Deliverer:
    """Delivers events to all subscriptions of one views database. Belongs to one event loop."""

    def __init__(
        self,
        log: Log,
        views: Views,
        targets: Targets,
        grants_of: GrantsOf,
        *,
        policy: Policy | None = None,
        metrics: DeliveryMetrics | None = None,
        clock: Clock = system_clock,
    ) -> None:
        """`targets` must be open."""
        self._log = log
        self._store = Subscriptions(views, clock)
        self._metrics = metrics or DeliveryMetrics()
        self._me = uuid4()
        self._warn = partial(Repeats().warn, logger)
        policy, queries = policy or Policy(), Queries(views)
        self._begin = partial(
            _Lead, log, self._store, targets, grants_of, policy, self._metrics, clock, queries, self._me, self._warn
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Deliver, or stand by, until `stop` is set. Returns once requests in progress have ended.

        Failures of log and database are logged, and the work is tried again, whatever they are.
        """
        while not stop.is_set():
            pause = _STANDBY_SECONDS
            try:
                if await self._take_over(stop):
                    await self._lead(stop)
            except _LostError as error:
                logger.warning("webhooks: %s", error)
            except ArtifactStoreError as error:
                pause = _AGAIN_SECONDS
                self._warn(f"webhooks: {error.detail}; trying again every {pause:g} s")
            except Exception:  # a bug in this program must not end delivery for ever
                pause = _AGAIN_SECONDS
                logger.exception("webhooks: a bug in this program; trying again in %g s", pause)
            await wait_for_stop(stop, pause)

    async def _take_over(self, stop: asyncio.Event) -> bool:
        """Stand by until this process may deliver and can read the log. Returns False if `stop` is set first."""
        heartbeat = Heartbeat()
        while not stop.is_set():
            found = await self._store.beat()
            if heartbeat.has_lapsed(found):
                await self._log.end()
                if await self._store.claim(self._me, found):
                    return True
            else:
                await wait_for_stop(stop, _STANDBY_SECONDS)
        return False

    async def _lead(self, stop: asyncio.Event) -> None:
        logger.info("webhooks: this process delivers")
        self._metrics.delivering.set(1)
        lead = self._begin()
        ending = asyncio.create_task(stop.wait())
        try:
            async with asyncio.TaskGroup() as tasks:
                works = (lead.beat(), lead.look_at_log(), lead.follow(), lead.watch(), lead.save_regularly())
                working = [tasks.create_task(work) for work in works]
                await asyncio.wait([ending, *working], return_when=asyncio.FIRST_COMPLETED)
                for task in working:
                    task.cancel()
            await lead.close(_END_SECONDS)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            ending.cancel()
            await lead.close(0.0)
            self._metrics.delivering.set(0)
            try:
                async with asyncio.timeout(LAPSE_SECONDS):  # after which another process delivers
                    await lead.save()
            except (_LostError, ArtifactStoreError, TimeoutError) as error:
                logger.warning(
                    "webhooks: the last deliveries are repeated, because they were not saved: %s",
                    str(error) or "the database gives no answer",
                )
            with suppress(ArtifactStoreError):
                await self._store.release(self._me)


class _Lead:
    """One term of this process as the deliverer."""

    def __init__(
        self,
        log: Log,
        store: Subscriptions,
        targets: Targets,
        grants_of: GrantsOf,
        policy: Policy,
        metrics: DeliveryMetrics,
        clock: Clock,
        queries: Queries,
        me: UUID,
        warn: Callable[[str], None],
    ) -> None:
        self._log = log
        self._store = store
        self._targets = targets
        self._grants_of = grants_of
        self._policy = policy
        self._metrics = metrics
        self._clock = clock
        self._me = me
        self._warn = warn
        self._origins = Origins(lambda ids: find_origins(ids, queries, log))
        self._outboxes: dict[UUID, Outbox] = {}
        self._failing: set[UUID] = set()
        """Subscriptions whose receivers have been logged as failing."""
        self._joined: set[Outbox] = set()
        self._reading: dict[Outbox, asyncio.Task[None]] = {}
        self._readers = asyncio.Semaphore(_READERS)
        self._ordered: dict[UUID, asyncio.Task[None]] = {}
        self._done: dict[UUID, list[UUID]] = {}
        self._loaded = asyncio.Event()
        self._kept: deque[Message] = deque()
        self._kept_bytes = 0
        self._kept_from: dict[int, int] = {}
        """By partition, the offset from which the newest events are kept while `_tail` is set."""
        self._tail = asyncio.Event()
        self._unsaved: list[Progress] = []
        """The progress of a failed save. It may have been saved all the same."""
        self._beaten_at = self._saved_at = time.monotonic()
        self._on_time = asyncio.Event()
        """Set with each beat and each save."""

    # The lead.

    async def beat(self) -> None:
        """Renew the heartbeat, whatever else is slow. Continues after failures of the database.

        Raises _LostError once another process delivers.
        """
        while True:
            began = time.monotonic()
            try:
                async with asyncio.timeout(LATE_SECONDS):
                    if not await self._store.renew(self._me):
                        raise _LostError("another process delivers now")
                self._beaten_at = began
                self._on_time.set()
            except TimeoutError:
                self._warn(f"webhooks: the database accepts no heartbeat within {LATE_SECONDS:g} s")
            except ArtifactStoreError as error:
                self._warn(f"webhooks: no heartbeat: {error.detail}")
            await asyncio.sleep(max(0.0, began + _BEAT_SECONDS - time.monotonic()))

    async def _be_on_time(self) -> None:
        """Return at once. If the last beat or save is too long ago, return after both have succeeded."""
        while time.monotonic() - min(self._beaten_at, self._saved_at) > LATE_SECONDS:
            self._on_time.clear()
            await self._on_time.wait()

    async def look_at_log(self) -> None:
        """Raise _LostError once the log has not answered for _BLIND_SECONDS: another process may reach it."""
        answered = time.monotonic()
        while True:
            try:
                await self._log.end()
                answered = time.monotonic()
            except ArtifactStoreError as error:
                if time.monotonic() - answered > _BLIND_SECONDS:
                    raise _LostError(f"another process may deliver: {error.detail}") from None
            await asyncio.sleep(_AGAIN_SECONDS)

    # Subscriptions.

    async def watch(self) -> None:
        """Load subscriptions, and apply the changes of owners and operators within a second.

        Continues after failures of log and database. Raises _LostError once another process delivers.
        """
        while True:
            try:
                await self._watch()
            except ArtifactStoreError as error:
                self._warn(f"webhooks: changes are not seen: {error.detail}; trying again every {_AGAIN_SECONDS:g} s")
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _watch(self) -> None:
        changes, looked = -1, 0.0
        while True:
            beat = await self._store.beat()
            if beat.holder != self._me:
                raise _LostError("another process delivers now")
            if beat.changes != changes:
                await self._load()
                changes = beat.changes
                self._loaded.set()
            if time.monotonic() - looked >= _RIGHTS_SECONDS:
                looked = time.monotonic()
                await self._look_at_rights()
                self._show()
            await asyncio.sleep(_LOOK_SECONDS)

    async def _load(self) -> None:
        identity = await self._log.identity()
        found, held = await self._store.load()
        there = {one.subscription_id: one for one in found}
        for subscription_id, outbox in tuple(self._outboxes.items()):
            known = there.get(subscription_id)
            if known is None or known.epoch != outbox.subscription.epoch:
                await self._drop(outbox)
                if known is not None:  # a save of its last deliveries may be in progress
                    there[subscription_id] = replace(known, deliveries=max(known.deliveries, outbox.taken))
        for subscription in there.values():
            served = self._outboxes.get(subscription.subscription_id)
            if served is None:
                self._open(subscription, held.get(subscription.subscription_id, []), identity)
            elif _changed(subscription, served.subscription):
                served.change(subscription)
        for order in await self._store.orders():
            ordering = self._outboxes.get(order.subscription_id)
            if ordering is not None and order.order_id not in self._ordered:
                self._ordered[order.order_id] = asyncio.create_task(self._carry_out(order, ordering))

    def _open(self, subscription: Subscription, held: list[Any], identity: UUID) -> None:
        outbox = Outbox(
            subscription,
            held,
            policy=self._policy,
            may_send=self._be_on_time,
            post=self._post,
            read_package=self._read_package,
            clock=self._clock,
            delivered=self._count,
        )
        self._outboxes[subscription.subscription_id] = outbox
        self._grant(outbox)
        if subscription.position.log != identity:
            outbox.suspend(
                f"its cursor is of log {subscription.position.log}, this is log {identity}: redeliver from a time or "
                "position of this log"
            )
            return
        self._reading[outbox] = asyncio.create_task(self._serve(outbox))

    async def _drop(self, outbox: Outbox) -> None:
        del self._outboxes[outbox.subscription.subscription_id]
        self._joined.discard(outbox)
        await outbox.close()
        reading = self._reading.pop(outbox, None)
        if reading is not None:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _look_at_rights(self) -> None:
        for number, outbox in enumerate(tuple(self._outboxes.values()), 1):
            if outbox in self._reading:
                self._grant(outbox)
            if number % _BREATH == 0:
                await asyncio.sleep(0)

    def _grant(self, outbox: Outbox) -> None:
        outbox.set_rights(self._grants_of(outbox.subscription.basis))

    def _show(self) -> None:
        active = {name: outbox for name, outbox in self._outboxes.items() if outbox.is_active()}
        failing = {name: outbox.failing for name, outbox in active.items() if outbox.failing is not None}
        self._say_who_fails(failing)
        behind = sum(outbox.behind.is_set() for name, outbox in active.items() if name not in failing)
        for state, count in (
            ("served", len(active) - len(failing) - behind),
            ("failing", len(failing)),
            ("behind", behind),
            ("idle", len(self._outboxes) - len(active)),
        ):
            self._metrics.subscriptions.labels(state).set(count)
        self._metrics.parked.set(sum(outbox.parked for outbox in self._outboxes.values()))

    def _say_who_fails(self, failing: Mapping[UUID, str | None]) -> None:
        """Log a line when a receiver begins to fail, and one when it has accepted what it refused."""
        for name in failing.keys() - self._failing:
            logger.warning(
                "subscription %s: its receiver refuses events: %s; they are sent again until it takes them, and "
                "`artifact-store subscriptions deliveries` shows each attempt",
                *(name, failing[name]),
            )
        for name in self._failing - failing.keys():
            logger.info("subscription %s: no event waits for its receiver to work again", name)
        self._failing = set(failing)

    # Events.

    async def follow(self) -> None:
        """Read the newest events for all subscriptions in the tail. Continues after failures of the log."""
        await self._loaded.wait()
        while True:
            try:
                await self._follow()
            except ArtifactStoreError as error:
                self._warn(f"webhooks: no event is read: {error.detail}; trying again every {_AGAIN_SECONDS:g} s")
            self._tail.clear()
            self._kept.clear()
            self._kept_bytes = 0
            for outbox in self._joined:
                outbox.behind.set()
            self._joined.clear()
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _follow(self) -> None:
        start = self._start(await self._log.end())
        self._kept_from = dict(start.offsets)
        self._tail.set()
        count = 0
        async with aclosing(self._log.read(start, follow=True)) as events:
            async for message in self._messages(events, start):
                self._keep(message)
                for number, outbox in enumerate(tuple(self._joined), 1):
                    if outbox in self._joined and not outbox.offer(message):
                        self._joined.discard(outbox)
                    if number % _BREATH == 0:
                        await asyncio.sleep(0)
                count += 1
                if count % _BREATH == 0:
                    await asyncio.sleep(0)

    def _start(self, end: Position) -> Position:
        """Where the tail begins: at the log's end, or earlier for subscriptions that have nearly reached it."""
        offsets = dict(end.offsets)
        for outbox in self._outboxes.values():
            at = outbox.reading
            if outbox in self._reading and outbox.is_active() and sum(end.left_behind(at).values()) <= _NEAR_EVENTS:
                offsets = {p: min(offset, at.offsets.get(p, 0)) for p, offset in offsets.items()}
        return Position(end.log, offsets)

    def _keep(self, message: Message) -> None:
        self._kept.append(message)
        self._kept_bytes += _size(message)
        while len(self._kept) > _KEPT_EVENTS or (self._kept_bytes > _KEPT_BYTES and len(self._kept) > 1):
            oldest = self._kept.popleft()
            self._kept_bytes -= _size(oldest)
            self._kept_from[oldest.partition] = oldest.offset + 1

    async def _messages(self, events: AsyncIterable[RecordedEvent], since: Position) -> AsyncGenerator[Message]:
        """The packages' events as messages. Leaves out administrative records, which belong to no package."""
        before = since.offsets
        async for event in events:
            partition = partition_read(self._log, event, before)
            before = event.position.offsets
            self._origins.note(event)
            if isinstance(event.payload, AdministrativePayload):
                continue
            origin = await self._origins.of(event.package_id)
            if origin is not None:
                yield Message(event, partition, origin)

    async def _serve(self, outbox: Outbox) -> None:
        """Keep the outbox in the tail, and read from the log for it whenever it is behind."""
        while True:
            await outbox.behind.wait()
            await outbox.room.wait()
            await self._tail.wait()
            if self._join(outbox):
                continue
            try:
                async with self._readers:
                    await self._read_on(outbox)
            except ArtifactStoreError as error:
                self._warn(f"subscription {outbox.subscription.subscription_id}: {error.detail}")
                if not isinstance(error, UnavailableError):
                    outbox.suspend(error.detail)
                await asyncio.sleep(_AGAIN_SECONDS)

    def _join(self, outbox: Outbox) -> bool:
        """Give the outbox the kept events and those that follow. Returns False if it lacks earlier ones."""
        if not (self._tail.is_set() and outbox.covers(self._kept_from)):
            return False
        for message in self._kept:
            if not outbox.offer(message):
                return True  # there is no room; it tries again once there is
        outbox.behind.clear()
        self._joined.add(outbox)
        return True

    async def _read_on(self, outbox: Outbox) -> None:
        since = outbox.reading
        until = await self._log.end(since)
        turn_ends = time.monotonic() + _TURN_SECONDS
        async with aclosing(self._log.read(since, until=until)) as events:
            async for message in self._messages(events, since):
                while not outbox.offer(message):
                    try:
                        async with asyncio.timeout(_PATIENCE_SECONDS):
                            await outbox.room.wait()
                    except TimeoutError:
                        return
                if self._readers.locked() and time.monotonic() > turn_ends:
                    return
        outbox.pass_to(until)

    async def _read_package(self, package_id: UUID, since: Position, until: Position) -> list[Message]:
        found: list[Message] = []
        size = 0
        async with self._readers, aclosing(self._log.read(since, package_id=package_id, until=until)) as events:
            async for message in self._messages(events, since):
                found.append(message)
                size += _size(message)
                if len(found) >= _READ_EVENTS or size >= _READ_BYTES:
                    break
        return found

    # Requests.

    async def _post(self, subscription: Subscription, name: str, body: bytes) -> Answer:
        now = self._clock()
        headers = signed_headers(name, now // 1_000_000, body, subscription.signing(now))
        return await self._targets.send(subscription.url, body, {"Content-Type": CONTENT_TYPE, **headers})

    def _count(self, message: Message, outcome: str, first: bool) -> None:
        self._metrics.attempts.labels(outcome).inc()
        if outcome == "delivered" and first:
            self._metrics.seconds.observe(max(0.0, (self._clock() - message.event.created_at) / 1_000_000))

    async def _carry_out(self, order: Order, outbox: Outbox) -> None:
        try:
            if order.kind is Kind.TEST:
                identity = await self._log.identity()
                subscription_id = order.subscription_id
                body = test_body(order.order_id, subscription_id, identity, self._clock())
                await outbox.test(order.order_id, TEST_TYPE, body)
            elif order.package_id is not None and order.partition is not None and order.offset is not None:
                await self._repeat(order.package_id, order.partition, order.offset, outbox)
        except ArtifactStoreError as error:
            logger.warning("subscription %s: %s", order.subscription_id, error.detail)
        self._done.setdefault(order.subscription_id, []).append(order.order_id)

    async def _repeat(self, package_id: UUID, partition: int, offset: int, outbox: Outbox) -> None:
        if outbox.unpark(package_id, offset):
            return
        since, until = outbox.at(partition, offset), outbox.at(partition, offset + 1)
        for message in await self._read_package(package_id, since, until):
            await outbox.repeat(message)

    # Saving.

    async def save_regularly(self) -> None:
        """Save progress once a second. After a failure of the database, the unsaved progress is saved next time.

        Raises _LostError once another process delivers.
        """
        while True:
            await asyncio.sleep(_SAVE_SECONDS)
            try:
                await self.save()
            except ArtifactStoreError as error:
                self._warn(f"webhooks: progress is not saved: {error.detail}; trying again")

    async def save(self) -> None:
        """Save the progress since the last save, after any that could not be saved then.

        Raises _LostError once another process delivers; UnavailableError, and as `Views.writing`.
        """
        if self._unsaved:
            await self._save()
        self._unsaved = self._take_progress()
        if self._unsaved:
            await self._save()
        self._saved_at = time.monotonic()
        self._on_time.set()

    def _take_progress(self) -> list[Progress]:
        progress: list[Progress] = []
        for subscription_id, outbox in self._outboxes.items():
            orders = self._done.pop(subscription_id, None)
            found = outbox.take_progress(force=orders is not None)
            if found is not None:
                progress.append(replace(found, orders=tuple(orders or ())))
        return progress

    async def _save(self) -> None:
        try:
            async with asyncio.timeout(_SAVING_SECONDS):
                if not await self._store.save(self._me, self._unsaved):
                    raise _LostError("another process delivers now")
        except TimeoutError:
            raise UnavailableError(f"progress could not be saved within {_SAVING_SECONDS:g} s") from None
        for one in self._unsaved:
            for order in one.orders:
                self._ordered.pop(order, None)
        self._unsaved = []

    async def close(self, seconds: float) -> None:
        """Send nothing more. Requests in progress may continue for `seconds`."""
        tasks = [*self._reading.values(), *self._ordered.values()]
        self._reading.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(outbox.close(seconds) for outbox in self._outboxes.values()))


def _changed(new: Subscription, known: Subscription) -> bool:
    """Whether somebody changed the subscription; the deliverer's own writes do not count."""
    return (
        replace(
            new,
            position=known.position,
            deliveries=known.deliveries,
            trouble=known.trouble,
            created_at=known.created_at,
        )
        != known
        and not (new.state is State.DISABLED and known.state is State.DISABLED)
    ) or new.resumes != known.resumes


def _size(message: Message) -> int:
    payload = message.event.payload
    manifest = payload.manifest if isinstance(payload, PackageFinalized) else None
    return _EVENT_BYTES + len(manifest or b"")
