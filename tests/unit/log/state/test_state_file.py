"""State files: an incomplete or foreign state is noticed, and a locked file is not waited for."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from artifact_store.errors import (
    AnswerExpiredError,
    CommandReusedError,
    ConfigurationError,
    CorruptError,
    PackageAbandonedError,
)
from artifact_store.events import LogSkipped
from artifact_store.models import Acknowledgement
from services.config import Settings
from services.core.decide import ANSWERS_KEPT_MICROS, MAX_IDLE_MICROS, Command, IngestFiles, Limits, acknowledge, decide
from services.core.state import CREATED, FINALIZED, PackageState
from services.log.kafka import KafkaLog, KafkaWriter
from services.log.port import PackageExtent
from services.log.records import AdministrativeHead, administrative_event
from services.log.state import partition_state as state_module
from services.log.state import state_file as state_file_module
from services.log.state.loss import Loss, Witness
from services.log.state.partition_state import PartitionState
from services.log.state.restore import ExposedFolderError, Slot, claim
from services.log.state.state_file import (
    FORMAT,
    READABLE_FORMATS,
    STATEMENT_BYTES,
    STATEMENT_ROWS,
    DiskFullError,
    Irregular,
    LogPartition,
    Many,
    StateFile,
    StateFileError,
    UnusableStateError,
    copy_file,
)
from services.runtime.file_system import FileLock
from tests import commands
from tests.commands import stored

PLACE = LogPartition(UUID(int=7), "t.events", 3)
NAME = "t.events-3.db"
ANOTHER = (65_534, 65_534)
"""A user and a group that are not this process's."""
PACKAGES = 40
GOLDEN = Path(__file__).parent / "golden" / "format-5.db"


class Writing:
    """Commands folded into a state, as a writer does whose every transaction succeeds."""

    def __init__(self, state: PartitionState, now: int = 1_000) -> None:
        self.state = state
        self.now = now

    def run(self, command: Command) -> None:
        for event in decide(self.state.package(command.package_id), command, self.now, Limits()):
            self.state.apply(event)
        self.state.confirm(self.state.next_offset, b"record %d" % self.state.next_offset)


def filled(path: Path, place: LogPartition = PLACE, packages: int = PACKAGES) -> Path:
    """A closed state with packages of eight files, every other one finalized."""
    writing = Writing(PartitionState(StateFile.create(path, place)))
    for n in range(packages):
        made = commands.create(n)
        writing.run(made)
        writing.run(commands.ingest(made.package_id, *(f"{n}/{m}" for m in range(8))))
        if n % 2:
            writing.run(commands.finalize(made.package_id))
    assert writing.state.close()
    return path


