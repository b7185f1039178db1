"""The tail that a gateway's followers share: each event once and in order, however slow, from any position."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from random import Random
from typing import Any
from uuid import UUID

import pytest

from artifact_store.documents.event_lines import event_head, parse_event
from artifact_store.errors import (
    CorruptError,
    InvalidPositionError,
    InvalidRequestError,
    LogIdentityError,
    UnavailableError,
)
from artifact_store.events import Event, PackageCreated, RecordedEvent
from artifact_store.models import EventFilter
from artifact_store.position import Position
from ingest_gateway import event_tail
from ingest_gateway.event_tail import Form, Tail
from ingest_gateway.routes.event_feed import FRAMES, LINES
from schemas.codec import decode, encode
from services.core.access import Packages, Scope
from services.registry.origins import ScopedFilter, in_order_of_time
from services.views.queries import Origin
from tests.integration.conditions import until
from tests.memory_log import MemoryLog
from tests.views_history import History

AS_LINES = Form(FRAMES[LINES])
EVENTS = tuple(History().fill(packages=12, files=4).events)
PACKAGES = sorted({event.package_id for event in EVENTS})


@pytest.fixture
def log() -> MemoryLog:
    return MemoryLog()


async def _followed(
    tail: Tail, count: int, since: Position | None = None, package_id: UUID | None = None
) -> list[RecordedEvent]:
    """The next events, `count` of them, as a follower gets them."""
    found: list[RecordedEvent] = []
    async with (
        asyncio.timeout(60),
        aclosing(tail.follow(since, EventFilter(package_id), AS_LINES)) as pieces,
    ):
        while len(found) < count:
            found += [parse_event(line) for line in (await anext(pieces)).splitlines()]
    return found


class _Follower:
    """One that takes pieces when it is told to."""

    def __init__(
        self,
        tail: Tail,
        since: Position | None = None,
        package_id: UUID | None = None,
        wanted: EventFilter | None = None,
        form: Form | None = None,
    ) -> None:
        self._pieces = tail.follow(since, wanted or EventFilter(package_id), form or AS_LINES)
        self.found: list[RecordedEvent] = []

    async def take(self) -> bool:
        """The next piece; whether it told of what was before."""
        async with asyncio.timeout(60):
            piece = await anext(self._pieces)
        self.found += [parse_event(line) for line in piece.splitlines()]
        return piece == b""

    async def join(self) -> None:
        while not await self.take():
            pass

    async def leave(self) -> None:
        await self._pieces.aclose()


def _ids(events: Sequence[Event]) -> list[UUID]:
    return [event.event_id for event in events]


async def test_all_followers_take_from_one_reader_and_the_last_that_leaves_ends_it(log: MemoryLog) -> None:
    tail = Tail(log)
    log.append(*EVENTS[:10])
    followers = [_Follower(tail) for _ in range(20)]
    for follower in followers:
        await follower.join()
    assert log.readers == 1
    log.append(*EVENTS[10:])
    for follower in followers:
        while len(follower.found) < len(EVENTS):
            await follower.take()
        assert log.readers == 1
        assert sorted(_ids(follower.found)) == sorted(_ids(EVENTS))
    assert len({tuple(event.position.offsets.items()) for f in followers for event in f.found[10:]}) == len(EVENTS) - 10
    for follower in followers:
        await follower.leave()
    assert log.readers == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("room", [1, 2_000, 1 << 20])
async def test_whoever_comes_when_sees_every_event_once_and_can_go_on_behind_any(seed: int, room: int) -> None:
    draw, log = Random(seed), MemoryLog()
    tail, told = Tail(log, room), [(Position(log.id, {}), 0)]  # with how many events lie before it
    waiting = [[event for event in EVENTS if event.package_id == package] for package in PACKAGES]
    done: list[tuple[Position, list[RecordedEvent]]] = []

    async def write() -> None:
        while any(waiting):
            package = draw.choice([events for events in waiting if events])
            log.append(*package[: (count := draw.randint(1, 3))])
            del package[:count]
            for _ in range(draw.randint(0, 20)):
                await asyncio.sleep(0)

    async def read(turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        since, before = draw.choice(told)
        found = await _followed(tail, len(EVENTS) - before, since)
        told.extend((event.position, before + number) for number, event in enumerate(found, 1))
        done.append((since, found))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(write())
        for _ in range(6):
            tasks.create_task(read(draw.randint(0, 1_000)))

    assert len(done) == 6
    for since, found in done:
        expected = [event async for event in log.read(since)]
        assert Counter(_ids(found)) == Counter(_ids(expected))
        for package in PACKAGES:
            of_package = [event.sequence for event in found if event.package_id == package]
            assert of_package == sorted(of_package)
        for count in (0, len(found) // 2, len(found) - 1):
            if found:
                rest = [event async for event in log.read(found[count].position)]
                assert Counter(_ids(found[: count + 1] + rest)) == Counter(_ids(expected))


async def test_who_stands_still_for_longer_than_the_tail_is_kept_loses_nothing(log: MemoryLog) -> None:
    tail = Tail(log, room_bytes=1)
    slow, quick = _Follower(tail), _Follower(tail)
    await slow.join()
    await quick.join()
    for event in EVENTS:
        log.append(event)
        while len(quick.found) <= EVENTS.index(event):
            await quick.take()
    while len(slow.found) < len(EVENTS):
        await slow.take()
    assert sorted(_ids(slow.found)) == sorted(_ids(EVENTS))
    await slow.leave()
    await quick.leave()


async def test_who_comes_back_soon_takes_what_it_missed_from_what_is_kept(
    log: MemoryLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    tail = Tail(log)
    log.append(*EVENTS[:10])
    staying, leaving = _Follower(tail), _Follower(tail)
    for follower in (staying, leaving):
        await follower.join()
    log.append(*EVENTS[10:20])
    while len(leaving.found) < 20:
        await leaving.take()
    await leaving.leave()
    log.append(*EVENTS[20:])
    while len(staying.found) < len(EVENTS):
        await staying.take()
    monkeypatch.setattr(log, "read", None)  # nothing more is read
    for seen in range(10, 20):
        back = _Follower(tail, leaving.found[seen].position)
        await back.join()
        assert sorted(_ids(back.found)) == sorted(_ids(EVENTS[20:]) + _ids(leaving.found[seen + 1 :]))
        await back.leave()


async def test_one_package_is_followed_alone(log: MemoryLog) -> None:
    tail, package = Tail(log), EVENTS[0].package_id
    wanted = [event for event in EVENTS if event.package_id == package]
    log.append(*EVENTS[:20])
    following = asyncio.create_task(_followed(tail, len(wanted), package_id=package))
    await asyncio.sleep(0)
    log.append(*EVENTS[20:])
    assert _ids(await following) == _ids(wanted)


async def test_a_failure_reaches_every_follower_and_the_next_one_begins_anew(log: MemoryLog) -> None:
    tail = Tail(log)
    followers = [_Follower(tail) for _ in range(3)]
    for follower in followers:
        await follower.join()
    log.unavailable = True
    log.append(EVENTS[0])
    for follower in followers:
        with pytest.raises(UnavailableError):
            await follower.take()
    with pytest.raises(UnavailableError):
        await _followed(tail, 1)
    assert log.readers == 0
    log.unavailable = False
    assert _ids(await _followed(tail, 1)) == [EVENTS[0].event_id]


@pytest.mark.parametrize(
    ("since", "error"),
    [
        (lambda log: Position(log.id, {0: 1}), InvalidPositionError),
        (lambda _: Position(UUID(int=1), {}), LogIdentityError),
    ],
)
async def test_a_position_that_is_none_of_this_log_is_refused(
    log: MemoryLog, since: object, error: type[Exception]
) -> None:
    assert callable(since)
    with pytest.raises(error):
        await _followed(Tail(log), 1, since(log))
    assert log.readers == 0


async def test_so_many_read_what_was_before_at_a_time_and_no_more(
    log: MemoryLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingest_gateway.event_tail.READERS", 2)
    tail = Tail(log)
    log.append(*EVENTS)
    readers: list[int] = []
    read = log.read

    async def counted(*arguments: object, **options: object) -> AsyncIterator[RecordedEvent]:
        async with aclosing(read(*arguments, **options)) as events:  # type: ignore[arg-type]  # handed through
            async for event in events:
                readers.append(log.readers)
                yield event

    monkeypatch.setattr(log, "read", counted)
    found = await asyncio.gather(*(_followed(tail, len(EVENTS)) for _ in range(8)))
    assert all(sorted(_ids(events)) == sorted(_ids(EVENTS)) for events in found)
    assert max(readers) == 3, "two, and the one of the tail"


async def test_who_does_not_take_what_was_before_keeps_nobody_from_what_comes(
    log: MemoryLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingest_gateway.event_tail.READERS", 2)
    monkeypatch.setattr("ingest_gateway.event_tail.PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr("ingest_gateway.event_tail.AHEAD_BYTES", 1)
    tail = Tail(log)
    log.append(*EVENTS[:-1])
    stalled = [_Follower(tail) for _ in range(5)]
    for follower in stalled:
        await follower.take()
    others = [_Follower(tail, await log.end()), _Follower(tail)]
    for follower in others:
        await follower.join()
    with pytest.raises(InvalidPositionError):
        await _followed(tail, 1, (await log.end()).after(0, 1_000))
    log.append(EVENTS[-1])
    await others[0].take()
    assert _ids(others[0].found) == [EVENTS[-1].event_id]
    for follower in (*stalled, others[1]):
        while len(follower.found) < len(EVENTS):
            await follower.take()
        assert sorted(_ids(follower.found)) == sorted(_ids(EVENTS))
    for follower in (*stalled, *others):
        await follower.leave()
    assert log.readers == 0


async def test_a_turn_ends_when_others_wait_and_reading_goes_on_where_it_was(
    log: MemoryLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingest_gateway.event_tail.READERS", 1)
    monkeypatch.setattr("ingest_gateway.event_tail.TURN_SECONDS", 0.0)
    tail = Tail(log)
    log.append(*EVENTS)
    found = await asyncio.gather(*(_followed(tail, len(EVENTS)) for _ in range(3)))
    assert all(sorted(_ids(events)) == sorted(_ids(EVENTS)) for events in found)


async def test_an_event_under_a_wrong_key_is_passed_on_from_where_it_lies(log: MemoryLog) -> None:
    tail = Tail(log)
    log.append(*EVENTS[:6])
    follower = _Follower(tail)
    await follower.join()
    elsewhere = (log.partition_of(EVENTS[6].package_id) + 1) % 3
    log.append_raw(elsewhere, encode(EVENTS[6]), str(EVENTS[6].package_id).encode())
    await follower.take()
    assert follower.found[-1].event_id == EVENTS[6].event_id
    assert follower.found[-1].position.covers(await log.end())
    await follower.leave()


async def test_a_record_that_cannot_be_read_ends_only_who_would_have_to_read_it(log: MemoryLog) -> None:
    tail, package = Tail(log), EVENTS[-1].package_id
    log.append(*EVENTS[:-1])
    everything = _Follower(tail)
    await everything.join()
    wanted = [event for event in EVENTS if event.package_id == package]
    of_package = _Follower(tail, package_id=package)
    await of_package.join()
    log.append_raw((log.partition_of(package) + 1) % 3, b"garbage")
    with pytest.raises(CorruptError):
        await everything.take()
    await everything.leave()
    log.append(EVENTS[-1])
    while len(of_package.found) < len(wanted):
        await of_package.take()
    assert _ids(of_package.found) == _ids(wanted)
    await of_package.leave()
    assert log.readers == 0


class _Counting(MemoryLog):
    most = 0

    async def read(self, *given: Any, **named: Any) -> AsyncGenerator[RecordedEvent]:
        async with aclosing(super().read(*given, **named)) as events:
            async for event in events:
                self.most = max(self.most, self.readers)
                yield event


async def test_who_reads_to_the_end_takes_turns_and_ends_where_the_log_ended_when_it_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = _Counting()
    monkeypatch.setattr("ingest_gateway.event_tail.READERS", 2)
    monkeypatch.setattr("ingest_gateway.event_tail.TURN_SECONDS", 0.0)
    tail = Tail(log)
    log.append(*EVENTS[:-5])

    async def read() -> list[RecordedEvent]:
        found: list[RecordedEvent] = []
        async with aclosing(tail.read(None, await log.end(), EventFilter(), AS_LINES)) as pieces:
            async for piece in pieces:
                if not found:
                    log.append(*EVENTS[-5:])
                found += [parse_event(line) for line in piece.splitlines()]
        return found

    async with asyncio.timeout(60):
        first, *others = await asyncio.gather(*(read() for _ in range(6)))
    assert log.most == 2
    assert sorted(_ids(first)) == sorted(_ids(EVENTS[:-5]))
    for found in others:
        assert sorted(_ids(found)) == sorted(_ids(first))


async def test_who_reads_to_the_end_and_takes_nothing_holds_no_reader(
    log: MemoryLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingest_gateway.event_tail.PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr("ingest_gateway.event_tail.AHEAD_BYTES", 1_000)
    log.append(*EVENTS)

    async def closed() -> bool:
        return not log.readers

    async with asyncio.timeout(60), aclosing(Tail(log).read(None, await log.end(), EventFilter(), AS_LINES)) as pieces:
        found = [parse_event(line) for line in (await anext(pieces)).splitlines()]
        assert log.readers == 1
        await until(closed, 60, "the reader is closed")
        async for piece in pieces:
            found += [parse_event(line) for line in piece.splitlines()]
    assert _ids(found) == _ids([event async for event in log.read()])


async def test_events_of_all_partitions_can_be_read_in_the_order_of_time(log: MemoryLog) -> None:
    log.append(*EVENTS)  # made one after the other, so that history goes from partition to partition and back
    end = await log.end()
    assert [event.event_id async for event in log.read()] != _ids(EVENTS), "one partition after the other"
    async with aclosing(Tail(log).read(None, end, EventFilter(), AS_LINES, by_time=True)) as pieces:
        found = [parse_event(line) async for piece in pieces for line in piece.splitlines()]
    assert _ids(found) == _ids(EVENTS)
    for count in (1, 20, len(found) - 1):
        rest = [event async for event in in_order_of_time(log, found[count - 1].position, end)]
        assert _ids(rest) == _ids(EVENTS[count:])
    assert [event async for event in in_order_of_time(log, end, end)] == []
    with pytest.raises(InvalidPositionError):
        await anext(in_order_of_time(log, end.after(0, 1_000), end))
    assert log.readers == 0


async def test_the_order_of_time_is_refused_for_very_many_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.registry.origins.MOST_BY_TIME", 2)
    log = MemoryLog()
    log.append(*EVENTS)
    with pytest.raises(InvalidRequestError, match="2 partitions"):
        await anext(in_order_of_time(log, None, await log.end()))


async def test_reading_does_not_run_away_from_most_followers() -> None:
    """A burst that is larger than what is kept: nobody has to read the log by themselves."""
    log, events = MemoryLog(), History().fill(packages=60, files=20).events
    tail = Tail(log, room_bytes=2 << 20)
    followers = [_Follower(tail) for _ in range(3)]
    for follower in followers:
        await follower.join()
    log.append(*events)
    while min(len(follower.found) for follower in followers) < len(events):
        for follower in followers:
            if len(follower.found) < len(events):
                await follower.take()
            assert log.readers == 1
    for follower in followers:
        assert sorted(_ids(follower.found)) == sorted(_ids(events))
        await follower.leave()


async def test_an_event_is_decoded_encoded_and_framed_once_however_many_listen(
    log: MemoryLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: Counter[bytes] = Counter()
    encoded: Counter[UUID] = Counter()
    framed: Counter[tuple[str, str]] = Counter()
    joined: Counter[tuple[object, int]] = Counter()

    def counted_decode(value: bytes) -> Event:
        decoded[value] += 1
        return decode(value)

    def counted_head(event: RecordedEvent, *, manifest: bool = True) -> bytes:
        encoded[event.event_id] += 1
        return event_head(event, manifest=manifest)

    def counting(name: str, *, manifests: bool) -> Form:
        def frame(event_type: str, head: bytes, position: str) -> bytes:
            framed[name, position] += 1
            return FRAMES[LINES](event_type, head, position)

        return Form(frame, manifests)

    make = event_tail._Channel.make

    async def counted_make(channel: event_tail._Channel, number: int, since: Position | None) -> object:
        joined[channel, number] += since is None
        return await make(channel, number, since)

    monkeypatch.setattr("tests.memory_log.decode", counted_decode)
    monkeypatch.setattr("artifact_store.documents.event_lines.event_head", counted_head)
    monkeypatch.setattr(event_tail._Channel, "make", counted_make)
    origins = {e.package_id: e.payload for e in EVENTS if isinstance(e.payload, PackageCreated)}
    one = next(iter(origins.values()))
    types = sorted({event.event_type for event in EVENTS})
    filters = [
        *(EventFilter(types=frozenset([name])) for name in types),
        EventFilter(producers=frozenset([one.producer])),
        EventFilter(subjects=frozenset([one.subject])),
        EventFilter(retention_classes=frozenset([one.retention_class])),
        EventFilter(next(iter(origins))),
        ScopedFilter(types=frozenset(types[:2]), scope=Scope((Packages((one.producer,), ("*",)),))),
        EventFilter(),
    ]
    tail, forms = Tail(log), [counting("whole", manifests=True), counting("lean", manifests=False)]
    asked = [(wanted, form) for wanted in filters for form in forms for _ in range(5)]
    followers = [_Follower(tail, wanted=wanted, form=form) for wanted, form in asked]
    for follower in followers:
        await follower.join()
    half = len(EVENTS) // 2
    for some in (EVENTS[:half], EVENTS[half:]):
        log.append(*some)
        for follower, (wanted, _) in zip(followers, asked, strict=True):
            expected = [
                event
                for event in some
                if wanted.takes(event.package_id, event.event_type)
                and wanted.includes(*Origin.of(origins[event.package_id]))
            ]
            follower.found.clear()
            while len(follower.found) < len(expected):
                await follower.take()
            assert sorted(_ids(follower.found)) == sorted(_ids(expected))
    for follower in followers:
        await follower.leave()
    assert set(decoded.values()) == {1}
    assert encoded == dict.fromkeys([event.event_id for event in EVENTS], 1)
    assert set(framed.values()) == {1}
    assert max(joined.values()) == 1, "what followers with the same filter get is put together once"


async def test_followers_that_stand_beyond_the_tail_share_what_they_get(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the log lies after its last transaction's marker, which the tail does not see."""
    log, half = MemoryLog(every=1), len(EVENTS) // 2
    joined: Counter[tuple[int, str | None]] = Counter()
    make = event_tail._Channel.make

    async def counted_make(channel: event_tail._Channel, number: int, since: Position | None) -> object:
        joined[number, None if since is None else str(since)] += 1
        return await make(channel, number, since)

    monkeypatch.setattr(event_tail._Channel, "make", counted_make)
    tail = Tail(log)
    first = _Follower(tail)
    await first.join()
    log.append(*EVENTS[:half])
    while len(first.found) < half:
        await first.take()
    end = await log.end()
    assert not first.found[-1].position.covers(end)
    others = [_Follower(tail, end) for _ in range(5)]
    for follower in others:
        await follower.join()
    joined.clear()
    log.append(*EVENTS[half:])
    for follower in others:
        while len(follower.found) < len(EVENTS) - half:
            await follower.take()
        assert sorted(_ids(follower.found)) == sorted(_ids(EVENTS[half:]))
    for follower in (first, *others):
        await follower.leave()
    assert any(since is not None for _, since in joined)
    assert max(joined.values()) == 1
