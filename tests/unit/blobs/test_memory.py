"""The budget of memory is never exceeded, is fair, and is returned completely."""

from __future__ import annotations

import asyncio

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.blobs.memory import SMALL_BYTES, ByteBudget, PartBuffer


@given(
    jobs=st.lists(
        st.tuples(st.lists(st.integers(0, 10), max_size=4), st.integers(0, 3), st.booleans()), min_size=1, max_size=12
    )
)
async def test_it_is_never_exceeded_and_comes_back_whole_even_from_those_who_were_cancelled(
    jobs: list[tuple[list[int], int, bool]],
) -> None:
    budget = ByteBudget(10)
    out = 0

    async def job(amounts: list[int], turns: int) -> None:
        nonlocal out
        for amount in amounts:
            with budget.share() as share:
                await share.take(amount)
                out += amount
                assert out <= 10
                try:
                    for _ in range(turns):
                        await asyncio.sleep(0)
                finally:
                    out -= amount

    tasks = [asyncio.create_task(job(amounts, turns)) for amounts, turns, _ in jobs]
    await asyncio.sleep(0)
    for task, (_, _, cancelled) in zip(tasks, jobs, strict=True):
        if cancelled:
            task.cancel()
    for result in await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), timeout=10):
        assert result is None or isinstance(result, asyncio.CancelledError)
    assert budget.free == 10


async def test_a_large_wish_is_not_overtaken_by_small_ones() -> None:
    budget = ByteBudget(10)
    order: list[str] = []

    async def take(name: str, amount: int) -> None:
        await budget.take(amount)
        order.append(name)
        budget.give(amount)

    await budget.take(5)
    tasks = [asyncio.create_task(take("large", 10)), asyncio.create_task(take("small", 1))]
    await asyncio.sleep(0)
    assert order == []
    budget.give(5)
    await asyncio.gather(*tasks)
    assert order == ["large", "small"]


async def test_those_behind_a_wish_that_is_withdrawn_get_their_turn() -> None:
    budget = ByteBudget(10)
    await budget.take(5)
    large = asyncio.create_task(budget.take(10))
    small = asyncio.create_task(budget.take(5))
    await asyncio.sleep(0)
    large.cancel()
    await asyncio.wait_for(small, timeout=5)
    assert large.cancelled()
    assert budget.free == 0


async def test_what_is_given_back_after_the_end_of_a_share_counts_once() -> None:
    budget = ByteBudget(10)
    with budget.share() as share:
        await share.take(7)
        share.give(2)
        assert (share.held, budget.free) == (5, 5)
    share.give(5)
    assert budget.free == 10


async def test_a_wish_that_can_never_come_true_is_an_error() -> None:
    with pytest.raises(ValueError, match="never"):
        await ByteBudget(10).take(11)


@given(pieces=st.lists(st.binary(max_size=20), max_size=20), start=st.integers(0, 400), size=st.integers(0, 400))
def test_a_buffer_reads_as_what_was_put_in_and_is_empty_once_closed(pieces: list[bytes], start: int, size: int) -> None:
    whole = b"".join(pieces)
    part = PartBuffer(len(whole))
    for piece in pieces:
        part.append(piece)
    assert len(part) == len(whole)
    assert part.read(start, start + size) == whole[start : start + size]
    part.close()
    assert (len(part), part.read(start, start + size)) == (0, b"")


def test_a_buffer_takes_no_more_than_it_has_room_for() -> None:
    part = PartBuffer(3)
    part.append(b"abc")
    with pytest.raises(ValueError, match="no room"):
        part.append(b"d")
    assert part.read(0, 4) == b"abc"
    part.close()


async def test_a_small_upload_passes_those_that_wait_for_parts_while_bytes_are_kept_for_it() -> None:
    budget = ByteBudget(2 * SMALL_BYTES + 2, small=10)
    with budget.share() as large, budget.share() as small, budget.share() as next_small:
        await large.take(budget.limit)
        waiting = asyncio.create_task(budget.take(SMALL_BYTES + 1))
        await asyncio.sleep(0)
        assert budget.contended
        await asyncio.wait_for(small.take(8), timeout=1)
        late = asyncio.create_task(next_small.take(8))  # what is kept is not enough for both
        await asyncio.sleep(0)
        assert (small.held, next_small.held) == (8, 0)
        large.give(SMALL_BYTES + 1)
        await waiting
        large.give(8)
        await late
        budget.give(SMALL_BYTES + 1)
    assert budget.free == budget.limit
    with budget.share() as again:
        await again.take(10)
        assert (again.held, budget.free) == (10, budget.limit)  # all that was kept is there again


async def test_a_share_that_holds_parts_takes_no_more_from_what_is_kept_for_small_ones() -> None:
    budget = ByteBudget(SMALL_BYTES * 4, small=100)
    with budget.share() as share:
        await share.take(SMALL_BYTES + 1)
        await share.take(50)
        assert budget.free == SMALL_BYTES * 3 - 51
        share.give(50)
        assert budget.free == SMALL_BYTES * 3 - 1
    assert budget.free == budget.limit


def test_a_buffer_on_the_pages_of_another_shows_nothing_of_it() -> None:
    for _ in range(8):  # more than are kept
        part = PartBuffer(1 << 20)
        part.append(b"secret" * 1000)
        part.close()
        part.close()  # twice does no harm
        other = PartBuffer(1 << 20)
        other.append(b"new")
        assert other.read(0, 1 << 20) == b"new"
        assert part.read(0, 1 << 20) == b""
        with pytest.raises(ValueError, match="no room"):
            part.append(b"late")
        other.close()


def test_views_are_the_content_and_outlive_no_step() -> None:
    part = PartBuffer(9 << 20)  # no buffer whose pages are kept
    data = bytes(range(256)) * 4096 * 9
    part.append(memoryview(data))
    views = part.views(4 << 20)
    first = next(views)
    assert first == data[: 4 << 20]
    part.close()
    assert first == data[: 4 << 20], "the pages stay as long as they are looked at"
    assert list(views) == []
    with pytest.raises(ValueError, match="released"):
        first.tobytes()


def test_pages_are_kept_for_the_next_buffers_and_no_more_than_a_few() -> None:
    process = psutil.Process()
    data = bytes(1 << 20)

    def fill(parts: list[PartBuffer]) -> None:
        for part in parts:
            for _ in range(8):
                part.append(data)

    def close(parts: list[PartBuffer]) -> int:
        for part in parts:
            part.close()
        return int(process.memory_info().rss)

    before = close([])
    many = [PartBuffer(8 << 20) for _ in range(16)]
    fill(many)
    assert process.memory_info().rss - before > 90 << 20
    assert close(many) - before < 40 << 20
