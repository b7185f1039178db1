"""One subscription's events until they are delivered: ordered per package, retried, held back, parked.

An event is offered once, in the order of the log. Its request is sent after those of all earlier events of its package
were accepted; different packages do not wait for each other. An event that is not accepted *holds* its package: the
package's later events are skipped, and read again from the log once that event is accepted. So neither memory nor the
cursor depends on how long a receiver fails. A package that fails for too long is *parked*: nothing is tried until its
owner asks. While `Policy.most_failing` packages fail, nothing new is taken: the receiver is considered down.

The cursor is the position before the first event that is not accepted yet, leaving out held packages. Held packages
have separate rows, which are saved in the cursor's transaction.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from uuid import UUID

from artifact_store.errors import ArtifactStoreError
from artifact_store.events import RecordedEvent
from artifact_store.position import Position
from services.core.access import Grants, Right, Scope, scope
from services.runtime.clock import Clock
from services.views.queries import Origin
from services.webhooks.messages import event_body, message_id
from services.webhooks.subscriptions import Delivery, HeldPackage, Kind, Progress, State, Subscription
from services.webhooks.targets import Answer, NotSentError

logger = logging.getLogger(__name__)

_MICROS = 1_000_000
_LONGEST_RETRY_AFTER = 6 * 3600.0
_READ_AGAIN_SECONDS = 10.0
_MAX_CAUSE = 500


_OFTEN = 3
"""How often in a row an event is refused before its receiver counts as failing: about 15 s with the usual pauses."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How one subscription is served. The defaults fit receivers on the internet."""

    at_once: int = 4
    """Maximum number of concurrent requests; one while the receiver fails."""
    room: int = 64
    """Events that wait in memory."""
    most_failing: int = 8
    """Once this many packages fail at the same time, nothing new is taken."""
    first_pause_seconds: float = 5.0
    """The pause after the first failure. Each further pause is twice as long; random jitter shortens all of them by up
    to a half."""
    longest_pause_seconds: float = 3600.0
    park_after_seconds: float = 86_400.0


class Message:
    """An event for all subscriptions that want it. Its body is built once."""

    __slots__ = ("_sent", "event", "offset", "origin", "partition")

    def __init__(self, event: RecordedEvent, partition: int, origin: Origin) -> None:
        self.event = event
        self.partition = partition
        self.offset = event.position.offsets[partition] - 1
        self.origin = origin
        self._sent: tuple[str, bytes] | None = None

    @property
    def sent(self) -> tuple[str, bytes]:
        """The message id, and the CloudEvent with this id."""
        if self._sent is None:
            name = message_id(self.event)
            self._sent = name, event_body(self.event, name, self.origin)
        return self._sent


Post = Callable[[Subscription, str, bytes], Awaitable[Answer]]
"""Sends a body under a message id. Raises NotSentError."""

MaySend = Callable[[], Awaitable[None]]
"""Waits until something may be sent; usually returns at once."""

ReadPackage = Callable[[UUID, Position, Position], Awaitable[Sequence[Message]]]
"""Reads a package's first events after one position and up to another from the log; empty if there are none.

Raises as `Log.read`.
"""

Tell = Callable[[Message, str, bool], None]
"""Called with an attempt's outcome (`delivered`, `failed` or `parked`), and whether it was the event's first attempt.
"""


@dataclass(slots=True)
class _Ticket:
    message: Message
    done: bool = False


@dataclass(slots=True)
class _Held:
    row: HeldPackage
    skipped_to: int
    """The highest offset of a skipped event."""
    message: Message | None = None
    """The event at `row.offset`, if it is still in memory."""
    passed: bool = False
    """Whether all events before `row.offset` are accepted and the next one will be offered."""
    timer: asyncio.TimerHandle | None = None


@dataclass(frozen=True, slots=True)
class _Failure:
    cause: str
    retry_after: float | None = None


