"""A store's clock is known from its answers, within a second and their delay, and unaffected by our clock."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import pytest

from services.runtime.clock import StoreClock

SECOND = 1_000_000
DAY = 86_400 * SECOND
NOON = 1_800_000_000


@dataclass
class Machine:
    """A system clock (µs) and a monotonic one (s) that a test sets."""

    own: int = NOON * SECOND
    ticks: float = 500.0

    def passes(self, seconds: float) -> None:
        self.own += int(seconds * SECOND)
        self.ticks += seconds


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def store(machine: Machine) -> StoreClock:
    return StoreClock(lambda: machine.own, lambda: machine.ticks)


def test_a_store_that_named_no_time_is_taken_to_have_ours(store: StoreClock, machine: Machine) -> None:
    assert store.ahead() is None
    assert store.micros() == machine.own


def test_clocks_that_agree_to_the_second_agree(store: StoreClock, machine: Machine) -> None:
    sent = machine.ticks
    machine.passes(0.9)
    store.heard(NOON, sent)
    assert store.ahead() == 0
    machine.passes(3600)
    assert store.ahead() == 0
    assert store.now() == datetime.fromtimestamp(NOON + 3600.9, UTC)


@pytest.mark.parametrize("days", [1, -1])
def test_a_clock_that_is_wrong_is_told_by_how_much_and_the_store_s_time_is_gone_by(
    store: StoreClock, machine: Machine, days: int
) -> None:
    machine.own += days * DAY
    store.heard(NOON, machine.ticks)
    ahead = store.ahead()
    assert ahead is not None
    assert abs(ahead - days * DAY) <= SECOND
    machine.passes(60)
    assert abs(store.micros() - (NOON + 60) * SECOND) <= SECOND


def test_a_step_of_our_own_clock_shows_before_the_store_answers_again(store: StoreClock, machine: Machine) -> None:
    store.heard(NOON, machine.ticks)
    assert store.ahead() == 0
    machine.own += DAY
    assert (store.ahead() or 0) >= DAY - SECOND
    machine.own -= 2 * DAY
    assert (store.ahead() or 0) <= SECOND - DAY


def test_an_answer_that_was_long_on_its_way_says_nothing(store: StoreClock, machine: Machine) -> None:
    sent = machine.ticks
    machine.passes(10)
    store.heard(NOON - 86_400, sent)
    assert store.ahead() is None
