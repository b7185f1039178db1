"""Which package states the embedded log's writer keeps: expensive ones are not read again and again."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from services.log.port import Record
from services.log.sqlite import driver, file
from services.log.sqlite.driver import PackageStates, SqliteDriver
from services.log.sqlite.file import package_records_from
from tests.commands import create, finalize, ingest
from tests.unit.log.sqlite.batches import run

LARGE = 20


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[file.LogFile]:
    """A connection to a new log."""
    path = tmp_path / "log.db"
    file.create_file(path)
    with closing(file.open_file(path, writable=True)) as opened:
        yield opened


@pytest.fixture
def appender(connection: file.LogFile) -> Iterator[Callable[[], SqliteDriver]]:
    """Opens writers on the log."""
    opened: list[SqliteDriver] = []

    def open_() -> SqliteDriver:
        opened.append(SqliteDriver(connection.path, connection.identity))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


@pytest.fixture
def made(appender: Callable[[], SqliteDriver]) -> Callable[..., UUID]:
    """Makes a package of so many files, which is so many entries and three more."""
    writing = appender()

    def make(files: int, *, finalized: bool = False) -> UUID:
        command = create(str(uuid4()))
        run(writing, [command, ingest(command.package_id, *map(str, range(files)))])
        if finalized:
            run(writing, [finalize(command.package_id)])
        return command.package_id

    return make


@pytest.fixture
def read(made: object, monkeypatch: pytest.MonkeyPatch) -> Counter[UUID]:
    """How often each package was read from its beginning; what made it read it, too, hence the clearing."""
    counted: Counter[UUID] = Counter()
    records_from = package_records_from

    def count(connection: Any, package_id: UUID, sequence: int, *bounds: Any) -> Any:
        counted[package_id] += sequence == 0
        return records_from(connection, package_id, sequence, *bounds)

    monkeypatch.setattr(driver, "package_records_from", count)
    return counted


def bounded(max_small: int, max_large: int, path: Path) -> PackageStates:
    """States within small bounds, with chances that are always the same."""
    return PackageStates(path, max_small=max_small, max_large=max_large, large=LARGE, chance=random.Random(7))


def kept_of(connection: file.LogFile, max_small: int, max_large: int) -> PackageStates:
    """As `bounded`, on this connection."""
    kept = bounded(max_small, max_large, connection.path)
    kept.connection = connection.connection
    return kept


def test_small_states_are_forgotten_within_a_bound_and_read_again(
    connection: file.LogFile, made: Callable[..., UUID]
) -> None:
    packages = [made(3) for _ in range(10)]
    kept = kept_of(connection, 20, 0)
    for package_id in packages * 2:
        state = kept.package(package_id)
        assert state is not None
        assert (state.sequence, sorted(state.files)) == (4, ["0", "1", "2"])
        assert sum(one in kept for one in packages) <= 3
    assert kept.package(uuid4()) is None


def test_a_large_package_is_not_forgotten_in_favour_of_any_number_of_small_and_finalized_ones(
    connection: file.LogFile, made: Callable[..., UUID], read: Counter[UUID]
) -> None:
    large, others = made(50), [*(made(3) for _ in range(10)), *(made(40, finalized=True) for _ in range(3))]
    read.clear()
    kept = kept_of(connection, 20, 60)
    for other in others * 2:
        kept.pinned = {other}
        kept.package(other)
        kept.pinned = {large}
        kept.package(large)
    assert read[large] == 1


def test_large_packages_that_take_turns_within_the_bound_are_read_once(
    appender: Callable[[], SqliteDriver],
    made: Callable[..., UUID],
    read: Counter[UUID],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.log.sqlite.driver.PackageStates", partial(bounded, 20, 200))
    one, two = made(30), made(30)
    read.clear()
    writing = appender()
    for turn in range(20):
        for package_id in (one, two):
            run(writing, [ingest(package_id, f"{turn} a", f"{turn} b", name=turn)])
    assert (read[one], read[two]) == (1, 1)


def test_the_packages_of_a_batch_are_kept_until_it_ends_whatever_they_hold(
    appender: Callable[[], SqliteDriver],
    made: Callable[..., UUID],
    read: Counter[UUID],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.log.sqlite.driver.PackageStates", partial(bounded, 8, 40))
    packages = [made(files) for files in (3, 4, 5, 30, 40, 50)]
    read.clear()
    writing = appender()
    for turn in range(3):
        run(writing, [ingest(package_id, f"turn {turn}", name=turn) for package_id in packages])
    assert set(read.values()) == {1}


def test_what_another_process_appended_to_a_package_is_read_before_the_lock_is_taken(
    appender: Callable[[], SqliteDriver], made: Callable[..., UUID], monkeypatch: pytest.MonkeyPatch
) -> None:
    package_id, writing, other = made(3), appender(), appender()
    run(writing, [ingest(package_id, "a", name="a")])
    run(other, [ingest(package_id, *(f"of the other {n}" for n in range(50)), name="other")])

    in_lock: list[int] = []
    locked = False

    @contextmanager
    def lock(path: Path) -> Iterator[None]:
        nonlocal locked
        with file.write_lock(path):
            locked = True
            yield

    def read(*bounds: Any) -> list[Record]:
        records = package_records_from(*bounds)
        if locked:
            in_lock.append(len(records))
        return records

    monkeypatch.setattr("services.log.sqlite.driver.write_lock", lock)
    monkeypatch.setattr(driver, "package_records_from", read)
    run(writing, [ingest(package_id, "b", name="b")])
    assert in_lock == [0]


def test_most_turns_read_nothing_again_when_large_packages_take_more_than_there_is_room_for(
    connection: file.LogFile, made: Callable[..., UUID], read: Counter[UUID]
) -> None:
    packages = [made(50) for _ in range(5)]
    read.clear()
    kept = kept_of(connection, 20, 4 * 53)
    for package_id in packages * 40:
        kept.package(package_id)
    assert read.total() < 200 * 0.6


def test_large_packages_that_nobody_uses_any_more_give_way_to_smaller_ones_in_use(
    connection: file.LogFile, made: Callable[..., UUID], read: Counter[UUID]
) -> None:
    unused, used = [made(50) for _ in range(4)], [made(30) for _ in range(3)]
    read.clear()
    kept = kept_of(connection, 20, 4 * 53)
    for package_id in unused + used * 40:
        kept.package(package_id)
    assert all(read[package_id] <= 4 for package_id in used)