class Outbox:
    """The events of one subscription. Belongs to one event loop; `close` ends it."""

    def __init__(
        self,
        subscription: Subscription,
        held: list[HeldPackage],
        *,
        policy: Policy,
        may_send: MaySend,
        post: Post,
        read_package: ReadPackage,
        clock: Clock,
        delivered: Tell,
    ) -> None:
        self.subscription = subscription
        self.behind = asyncio.Event()
        """Set while events are read for this outbox alone. Otherwise the shared tail offers them."""
        self.behind.set()
        self.room = asyncio.Event()
        """Set while there is room for more."""
        self.taken = subscription.deliveries
        """The number of the last attempt that was saved, or handed over to be saved."""
        self._policy = policy
        self._may_send = may_send
        self._post = post
        self._read_package = read_package
        self._clock = clock
        self._delivered = delivered
        self._read = dict(subscription.position.offsets)
        self._open: dict[int, deque[_Ticket]] = {}
        self._count = 0
        self._queues: dict[UUID, deque[_Ticket]] = {}
        self._ready: deque[UUID] = deque()
        self._busy: set[UUID] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._held = {row.package_id: _Held(row, row.offset) for row in held}
        self._failed = {row.package_id for row in held if row.attempts and not row.parked}
        """Held packages that are being retried."""
        self._failing = False
        self._reads = self._subscribes = Scope(())
        self._suspended: str | None = "the owner's rights are not known yet"
        self._gone: str | None = None
        self._deliveries = subscription.deliveries
        self._dirty = False
        self._changed: set[UUID] = set()
        self._released: set[UUID] = set()
        self._made: list[Delivery] = []
        self._closed = False

    # Which events are wanted, and whether anything is sent.

    def is_active(self) -> bool:
        """Whether events are sent at all."""
        return not (self._closed or self._suspended or self._gone) and self.subscription.state is State.ACTIVE

    def set_rights(self, grants: Grants) -> None:
        """Send only what the owner may read and subscribe to; nothing if either right is missing."""
        reads, subscribes = scope(grants, Right.READ), scope(grants, Right.SUBSCRIBE)
        self._reads, self._subscribes = reads, subscribes
        lacks = [right for right, where in ((Right.SUBSCRIBE, subscribes), (Right.READ, reads)) if not where]
        self.suspend(f"the owner has lost the right to {' and '.join(lacks)}" if lacks else None)

    def suspend(self, why: str | None) -> None:
        """Send nothing from now on; None resumes."""
        if why == self._suspended:
            return
        self._suspended, self._dirty = why, True
        self._go_on()

    def change(self, subscription: Subscription) -> None:
        """Apply the owner's changes of state, URL, filters and secrets."""
        resumed = subscription.resumes != self.subscription.resumes
        self.subscription = subscription
        if resumed:
            self._gone = None
            for held in self._held.values():
                if not held.row.parked and held.row.attempts:
                    held.row.next_at = self._clock()
        self._go_on()

    def _go_on(self) -> None:
        if self.is_active():
            for package_id in self._queues:
                self._make_ready(package_id)
            for held in self._held.values():
                self._schedule(held)
        self._note_room()

    def _permits(self, message: Message) -> bool:
        wanted, event, origin = self.subscription.wanted, message.event, message.origin
        return (
            wanted.takes(event.package_id, event.event_type)
            and wanted.includes(*origin)
            and all(where.includes(origin.producer, origin.subject) for where in (self._reads, self._subscribes))
        )

    # Taking events.

    @property
    def has_room(self) -> bool:
        """Whether more events are taken."""
        return self.is_active() and self._count < self._policy.room and len(self._failed) < self._policy.most_failing

    @property
    def parked(self) -> int:
        """How many packages are parked."""
        return sum(held.row.parked for held in self._held.values())

    @property
    def failing(self) -> str | None:
        """Why the receiver does not accept an event that was sent several times; None if there is no such event."""
        failed = (self._held[package_id].row for package_id in self._failed)
        return next((row.cause for row in failed if row.attempts >= _OFTEN), None)

    @property
    def reading(self) -> Position:
        """The position up to which events were offered."""
        return Position(self.subscription.position.log, dict(self._read))

    def at(self, partition: int, offset: int) -> Position:
        """The position with this offset, and in other partitions the offsets up to which events were offered."""
        return Position(self.subscription.position.log, {**self._read, partition: offset})

    def covers(self, offsets: dict[int, int]) -> bool:
        """Whether events up to these offsets, by partition, were offered."""
        return all(self._read.get(partition, 0) >= offset for partition, offset in offsets.items())

    def offer(self, message: Message) -> bool:
        """Take the next event, which is ignored if it was offered before. Returns False if there is no room: offer it
        again."""
        partition, package_id = message.partition, message.event.package_id
        if message.offset < self._read.get(partition, 0):
            return True
        if not self.has_room:
            self.behind.set()
            self.room.clear()
            return False
        self._read[partition] = message.offset + 1
        self._dirty = True
        if not self._permits(message):
            return True
        held = self._held.get(package_id)
        if held is not None and held.passed and message.offset >= held.row.offset:
            self._release(held)
        elif held is not None:
            held.skipped_to = max(held.skipped_to, message.offset)
            return True
        ticket = _Ticket(message)
        self._open.setdefault(partition, deque()).append(ticket)
        self._count += 1
        self._queues.setdefault(package_id, deque()).append(ticket)
        self._make_ready(package_id)
        return True

    def pass_to(self, position: Position) -> None:
        """Note that there is no further event before this position."""
        for partition, offset in position.offsets.items():
            self._read[partition] = max(offset, self._read.get(partition, 0))
        self._dirty = True

    def _note_room(self) -> None:
        if self.has_room and self._count <= self._policy.room // 2:
            self.room.set()

    # Sending.

    def _make_ready(self, package_id: UUID) -> None:
        if package_id not in self._busy:
            self._busy.add(package_id)
            self._ready.append(package_id)
        self._send_more()

    def _send_more(self) -> None:
        most = 1 if self._failing else self._policy.at_once
        while self._ready and len(self._tasks) < most:
            package_id = self._ready.popleft()
            task = asyncio.create_task(self._work(package_id))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _work(self, package_id: UUID) -> None:
        held, pause = self._held.get(package_id), 0.0
        try:
            if held is None:
                await self._send_queue(package_id)
            else:
                await self._send_held(held)
        except ArtifactStoreError as error:
            pause = _READ_AGAIN_SECONDS
            logger.warning("subscription %s: %s", self.subscription.subscription_id, error.detail)
        except Exception:  # an error with one package must not stop the others, nor this one for ever
            pause = _READ_AGAIN_SECONDS
            logger.exception("subscription %s: a bug in this program", self.subscription.subscription_id)
        finally:
            self._busy.discard(package_id)
        if pause and held is not None:
            held.row.next_at = self._clock() + int(pause * _MICROS)
            self._schedule(held)
        asyncio.get_running_loop().call_later(pause, self._after_work, package_id)

    def _after_work(self, package_id: UUID) -> None:
        if self._closed:
            return
        if self.is_active() and package_id in self._queues:
            self._make_ready(package_id)  # an event came while the last one was being finished
        self._send_more()
        self._note_room()

    async def _send_queue(self, package_id: UUID) -> None:
        queue = self._queues[package_id]
        while queue and self.is_active():
            message = queue[0].message
            failure = await self._attempt(message, 1) if self._permits(message) else None
            if failure is not None:
                self._hold(queue, failure)
                return
            self._finish(queue.popleft())
        if not queue:
            del self._queues[package_id]

    async def _send_held(self, held: _Held) -> None:
        """Send a held package's events, from the failed one on, until the package has caught up."""
        row = held.row
        while self.is_active():
            target = self._read.get(row.partition, 0)
            if row.offset >= target or held.skipped_to < row.offset:
                held.passed, row.attempts = True, 0
                self._change(held)
                if target >= row.offset:
                    self._release(held)
                return
            messages = await self._next_of(held, target)
            for message in messages:
                if not self.is_active():
                    return
                row.offset, row.sequence = message.offset, message.event.sequence
                if self._permits(message):
                    failure = await self._attempt(message, row.attempts + 1)
                    if failure is not None:
                        self._fail_again(held, message, failure)
                        return
                    self._recover(held)
                row.offset, row.attempts, held.message = message.offset + 1, 0, None
                self._change(held)
            if not messages:
                row.offset = target
                self._change(held)

    async def _next_of(self, held: _Held, target: int) -> Sequence[Message]:
        """The next events of a held package. No reader stays open while they are sent: a slow receiver takes long."""
        row = held.row
        if held.message is not None and held.message.offset == row.offset:
            return (held.message,)
        since, until = self.at(row.partition, row.offset), self.at(row.partition, target)
        return await self._read_package(row.package_id, since, until)

    async def _attempt(self, message: Message, attempt: int, kind: Kind = Kind.EVENT) -> _Failure | None:
        """Send the event once. Returns None if it was accepted."""
        (name, body), event = message.sent, message.event
        delivery = Delivery(
            kind,
            event.event_id,
            event.event_type,
            event.package_id,
            event.sequence,
            message.partition,
            message.offset,
            attempt,
            begun_at=0,
            milliseconds=0,
        )
        failure = await self._sent(delivery, name, body)
        self._failing = failure is not None
        self._delivered(message, "delivered" if failure is None else "failed", attempt == 1)
        return failure

    async def _sent(self, delivery: Delivery, name: str, body: bytes) -> _Failure | None:
        await self._may_send()
        clock = asyncio.get_running_loop().time
        begun_at, began = self._clock(), clock()
        answer: Answer | None = None
        error: str | None = None
        try:
            answer = await self._post(self.subscription, name, body)
        except NotSentError as cause:
            error = str(cause)[:_MAX_CAUSE]
        self._deliveries += 1
        self._dirty = True
        self._made.append(
            replace(
                delivery,
                number=self._deliveries,
                begun_at=begun_at,
                milliseconds=int((clock() - began) * 1000),
                status=None if answer is None else answer.status,
                answer=None if answer is None or answer.text is None else answer.text.replace("\0", ""),
                error=error,
            )
        )
        if answer is None:
            return _Failure(error or "it was not sent")
        if 200 <= answer.status < 300:
            return None
        if answer.status == 410:
            self._gone = "the receiver answered 410: it is gone for good. Resume the subscription once it is back"
        return _Failure(f"the receiver answered {answer.status}", _seconds_of(answer.retry_after, self._clock()))

    def _finish(self, ticket: _Ticket) -> None:
        ticket.done = True
        self._count -= 1
        self._dirty = True
        waiting = self._open[ticket.message.partition]
        while waiting and waiting[0].done:
            waiting.popleft()
        self._note_room()

    # Holding back.

    def _hold(self, queue: deque[_Ticket], failure: _Failure) -> None:
        message, now = queue[0].message, self._clock()
        package_id = message.event.package_id
        row = HeldPackage(
            package_id, message.partition, message.offset, message.event.sequence, 0, now, now, False, failure.cause
        )
        held = self._held[package_id] = _Held(row, queue[-1].message.offset)
        del self._queues[package_id]
        for ticket in queue:
            self._finish(ticket)
        self._fail_again(held, message, failure)

    def _fail_again(self, held: _Held, message: Message, failure: _Failure) -> None:
        row, now, policy = held.row, self._clock(), self._policy
        if not row.attempts:
            row.since = now
        row.attempts += 1
        row.cause = failure.cause
        row.asked_to_wait = failure.retry_after is not None
        held.message = message
        pause = min(policy.longest_pause_seconds, policy.first_pause_seconds * 2.0 ** min(row.attempts - 1, 40))
        pause *= random.uniform(0.5, 1.0)
        row.next_at = now + int(max(pause, failure.retry_after or 0.0) * _MICROS)
        if self._gone is None and now - row.since >= policy.park_after_seconds * _MICROS:
            row.parked = True
            self._delivered(message, "parked", False)
            logger.warning(
                "subscription %s: package %s is parked at event %s: %s",
                *(self.subscription.subscription_id, row.package_id, row.sequence, row.cause),
            )
        self._change(held)
        asyncio.get_running_loop().call_soon(self._schedule, held)

    def unpark(self, package_id: UUID, offset: int) -> bool:
        """Try the package at once if it waits for this event. Returns whether it does."""
        held = self._held.get(package_id)
        if held is None or held.row.offset != offset or not held.row.attempts:
            return False
        now = self._clock()
        held.row.parked, held.row.since, held.row.next_at = False, now, now
        self._change(held)
        self._schedule(held)
        return True

    def _recover(self, held: _Held) -> None:
        """An event of a failed package was accepted: try all other failed packages now."""
        if not held.row.attempts:
            return
        for other in self._held.values():
            if other is not held and other.row.attempts and not other.row.asked_to_wait:
                other.row.next_at = min(other.row.next_at, self._clock())
                self._schedule(other)

    def _schedule(self, held: _Held) -> None:
        if held.timer is not None:
            held.timer.cancel()
            held.timer = None
        if held.row.parked or held.passed or self._held.get(held.row.package_id) is not held or not self.is_active():
            return
        seconds = max(0.0, (held.row.next_at - self._clock()) / _MICROS)
        held.timer = asyncio.get_running_loop().call_later(seconds, self._make_ready, held.row.package_id)

    def _change(self, held: _Held) -> None:
        row = held.row
        if row.attempts and not row.parked:
            self._failed.add(row.package_id)
        else:
            self._failed.discard(row.package_id)
        self._changed.add(row.package_id)
        self._dirty = True
        self._note_room()

    def _release(self, held: _Held) -> None:
        if held.timer is not None:
            held.timer.cancel()
        package_id = held.row.package_id
        del self._held[package_id]
        self._failed.discard(package_id)
        self._changed.discard(package_id)
        self._released.add(package_id)
        self._dirty = True
        self._note_room()

    # Beside the stream.

    async def repeat(self, message: Message) -> None:
        """Send an event again, once, in no order relative to others."""
        if self._permits(message):
            await self._attempt(message, 1, Kind.REPEAT)

    async def test(self, test_id: UUID, event_type: str, body: bytes) -> None:
        """Send this body, once."""
        delivery = Delivery(Kind.TEST, test_id, event_type, None, None, None, None, 1, begun_at=0, milliseconds=0)
        await self._sent(delivery, str(test_id), body)

    # Saving and ending.

    def take_progress(self, *, force: bool = False) -> Progress | None:
        """The progress to save since the last call; None when nothing changed, unless `force` is set."""
        if not (self._dirty or force):
            return None
        offsets = dict(self._read)
        for partition, waiting in self._open.items():
            if waiting:
                offsets[partition] = waiting[0].message.offset
        found = Progress(
            self.subscription.subscription_id,
            self.subscription.epoch,
            Position(self.subscription.position.log, offsets),
            self._deliveries,
            self._suspended,
            {package_id: replace(self._held[package_id].row) for package_id in self._changed},
            frozenset(self._released),
            tuple(self._made),
            self._gone,
        )
        self.taken = self._deliveries
        self._dirty = False
        self._changed.clear()
        self._released.clear()
        self._made.clear()
        return found

    async def close(self, seconds: float = 0.0) -> None:
        """Send nothing more. Requests in progress may continue for `seconds`."""
        self._closed = True
        for held in self._held.values():
            if held.timer is not None:
                held.timer.cancel()
        if tasks := tuple(self._tasks):
            if seconds:
                await asyncio.wait(tasks, timeout=seconds)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self.room.set()


def _seconds_of(retry_after: str | None, now: int) -> float | None:
    """The seconds in `Retry-After` (RFC 9110 §10.2.3), within bounds; None without a sensible value."""
    if retry_after is None:
        return None
    if retry_after.isascii() and retry_after.isdigit():
        return float(min(int(retry_after[:9]), _LONGEST_RETRY_AFTER))
    try:
        moment = parsedate_to_datetime(retry_after)
        moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        seconds = (moment - datetime.fromtimestamp(now / _MICROS, UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(0.0, seconds), _LONGEST_RETRY_AFTER)
