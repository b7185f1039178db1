"""The contract of the log of record, which both adapters must pass: commands and their answers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import chain, count
from uuid import UUID, uuid4

import pytest

from artifact_store.errors import (
    ArtifactStoreError,
    CommandReusedError,
    DuplicateRelativePathError,
    IllegalPackageStateError,
    InvalidPathError,
    InvalidRequestError,
    PackageNotFoundError,
    TooLargeError,
    UnknownRetentionClassError,
)
from artifact_store.events import FILE_INGESTED, PACKAGE_CREATED, PACKAGE_FINALIZED, PackageFinalized, RecordedEvent
from artifact_store.manifest import content_key, manifest_digest
from artifact_store.manifest import decode as decode_manifest
from artifact_store.models import Acknowledgement
from artifact_store.position import Position
from services.core.decide import Command
from services.runtime.clock import system_clock
from tests.commands import create, finalize, ingest, stored
from tests.contract.log_invariants import assert_recorded_once, read_valid
from tests.contract.log_stage import (
    Done,
    Stage,
    checked,
    fill,
    ready,
    settled,
)

LONG = "x" * 900
"""Fills a path, so that few files make a large manifest."""


async def test_a_package_s_commands_become_its_events_in_order(stage: Stage) -> None:
    done = await fill(stage, packages=1)

    events = await read_valid(stage.log)

    assert [event.event_type for event in events] == [PACKAGE_CREATED, *[FILE_INGESTED] * 3, PACKAGE_FINALIZED]
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5]
    assert_recorded_once(events, done)
    manifest = events[-1].payload
    assert isinstance(manifest, PackageFinalized)
    assert manifest.manifest is not None
    assert done[-1][1].manifest_digest == manifest_digest(manifest.manifest) == events[-1].payload_digest
    assert [file.relative_path for file in decode_manifest(manifest.manifest).files] == ["0.txt", "1.txt", "2.txt"]


async def test_what_is_acknowledged_can_be_read_at_once(stage: Stage) -> None:
    made = create()
    async with stage.writer() as writer:
        for number in range(5):
            before = len([event async for event in stage.log.read()])
            command = ingest(made.package_id, f"{number}", name=number) if number else made
            await settled(writer, command)
            assert len([event async for event in stage.log.read()]) == before + 1


async def test_an_answer_says_from_where_its_partition_is_read_on(stage: Stage) -> None:
    made = create()
    together = [ingest(made.package_id, f"{n}-a", f"{n}-b", name=f"{n}") for n in range(20)]
    async with stage.writer() as writer:
        done: Done = [(made, await settled(writer, made))]
        others = [create(f"other {n}") for n in range(5)]
        commands: list[Command] = [*together, *others]
        done += zip(commands, await asyncio.gather(*(settled(writer, command) for command in commands)), strict=True)
        last = {(event.package_id, event.sequence): event.position async for event in stage.log.read()}
        for command, answer in done:
            partition = stage.log.partition_of(command.package_id)
            after = last[answer.package_id, answer.sequence]
            assert answer.position == Position(after.log, {partition: after.offsets[partition]})
            again = await settled(writer, command)
            assert again.position in (answer.position, None)


async def test_a_repeated_command_gets_the_first_answer_and_adds_nothing(stage: Stage) -> None:
    done = await fill(stage)
    before = await read_valid(stage.log)

    async with stage.writer() as one, stage.writer() as two:
        for writer in (one, two, one):
            for command, answer in done:
                assert await settled(writer, command) == answer

    assert await read_valid(stage.log) == before


async def test_the_same_command_from_many_callers_at_once_is_done_once(stage: Stage) -> None:
    made = create()
    command = ingest(made.package_id, "a", "b")
    async with stage.writer() as one, stage.writer() as two:
        await settled(one, made)
        answers = await asyncio.gather(*(settled(writer, command) for writer in [one, two] * 10))

    assert len(set(answers)) == 1
    assert_recorded_once(await read_valid(stage.log), [(command, answers[0])])


async def test_a_command_id_with_another_request_is_refused(stage: Stage) -> None:
    made = create()
    command = ingest(made.package_id, "a", "b")
    last = finalize(made.package_id)
    others: list[Command] = [
        replace(made, subject="another"),
        replace(command, files=command.files[:1]),
        replace(command, files=(stored("a"), stored("b", b"other bytes"))),
        replace(command, actor="bob"),
        ingest(made.package_id, "c", name="finalize"),
        finalize(made.package_id, name="ingest"),
    ]
    async with stage.writer() as writer:
        for first_time in (made, command, last):
            await settled(writer, first_time)
        for other in others:
            with pytest.raises(CommandReusedError):
                await settled(writer, other)

    assert len(await read_valid(stage.log)) == 4


async def test_a_refused_command_leaves_the_log_as_it_was(stage: Stage) -> None:
    open_, closed, missing = create("open"), create("closed"), uuid4()
    refused: list[tuple[Command, type[ArtifactStoreError], str]] = [
        (create("a", retention_class="forever"), UnknownRetentionClassError, "unknown retention class"),
        (replace(create("a"), name=""), InvalidRequestError, "name"),
        (create("a", producer="x\n"), InvalidRequestError, "producer"),
        (create("a", actor="x" * 257), InvalidRequestError, "actor"),
        (create("a", metadata='{"k":"' + "v" * 70_000 + '"}'), TooLargeError, "metadata"),
        (ingest(missing, "a", name="a"), PackageNotFoundError, str(missing)),
        (ingest(open_.package_id, name="a"), InvalidRequestError, "file"),
        (ingest(open_.package_id, "new", "here", name="a"), DuplicateRelativePathError, "here"),
        (ingest(open_.package_id, "twice", "twice", name="a"), DuplicateRelativePathError, "twice"),
        (ingest(open_.package_id, "new", "../x", name="a"), InvalidPathError, "segment"),
        (ingest(open_.package_id, "1", "2", "3", name="a"), TooLargeError, "3 files"),
        (
            replace(ingest(open_.package_id, "a", name="a"), files=(stored("a", media_type=""),)),
            InvalidRequestError,
            "media_type",
        ),
        (
            replace(ingest(open_.package_id, "a", name="a"), files=(replace(stored("a"), size_bytes=1 << 50),)),
            TooLargeError,
            "bytes",
        ),
        (ingest(closed.package_id, "a", name="a"), IllegalPackageStateError, "finalized"),
        (finalize(closed.package_id, name="a"), IllegalPackageStateError, "finalized"),
        (finalize(missing, name="a"), PackageNotFoundError, str(missing)),
    ]
    async with stage.writer(max_files_per_package=3) as writer:
        for command in (open_, ingest(open_.package_id, "here"), closed, finalize(closed.package_id)):
            await settled(writer, command)
        before = await read_valid(stage.log)

        for command, error, text in refused:
            with pytest.raises(error, match=text):
                await settled(writer, command)

        assert await read_valid(stage.log) == before
        # No refusal stays behind: the same command id may still be used.
        await settled(writer, ingest(open_.package_id, "1", "2", name="a"))
    assert len(await read_valid(stage.log)) == len(before) + 2


async def test_a_refused_command_takes_nothing_away_from_its_neighbours(stage: Stage) -> None:
    made = create()
    good = [ingest(made.package_id, f"{n}", name=f"good {n}") for n in range(40)]
    bad = [ingest(made.package_id, "../x", f"{n}", name=f"bad {n}") for n in range(40)]
    async with stage.writer() as writer:
        await settled(writer, made)
        mixed: list[Command] = [command for pair in zip(good, bad, strict=True) for command in pair]
        answers = await asyncio.gather(*(settled(writer, command) for command in mixed), return_exceptions=True)

    assert {type(answer) for answer in answers[1::2]} == {InvalidPathError}
    done = [(c, a) for c, a in zip(good, answers[::2], strict=True) if isinstance(a, Acknowledgement)]
    assert len(done) == len(good)
    assert_recorded_once(await read_valid(stage.log), done)


async def test_two_hundred_callers_at_once_are_all_answered_and_recorded_once(stage: Stage) -> None:
    async def call(number: int) -> Done:
        made = create(f"p{number}")
        commands: list[Command] = [made, ingest(made.package_id, "a", "b"), finalize(made.package_id)]
        return [(command, await settled(writer, command)) for command in commands]

    async with stage.writer() as writer:
        done = list(chain.from_iterable(await asyncio.gather(*(call(number) for number in range(200)))))

    events = await read_valid(stage.log)
    assert len(events) == 200 * 4
    assert_recorded_once(events, done)


async def test_two_writers_race_for_the_same_paths_and_each_path_is_won_once(stage: Stage) -> None:
    packages = [create(f"p{n}") for n in range(4)]
    done: Done = []
    lost = 0

    async def race(name: str, package_id: UUID, number: int) -> None:
        nonlocal lost
        command = ingest(package_id, f"{number}/a", f"{number}/b", name=f"{name} {number}")
        try:
            done.append((command, await settled(writers[name], command)))
        except DuplicateRelativePathError:
            lost += 1

    async with stage.writer() as one, stage.writer() as two:
        writers = {"one": one, "two": two}
        await asyncio.gather(*(settled(one, made) for made in packages))
        await asyncio.gather(*(race(w, made.package_id, n) for n in range(25) for made in packages for w in writers))

    events = await read_valid(stage.log)
    assert len(done) == lost == 100
    assert len(events) == 4 + 200
    assert_recorded_once(events, done)


async def test_two_writers_finalize_a_package_once_and_nothing_comes_after(stage: Stage) -> None:
    made = create()
    async with stage.writer() as one, stage.writer() as two:
        await settled(one, made)
        ends: list[Command] = [finalize(made.package_id, name=f"end {n}") for n in range(6)]
        files: list[Command] = [ingest(made.package_id, f"{n}", name=n) for n in range(30)]
        writers = [one, two] * 18
        answers = await asyncio.gather(
            *(settled(w, command) for w, command in zip(writers, files[:15] + ends + files[15:], strict=True)),
            return_exceptions=True,
        )

    events = await read_valid(stage.log)
    finalized = [answer for answer in answers[15:21] if isinstance(answer, Acknowledgement)]
    refused = [answer for answer in answers if not isinstance(answer, Acknowledgement)]
    assert len(finalized) == 1
    assert {type(answer) for answer in refused} <= {IllegalPackageStateError}
    assert len(events) == 1 + len(answers) - len(refused)
    assert (events[-1].event_type, finalized[0].sequence) == (PACKAGE_FINALIZED, len(events))


async def test_check_ingest_says_what_an_ingest_would_meet(stage: Stage) -> None:
    made, missing = create(), uuid4()
    async with stage.writer(max_files_per_package=3) as writer:
        await settled(writer, made)
        command = ingest(made.package_id, "a", "b")
        assert await checked(writer, made.package_id, "a", "b") == made.retention_class
        await settled(writer, command)

        await checked(writer, made.package_id, "c")
        await checked(writer, made.package_id, "a", command_id=command.command_id)
        for package_id, paths, error in (
            (missing, ["a"], PackageNotFoundError),
            (made.package_id, ["c", "a"], DuplicateRelativePathError),
            (made.package_id, ["c", "d"], TooLargeError),
            (made.package_id, ["/c"], InvalidPathError),
        ):
            with pytest.raises(error):
                await checked(writer, package_id, *paths)
        await settled(writer, finalize(made.package_id))
        with pytest.raises(IllegalPackageStateError):
            await checked(writer, made.package_id, "c")

    assert len(await read_valid(stage.log)) == 4


async def test_a_large_manifest_is_durable_before_its_event_can_be_read(stage: Stage) -> None:
    stored_manifests: list[bytes] = []
    seen_before: list[RecordedEvent] = []

    async def put_manifest(manifest: bytes) -> None:
        await asyncio.sleep(0.05)
        seen_before.extend([event async for event in stage.log.read()])
        stored_manifests.append(manifest)

    made = create()
    async with stage.writer(put_manifest=put_manifest) as writer:
        await settled(writer, made)
        await settled(writer, ingest(made.package_id, *(f"{n}/{LONG}" for n in range(500))))
        answer = await settled(writer, finalize(made.package_id))

    events = await read_valid(stage.log)
    payload = events[-1].payload
    assert isinstance(payload, PackageFinalized)
    assert answer.manifest_digest == manifest_digest(stored_manifests[-1]) == events[-1].payload_digest
    assert (payload.manifest, payload.manifest_key) == (None, content_key(events[-1].payload_digest))
    assert {event.event_type for event in seen_before} == {PACKAGE_CREATED, FILE_INGESTED}


async def test_a_manifest_that_cannot_be_stored_leaves_its_package_open(stage: Stage) -> None:
    class StoreIsFullError(TooLargeError):
        pass

    async def put_manifest(manifest: bytes) -> None:
        raise StoreIsFullError("full")

    made, other = create(), create("other")
    async with stage.writer(put_manifest=put_manifest) as writer:
        await settled(writer, made)
        await settled(writer, ingest(made.package_id, *(f"{n}/{LONG}" for n in range(500))))
        with pytest.raises(StoreIsFullError):
            await settled(writer, finalize(made.package_id))
        await settled(writer, ingest(made.package_id, "one more", name="one more"))
        await settled(writer, other)

    assert len(await read_valid(stage.log)) == 503


async def test_times_never_step_back_even_when_the_clock_does(stage: Stage) -> None:
    now = system_clock()
    ticks = count(now, -100_000)
    async with stage.writer(clock=lambda: next(ticks)) as one:
        for number in range(10):
            await settled(one, create(f"one {number}"))
    async with stage.writer(clock=lambda: now - 120_000_000) as two:
        for number in range(10):
            made = create(f"two {number}")
            await settled(two, made)
            await settled(two, finalize(made.package_id))

    assert len(await read_valid(stage.log)) == 30


async def test_reading_can_begin_at_a_time(stage: Stage) -> None:
    await fill(stage, packages=3)
    events = sorted([event async for event in stage.log.read()], key=lambda event: event.created_at)
    for at in (0, events[4].created_at, events[-1].created_at, events[-1].created_at + 1_000):
        start = await stage.log.at_time(at)
        found = {event.event_id async for event in stage.log.read(start)}
        needed = {event.event_id for event in events if event.created_at >= at}
        same_millisecond = {event.event_id for event in events if event.created_at // 1_000 == at // 1_000}
        assert needed <= found <= needed | same_millisecond


async def test_closing_a_writer_finishes_what_it_accepted(stage: Stage) -> None:
    made = create()
    async with stage.writer() as writer:
        await ready(writer)
        await settled(writer, made)
        commands = [ingest(made.package_id, f"{n}", name=n) for n in range(50)]
        answers = [asyncio.ensure_future(writer.submit(command)) for command in commands]
        await asyncio.sleep(0)  # lets every task hand its command over
    found = await asyncio.gather(*answers)

    assert_recorded_once(await read_valid(stage.log), list(zip(commands, found, strict=True)))


async def test_a_started_writer_becomes_ready_and_says_which_partitions_it_owns(stage: Stage) -> None:
    async with stage.writer() as writer:
        await ready(writer)
        status = await writer.status()

    assert [found.partition for found in status] == list(range(await stage.log.partitions()))
    assert all(found.owner is not None and found.since is not None for found in status)