def claimed(folder: Path) -> tuple[Slot, StateFile | None]:
    """A slot of a partition whose log holds whatever a state remembers."""
    found = claim(folder, PLACE, lambda witness: None)
    assert found.losses == []
    return found.slot, found.file


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def scribble(path: Path) -> None:
    """Overwrite pages in the middle."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\x5a" * 8192)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def no_database(path: Path) -> None:
    path.write_bytes(b"some other file" * 1000)


def other_database(path: Path) -> None:
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE notes (text)")
    connection.close()


def of_format(path: Path, number: int) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {number}")


def format_too_old(path: Path) -> None:
    of_format(path, min(READABLE_FORMATS) - 1)


def format_too_new(path: Path) -> None:
    of_format(path, FORMAT + 1)


def empty_of_other_log(path: Path) -> None:
    filled(path, LogPartition(uuid4(), PLACE.topic, PLACE.partition), 0)


def other_partition(path: Path) -> None:
    filled(path, LogPartition(PLACE.identity, PLACE.topic, 2), 1)


def open_to_all(path: Path) -> None:
    path.chmod(0o666)


def newest_part_of_another(path: Path) -> None:
    """A `-wal` file, with which SQLite would see a state without packages."""
    rogue = path.with_name("rogue.db")
    shutil.copy(path, rogue)
    with closing(sqlite3.connect(rogue, isolation_level=None)) as connection:
        connection.execute("DELETE FROM packages")
        planted = path.with_name(path.name + "-wal")
        shutil.copy(rogue.with_name(rogue.name + "-wal"), planted)
        planted.chmod(0o666)
    rogue.unlink()


SPOILING = [
    *(truncate, scribble, empty, no_database, other_database, format_too_old, format_too_new),
    *(empty_of_other_log, other_partition, open_to_all, newest_part_of_another),
]


@pytest.mark.parametrize("spoil", SPOILING, ids=lambda spoil: spoil.__name__)
def test_what_is_no_whole_state_of_the_partition_is_discarded_with_a_line_in_the_log(
    tmp_path: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    spoil(filled(tmp_path / NAME))
    slot, file = claimed(tmp_path)
    assert file is None
    assert slot.path == tmp_path / NAME
    assert not slot.path.exists()
    assert "a state file of partition 3 is discarded" in caplog.text
    slot.release()


@pytest.mark.parametrize(
    "code",
    [
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_IOERR_SHMSIZE,
        sqlite3.SQLITE_IOERR_WRITE,
    ],
)
def test_a_state_is_not_thrown_away_for_what_passes_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = filled(tmp_path / NAME)

    def fail(*_: object, **__: object) -> None:
        error = sqlite3.OperationalError("not now")
        error.sqlite_errorcode = code
        raise error

    with monkeypatch.context() as now:
        now.setattr(sqlite3, "connect", fail)
        with pytest.raises(StateFileError, match="not now"):
            claimed(tmp_path)
    slot, file = claimed(tmp_path)
    assert slot.path == path
    assert file is not None
    file.close()
    slot.release()


def test_a_row_that_was_changed_behind_our_back_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    path = filled(tmp_path / NAME)
    victim = commands.create(1).package_id
    connection = sqlite3.connect(path)
    (body,) = connection.execute("SELECT body FROM packages WHERE package_id = ?", (victim.bytes,)).fetchone()
    spoiled = body[:-9] + bytes([body[-9] ^ 1]) + body[-8:]
    with connection:
        connection.execute("UPDATE packages SET body = ? WHERE package_id = ?", (spoiled, victim.bytes))
    connection.close()
    state = PartitionState(StateFile.open(path, PLACE))
    assert state.package(commands.create(2).package_id) is not None
    with pytest.raises(UnusableStateError):
        state.package(victim)
    assert not state.close()
    assert not path.exists()


def test_an_open_package_that_lacks_a_row_is_noticed(tmp_path: Path) -> None:
    path = filled(tmp_path / NAME)
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("DELETE FROM commands WHERE sequence = (SELECT min(sequence) FROM commands)")
    connection.close()
    state = PartitionState(StateFile.open(path, PLACE))
    with pytest.raises(UnusableStateError, match="lacks rows"):
        state.package(commands.create(0).package_id)
    state.discard()


@pytest.fixture
def held(tmp_path: Path) -> Iterator[FileLock]:
    lock = FileLock(tmp_path / f"{NAME}.lock")
    assert lock.take()
    yield lock
    lock.release()


def test_a_file_that_is_held_is_not_waited_for_and_not_touched(tmp_path: Path, held: FileLock) -> None:
    filled(tmp_path / NAME)
    before = (tmp_path / NAME).read_bytes()
    slot, file = claimed(tmp_path)
    assert slot.path.name == "t.events-3.1.db"
    assert file is None
    another, _ = claimed(tmp_path)
    assert another.path.name == "t.events-3.2.db"
    for taken in (slot, another):
        taken.release()
    assert (tmp_path / NAME).read_bytes() == before
    assert held.held


def test_of_several_files_that_are_free_the_furthest_is_taken_and_the_others_are_removed(tmp_path: Path) -> None:
    filled(tmp_path / NAME, packages=2)
    filled(tmp_path / "t.events-3.1.db", packages=5)
    filled(tmp_path / "t.events-3.2.db", packages=3)
    filled(tmp_path / "t.events-30.db", LogPartition(PLACE.identity, PLACE.topic, 30), packages=9)
    slot, file = claimed(tmp_path)
    assert file is not None
    assert slot.path.name == "t.events-3.1.db"
    assert {path.name for path in tmp_path.glob("*.db")} == {"t.events-3.1.db", "t.events-30.db"}
    file.close()
    slot.release()


def lacking(*positions: int) -> Callable[[Witness], Loss | None]:
    """What a log lost that has no record before these positions, and none of another log."""

    def lost(witness: Witness) -> Loss | None:
        lacks = witness.log != PLACE.identity or witness.anchor.next_offset in positions
        return Loss(PLACE.partition, witness, "ends before") if lacks else None

    return lost


def test_a_state_that_proves_a_loss_is_kept_and_found_each_time(tmp_path: Path) -> None:
    """The partition goes on with the furthest of the others, or with a fresh one."""
    filled(tmp_path / NAME, packages=5)
    filled(tmp_path / "t.events-3.1.db", packages=3)
    filled(tmp_path / "t.events-3.2.db", LogPartition(uuid4(), PLACE.topic, PLACE.partition), 2)
    before = {path: path.read_bytes() for path in (tmp_path / NAME, tmp_path / "t.events-3.2.db")}
    for expected in ("t.events-3.1.db", "t.events-3.1.db"):
        found = claim(tmp_path, PLACE, lacking(12))
        assert found.slot.path.name == expected
        assert {loss.witness.where for loss in found.losses} == set(map(str, before))
        assert {loss.offset for loss in found.losses} == {11, 4}
        if found.file is not None:
            found.file.close()
        again = claim(tmp_path, PLACE, lacking(12))  # by another process at the same time
        assert again.slot.path.name not in (expected, *(path.name for path in before))
        again.slot.release()
        found.slot.release()
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("saved", [False, True])
def test_a_late_retry_is_told_what_is_known_and_not_that_nothing_was_recorded(tmp_path: Path, saved: bool) -> None:
    state = PartitionState(StateFile.create(tmp_path / NAME, PLACE))
    writing = Writing(state)
    made = commands.create("old")
    retries: list[Command] = [made, commands.ingest(made.package_id, "a"), commands.finalize(made.package_id)]
    for command in retries:
        writing.run(command)
    if saved:
        state.save()
    writing.now += ANSWERS_KEPT_MICROS
    writing.run(commands.create("new"))
    for command in [*retries, commands.ingest(made.package_id, "b", name="new"), replace(made, subject="other")]:
        with pytest.raises(AnswerExpiredError, match=r"24 hours ago, .* manifest blake3:") as caught:
            decide(state.package(command.package_id, command.command_id), command, writing.now, Limits())
        assert str(command.command_id) in caught.value.detail
        assert caught.value.facts["finalized_at"] == 1_000
    state.discard()


def rows_of(path: Path, table: str) -> int:
    connection = sqlite3.connect(path)
    try:
        (count,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    finally:
        connection.close()
    return int(count)


def come_round(state: PartitionState) -> None:
    """Let the state look at every package, from where it happens to be and from the beginning."""
    for _ in range(3):
        state._put_away_at = 0.0
        state.put_away()


def test_an_open_package_that_nothing_came_to_for_a_year_costs_a_row_and_takes_no_command(tmp_path: Path) -> None:
    state = PartitionState(StateFile.create(tmp_path / NAME, PLACE))
    writing = Writing(state)
    idle, busy = commands.create("idle"), commands.create("busy")
    recorded = commands.ingest(idle.package_id, *(f"{n}" for n in range(300)))
    first: list[Command] = [idle, recorded, busy]
    for command in first:
        writing.run(command)
    writing.now += MAX_IDLE_MICROS
    writing.run(commands.ingest(busy.package_id, "a", name="a"))
    state.save()
    come_round(state)
    assert rows_of(tmp_path / NAME, "commands") == 2
    writing.run(commands.ingest(idle.package_id, "just in time", name="b"))
    writing.now += MAX_IDLE_MICROS + 1
    writing.run(commands.create("new"))
    come_round(state)
    assert rows_of(tmp_path / NAME, "commands") == 2, "what is not saved yet was put away"
    state.save()
    come_round(state)
    assert rows_of(tmp_path / NAME, "commands") == 1
    assert not {idle.package_id, busy.package_id} & state._packages.keys()
    assert state.close()

    state = PartitionState(StateFile.open(tmp_path / NAME, PLACE))
    late: list[Command] = [idle, recorded, commands.ingest(idle.package_id, "new"), commands.finalize(idle.package_id)]
    for command in late:
        package = state.package(command.package_id, command.command_id)
        with pytest.raises(PackageAbandonedError, match="365 days") as caught:
            decide(package, command, writing.now, Limits())
        assert caught.value.facts == {"package_id": str(idle.package_id)}
    assert not state.away(idle.package_id)
    state.discard()


def test_an_event_of_a_package_that_was_put_away_sends_the_state_back_to_the_log(tmp_path: Path) -> None:
    """A gateway of a release without the rule may have gone on with it."""
    state = PartitionState(StateFile.create(tmp_path / NAME, PLACE))
    writing = Writing(state)
    idle = commands.create("idle")
    writing.run(idle)
    package = state.package(idle.package_id)
    (event,) = decide(package, commands.ingest(idle.package_id, "a"), writing.now, Limits())
    writing.now += MAX_IDLE_MICROS + 1
    writing.run(commands.create("new"))
    state.apply(event)  # not put away yet, although it takes no command: so a history with such a pause is read
    state.confirm(state.next_offset, b"late")
    assert state._whole(idle.package_id) is package
    state.discard()

    state = PartitionState(StateFile.create(tmp_path / NAME, PLACE))
    writing = Writing(state)
    writing.run(idle)
    writing.now += MAX_IDLE_MICROS + 1
    writing.run(commands.create("new"))
    state.save()
    come_round(state)
    with pytest.raises(UnusableStateError, match="away, and an event of it followed"):
        state.apply(event)
    state.close()
    assert not (tmp_path / NAME).exists()


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with pytest.raises(state_file_module.StateFileError, match="ARTIFACT_STORE_STATE_DIR"):
        claimed(tmp_path / "state")


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    """SQLite would take a `-wal` file that lies there for the newest part of the state."""
    folder = tmp_path / "state"
    filled(folder / NAME)
    folder.chmod(mode)
    with pytest.raises(ExposedFolderError, match=r"ARTIFACT_STORE_STATE_DIR .* other users may write to it"):
        claimed(folder)
    folder.chmod(0o700)
    slot, file = claimed(folder)
    assert file is not None
    file.close()
    slot.release()


def test_a_folder_of_another_user_or_open_to_a_strange_group_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "state"
    filled(folder / NAME)
    own_group = os.getegid()
    folder.chmod(0o2770)  # as Kubernetes makes it for the group of a pod
    slot, file = claimed(folder)
    assert file is not None
    file.close()
    slot.release()
    monkeypatch.setattr(os, "getegid", lambda: own_group + 1)
    with pytest.raises(ExposedFolderError):
        claimed(folder)
    folder.chmod(0o700)
    os.chown(folder, *ANOTHER) if os.geteuid() == 0 else monkeypatch.setattr(os, "geteuid", lambda: ANOTHER[0])
    with pytest.raises(ExposedFolderError, match="belongs to another user"):
        claimed(folder)


async def test_a_gateway_does_not_start_on_a_folder_that_others_may_write_to(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    folder.chmod(0o777)
    settings = Settings(log_url="kafka://127.0.0.1:1/t", state_dir=folder)
    log = KafkaLog(settings)

    async def put_manifest(_manifest: bytes) -> None:
        raise AssertionError("nothing is finalized")

    writer = KafkaWriter(settings, log, limits=Limits(), put_manifest=put_manifest)
    with pytest.raises(ConfigurationError, match="ARTIFACT_STORE_STATE_DIR"):
        await writer.start()
    await writer.close()
    await log.close()


def test_a_copy_of_a_state_in_use_is_a_whole_state(tmp_path: Path) -> None:
    state = PartitionState(StateFile.open(filled(tmp_path / NAME), PLACE))
    writing = Writing(state)
    made = commands.create("new")
    writing.run(made)
    state.save()
    writing.run(commands.ingest(made.package_id, "not saved"))
    copy_file(tmp_path / NAME, tmp_path / "copy.db")
    copy = PartitionState(StateFile.open(tmp_path / "copy.db", PLACE))
    found = copy.package(made.package_id)
    assert found is not None
    assert (found.sequence, copy.next_offset) == (1, state.next_offset - 1)
    copy.close()
    state.close()


def test_answers_go_a_day_after_finalization_and_the_package_stays_finalized(tmp_path: Path) -> None:
    path = filled(tmp_path / NAME)
    state = PartitionState(StateFile.open(path, PLACE))
    writing = Writing(state, now=1_000 + ANSWERS_KEPT_MICROS - 1)
    package, retry = commands.create(1).package_id, commands.finalize(commands.create(1).package_id)
    writing.run(commands.create("almost a day later"))
    state.save()
    kept = state.package(package, retry.command_id)
    assert kept is not None
    assert acknowledge(kept, retry).sequence == 10
    writing.now += 1
    writing.run(commands.create("a day later"))
    state.save()
    gone = state.package(package, retry.command_id)
    assert gone is not None
    assert (gone.status, gone.sequence, gone.commands) == ("finalized", 10, {})
    assert (gone.created.retention_class, gone.created.retention_days) == ("report", 1825)
    state.close()
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT count(*) FROM answers").fetchone() == (0,)
    assert connection.execute("SELECT count(*) FROM packages").fetchone() == (PACKAGES + 2,)
    connection.close()


def test_a_command_that_came_in_parts_is_answered_while_its_rows_are_made_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_file_module, "AT_ONCE", 3)
    state = PartitionState(StateFile.create(tmp_path / NAME, PLACE))
    writing, made = Writing(state), commands.create()
    parts = commands.ingest(made.package_id, *"abcdef", name="parts")
    ended, after = commands.finalize(made.package_id), commands.ingest(made.package_id, "g", name="after")
    writing.run(made)
    events = decide(state.package(made.package_id), parts, writing.now, Limits())
    for some in (events[:2], events[2:3], events[3:]):
        for event in some:
            state.apply(event)
        state.confirm(state.next_offset, b"record %d" % state.next_offset)
        state.save()
    writing.run(after)
    expected = {c: acknowledge(_known(state, c), c) for c in (parts, after)}
    writing.run(ended)
    state.save()
    turns = 0
    while True:
        for command, answer in expected.items():
            assert not decide(_known(state, command), command, writing.now, Limits())
            assert acknowledge(_known(state, command), command) == answer
        for changed in range(6):
            files = [stored("other") if n == changed else file for n, file in enumerate(parts.files)]
            other = replace(parts, files=tuple(files))
            with pytest.raises(CommandReusedError):
                decide(_known(state, other), other, writing.now, Limits())
        unwritable = replace(parts, files=(replace(parts.files[0], blake3=b"short"), *parts.files[1:]))
        with pytest.raises(CommandReusedError):
            decide(_known(state, unwritable), unwritable, writing.now, Limits())
        if not state.untidy:
            break
        state.tidy()
        turns += 1
    assert turns > 2, "the rows were not made answers bit by bit"
    state.close()


def _known(state: PartitionState, command: Command) -> PackageState:
    found = state.package(command.package_id, command.command_id)
    assert found is not None
    return found


def test_only_what_is_open_and_lately_used_stays_in_memory(tmp_path: Path) -> None:
    state = PartitionState(StateFile.create(tmp_path / NAME, PLACE), max_entries=100)
    writing = Writing(state)
    made = [commands.create(n) for n in range(60)]
    for command in made:
        writing.run(command)
        writing.run(commands.ingest(command.package_id, *(f"f{n}" for n in range(8))))
    for command in made[:30]:
        writing.run(commands.finalize(command.package_id))
    state.save()
    in_memory = sum(1 + len(held.files) + len(held.commands) for held in state._packages.values())
    assert 0 < in_memory <= 100
    assert {held.status for held in state._packages.values()} == {"created"}
    for command in made[30:]:
        assert [*getattr(state.package(command.package_id), "files", {})] == [f"f{n}" for n in range(8)]
    state.close()


def test_where_a_package_lies_is_known_in_memory_and_in_the_file(tmp_path: Path) -> None:
    writing = Writing(PartitionState(StateFile.create(tmp_path / "state", PLACE), max_entries=0))
    expected: dict[UUID, PackageExtent | None] = {UUID(int=7): None}
    for n in range(4):
        made = commands.create(n)
        writing.run(made)
        writing.run(commands.ingest(made.package_id, "a", "b"))
        if n % 2:
            writing.run(commands.finalize(made.package_id))
        package = writing.state.package(made.package_id)
        assert package is not None
        expected[made.package_id] = PackageExtent(package.created_at, 4 if n % 2 else 3)
    assert {package_id: writing.state.extent(package_id) for package_id in expected} == expected
    writing.state.save()
    assert {package_id: writing.state.extent(package_id) for package_id in expected} == expected
    with closing(writing.state.beside()) as file:
        found = {package_id: file.summary_of(package_id) for package_id in expected}
    extents = {p: s and PackageExtent(s.created_at, s.sequence) for p, s in found.items()}
    assert extents == expected
    writing.state.close()


def test_a_small_open_package_is_read_back_before_it_is_decided_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = PartitionState(StateFile.open(filled(tmp_path / NAME), PLACE))
    package_id = commands.create(0).package_id
    assert not state.away(package_id)
    loads: list[UUID] = []
    monkeypatch.setattr(StateFile, "load", lambda _self, asked, *_: loads.append(asked))
    package = state.package(package_id)
    assert package is not None
    assert len(package.files) == 8
    assert loads == []
    state.close()


def test_packages_that_are_not_there_are_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing = Writing(PartitionState(StateFile.create(tmp_path / NAME, PLACE)))
    made = [commands.create(number) for number in range(3)]
    assert not any(writing.state.away(command.package_id) for command in made)
    with monkeypatch.context() as patched:
        patched.setattr(StateFile, "load", lambda *_: pytest.fail("looked for again"))
        for command in made:
            writing.run(command)
    assert all(writing.state.package(command.package_id) is not None for command in made)
    writing.state.close()


def test_a_large_package_is_saved_bit_by_bit_and_not_anew_each_time(tmp_path: Path) -> None:
    path = tmp_path / NAME
    state = PartitionState(StateFile.create(path, PLACE))
    writing = Writing(state)
    made = commands.create()
    writing.run(made)
    written, sizes = 0, [0]

    def count(text: str) -> None:
        nonlocal written
        written += len(text)

    state._file._connection.set_trace_callback(count)
    for batch in range(20):
        files = tuple(stored(f"{batch}/{n}") for n in range(100))
        writing.run(IngestFiles(made.package_id, uuid4(), "ada", files))
        state.save()
        sizes.append(written)
    state._file._connection.set_trace_callback(None)
    assert state._file.load(made.package_id, None, 0) == state.package(made.package_id)
    assert sizes[-1] - sizes[-2] < 1.2 * sizes[1]
    state.close()


@pytest.mark.parametrize("rows", [STATEMENT_ROWS - 1, STATEMENT_ROWS, STATEMENT_ROWS + 1, 3 * STATEMENT_ROWS + 1])
def test_a_checkpoint_of_many_packages_is_written_whole(tmp_path: Path, rows: int) -> None:
    """By statements of ROWS rows each and one for what is left; first new packages, then the same ones with more."""
    path = tmp_path / NAME
    writing = Writing(PartitionState(StateFile.create(path, PLACE)))
    made = [commands.create(number) for number in range(rows)]
    for command in made:
        writing.run(command)
        writing.run(commands.ingest(command.package_id, "a", "b"))
    writing.state.save()
    for number, command in enumerate(made):
        if number % 2:
            writing.run(commands.finalize(command.package_id))
        else:
            writing.run(commands.ingest(command.package_id, "c", name="more"))
    assert writing.state.close()
    again = PartitionState(StateFile.open(path, PLACE))
    found = [again.package(command.package_id) for command in made]
    assert [(f.status, f.sequence, len(f.files)) for f in found if f is not None] == [
        (FINALIZED, 4, 0) if number % 2 else (CREATED, 4, 3) for number in range(rows)
    ]
    again.close()
    with sqlite3.connect(path) as connection:
        count = connection.execute("SELECT count(DISTINCT package_id) FROM commands").fetchone()[0]
    connection.close()
    assert count == len(made[::2]), "commands of finalized packages are answers, not rows"


def test_large_rows_do_not_wait_for_many_others(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "rows.db", isolation_level=None)
    connection.execute("CREATE TABLE rows (id INTEGER, body BLOB)")
    many = Many(connection, "INSERT INTO rows VALUES {}".format, 2)
    count = "SELECT count(*) FROM rows"
    many.add(1, bytes(STATEMENT_BYTES // 2 + 1))
    assert connection.execute(count).fetchone() == (0,)
    many.add(2, bytes(STATEMENT_BYTES // 2 + 1))
    assert connection.execute(count).fetchone() == (2,)
    many.flush()
    assert connection.execute(count).fetchone() == (2,)
    connection.close()


def test_a_checkpoint_is_due_after_many_events_or_some_time_and_not_without_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = PartitionState(StateFile.create(tmp_path / NAME, PLACE))
    monkeypatch.setattr(state_module, "SAVE_EVENTS", 3)
    writing = Writing(state)
    due = []
    for n in range(3):
        writing.run(commands.create(n))
        due.append(state.save_due)
    state.save()
    monkeypatch.setattr(state_module, "SAVE_SECONDS", 0.0)
    due.append(state.save_due)
    writing.run(commands.create("one more"))
    due.append(state.save_due)
    assert due == [False, False, True, False, True]
    state.close()


def test_a_closed_state_says_nothing_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    slot, file = claimed(tmp_path)
    assert file is None
    PartitionState(StateFile.create(slot.path, PLACE)).close()
    slot.release()
    slot, found = claimed(tmp_path)
    assert found is not None
    found.close()
    slot.release()
    assert caplog.text == ""


def fill_disk(state: PartitionState) -> None:
    """Let the file grow no more, which SQLite reports as it does a full disk."""
    connection = state._file._connection
    connection.execute(f"PRAGMA max_page_count = {connection.execute('PRAGMA page_count').fetchone()[0]}")


def empty_disk(state: PartitionState) -> None:
    state._file._connection.execute(f"PRAGMA max_page_count = {2**31}")


def grow(writing: Writing, packages: range) -> None:
    for n in packages:
        made = commands.create(n)
        writing.run(made)
        writing.run(commands.ingest(made.package_id, *(f"{n}/{m}" for m in range(8))))
        if n % 2:
            writing.run(commands.finalize(made.package_id))


def known(state: PartitionState, packages: range) -> list[tuple[str, int, bytes]]:
    """What the state says of these packages, which it must know."""
    found = [state.package(commands.create(n).package_id) for n in packages]
    return [(package.status, package.sequence, package.digest) for package in found if package is not None]


def test_a_full_disk_does_not_end_a_tenure_and_nothing_is_lost_when_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = PartitionState(StateFile.open(filled(tmp_path / NAME), PLACE))
    every = range(3 * PACKAGES)
    fill_disk(state)
    with caplog.at_level(logging.WARNING):
        for n in range(PACKAGES, 3 * PACKAGES, 10):
            grow(Writing(state), range(n, n + 10))
            state.save()
    assert "full" in str(state.memory_only)
    assert caplog.text.count("kept in memory") == 1
    before = known(state, every)
    assert len(before) == len(every)
    empty_disk(state)
    assert state.close()
    assert state.memory_only is None
    reopened = PartitionState(StateFile.open(tmp_path / NAME, PLACE))
    assert known(reopened, every) == before
    reopened.close()


def test_what_a_full_disk_keeps_in_memory_is_bounded(tmp_path: Path) -> None:
    state = PartitionState(StateFile.create(tmp_path / NAME, PLACE), max_entries=200)
    fill_disk(state)
    writing = Writing(state)
    grow(writing, range(10))
    state.save()
    grow(writing, range(10, 60))
    with pytest.raises(DiskFullError):
        state.save()
    assert not state.close()


def test_a_state_that_is_in_memory_goes_back_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = PartitionState(StateFile.in_memory(tmp_path / NAME, PLACE))
    monkeypatch.setattr(state_file_module, "SPARE_BYTES", 2**62)
    grow(Writing(state), range(PACKAGES))
    state.save()
    before = known(state, range(PACKAGES))
    assert (state.memory_only is None, state.shared, list(tmp_path.iterdir())) == (False, False, [])
    monkeypatch.setattr(state_file_module, "SPARE_BYTES", 0)
    grow(Writing(state), range(PACKAGES, PACKAGES + 1))
    state.save()
    assert (state.memory_only, state.shared) == (None, True)
    assert known(state, range(PACKAGES)) == before
    assert state.close()
    reopened = PartitionState(StateFile.open(tmp_path / NAME, PLACE))
    assert known(reopened, range(PACKAGES)) == before
    reopened.close()


def test_what_is_irregular_in_a_partition_is_kept_with_its_state(tmp_path: Path) -> None:
    writing = Writing(PartitionState(StateFile.create(tmp_path / NAME, PLACE)))
    made = commands.create()
    created = decide(None, made, 1_000, Limits())[0]
    writing.run(made)
    writing.state.apply(created)  # it comes again
    gap = replace(created, sequence=7)
    with pytest.raises(CorruptError, match="created twice"):
        writing.state.apply(gap)
    writing.state.quarantine(gap, "a gap")
    writing.state.apply(replace(gap, sequence=8))
    skipped = LogSkipped(PLACE.identity, PLACE.partition, 5, bytes(32), 18, "no event", "")
    event = administrative_event(skipped, None, created_at=2_000, actor="ada", command_id=UUID(int=1))
    writing.state.note_administrative(event)
    writing.state.note_skipped()
    elsewhere = administrative_event(
        replace(skipped, log=UUID(int=9)), None, created_at=3_000, actor="ada", command_id=UUID(int=1)
    )
    writing.state.note_administrative(elsewhere)  # of the log that this one is a copy of
    writing.state.confirm(9, b"the last")
    assert writing.state.close()
    state = PartitionState(StateFile.open(tmp_path / NAME, PLACE))
    kept = Irregular(AdministrativeHead.of(event), 1, 1, {made.package_id: "a gap"})
    assert (state.irregular, state.last_created_at) == (kept, 3_000)
    state.close()


def golden_history() -> list[Command]:
    """The commands in `golden/format-5.db`, which release 0b69710 wrote. They lead to rows in every table.

    One package is open, one is finalized, and one is finalized with commands that `tidy` has not made answers of yet.
    """
    opened, small, large = (commands.create(name) for name in ("open", "small", "large"))
    return [
        *(opened, commands.ingest(opened.package_id, "a", "b", name="open files")),
        *(small, commands.ingest(small.package_id, "a", name="small file")),
        *(commands.finalize(small.package_id, "small end"), large),
        commands.ingest(large.package_id, *(str(n) for n in range(30)), name="large files"),
        commands.finalize(large.package_id, "large end"),
    ]


def answers_of_all(state: PartitionState, history: Sequence[Command]) -> list[Acknowledgement]:
    """What retries of these commands are told."""
    answers = []
    for command in history:
        package = _known(state, command)
        assert list(decide(package, command, 1_000, Limits())) == [], "it would be recorded a second time"
        answers.append(acknowledge(package, command))
    return answers


def test_a_file_of_the_format_before_is_converted_and_continued_from(tmp_path: Path) -> None:
    shutil.copy(GOLDEN, tmp_path / NAME)
    slot, file = claimed(tmp_path)
    assert file is not None
    assert file.irregular == Irregular()
    converted, fresh = PartitionState(file), PartitionState(StateFile.create(tmp_path / "fresh.db", PLACE))
    history, writing = golden_history(), [Writing(converted), Writing(fresh)]
    for command in history:
        writing[1].run(command)
    fresh.save()
    more: list[Command] = [
        commands.ingest(history[0].package_id, "c", name="more"),
        commands.finalize(history[0].package_id, "open end"),
        commands.create("new"),
    ]
    assert converted.anchor == fresh.anchor
    assert answers_of_all(converted, history) == answers_of_all(fresh, history)
    for command in more:
        for each in writing:
            each.run(command)
    history += more
    assert converted.anchor == fresh.anchor
    assert answers_of_all(converted, history) == answers_of_all(fresh, history)
    while converted.untidy:
        converted.tidy()
    assert answers_of_all(converted, history) == answers_of_all(fresh, history)
    assert converted.close()
    assert format_of(slot.path) == FORMAT
    again = PartitionState(StateFile.open(slot.path, PLACE))
    assert answers_of_all(again, history) == answers_of_all(fresh, history)
    for state in (again, fresh):
        state.discard()
    slot.release()


def format_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        (found,) = connection.execute("PRAGMA user_version").fetchone()
    return int(found)
