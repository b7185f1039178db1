"""The fair lock: one writer at a time, in the order of arrival, and passed on whatever happens."""

from __future__ import annotations

from threading import Thread

import pytest

from services.log.sequencer.partition_writer import FairLock

WRITERS = 8
SECONDS = 10.0


def started(lock: FairLock, number: int, order: list[int]) -> Thread:
    """A thread that takes a turn and notes it; returns when the thread waits for it or has had it."""

    def take() -> None:
        with lock:
            order.append(number)

    waiting = lock.waiting
    thread = Thread(target=take, daemon=True)
    thread.start()
    while lock.waiting == waiting and thread.is_alive():
        thread.join(0.001)
    return thread


def test_turns_go_to_who_came_first() -> None:
    lock, order = FairLock(), list[int]()
    with lock:
        threads = [started(lock, number, order) for number in range(WRITERS)]
        assert lock.waiting == WRITERS
        assert order == []
    for thread in threads:
        thread.join(SECONDS)
    assert order == list(range(WRITERS))
    assert lock.waiting == 0


def test_a_turn_is_not_taken_twice_by_who_comes_again_before_others_that_wait() -> None:
    lock, order = FairLock(), list[int]()
    with lock:
        other = started(lock, 1, order)
    with lock:
        order.append(2)
    other.join(SECONDS)
    assert order == [1, 2]


def test_an_error_ends_the_turn() -> None:
    lock, order = FairLock(), list[int]()
    others: list[Thread] = []

    def fail() -> None:
        with lock:
            others.append(started(lock, 1, order))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    others[0].join(SECONDS)
    assert order == [1]
    with lock:
        assert lock.waiting == 0


def test_only_one_at_a_time_has_a_turn() -> None:
    lock, inside, most = FairLock(), list[int](), list[int]()

    def work(number: int) -> None:
        for _ in range(500):
            with lock:
                inside.append(number)
                most.append(len(inside))
                inside.remove(number)

    threads = [Thread(target=work, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len(most) == 2_000
    assert max(most) == 1
