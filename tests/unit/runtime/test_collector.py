"""A process that rarely collects garbage still collects it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from services.runtime.processes import YOUNG, collect_rarely


class Ring:
    """Refers to itself, so that only the collector can end it."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def collector_as_it_was() -> Iterator[None]:
    """The collector's settings belong to the whole process."""
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def test_garbage_in_cycles_goes_before_there_is_much_of_it() -> None:
    collect_rarely()
    alive = weakref.WeakSet(Ring() for _ in range(3 * YOUNG))
    assert len(alive) <= 2 * YOUNG


def test_what_exists_at_the_start_is_not_walked_again() -> None:
    before = gc.get_freeze_count()
    collect_rarely()
    assert gc.get_freeze_count() > before
