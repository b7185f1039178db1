"""Each rule of `decide`: what is rejected with which words, and the answers to retries and torn commands."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifact_store.errors import (
    ArtifactStoreError,
    CommandReusedError,
    CorruptError,
    DuplicateRelativePathError,
    IllegalPackageStateError,
    InvalidPathError,
    InvalidRequestError,
    PackageAbandonedError,
    PackageNotFoundError,
    PathConflictError,
    PushBackError,
    TooLargeError,
    UnknownRetentionClassError,
)
from artifact_store.events import Event, PackageCreated, PackageFinalized
from artifact_store.manifest import manifest_digest
from schemas.digests import event_digest
from schemas.runs import FileRun
from services.core.decide import (
    MAX_IDLE_MICROS,
    Command,
    IngestFiles,
    IngestTogether,
    Limits,
    acknowledge,
    check_ingest,
    claim_check,
    decide,
)
from services.core.state import PackageState, evolve, evolve_all
from tests import commands

LIMITS = Limits()
CREATE = commands.create()
PACKAGE = CREATE.package_id


def after(*run: Command, limits: Limits = LIMITS) -> PackageState:
    state: PackageState | None = None
    for command in run:
        for event in decide(state, command, 1_000, limits):
            state = evolve(state, event)
    assert state is not None
    return state


def test_an_unknown_retention_class_is_a_value_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown retention class") as caught:
        decide(None, commands.create(retention_class="forever"), 0, LIMITS)
    assert isinstance(caught.value, UnknownRetentionClassError)
    assert "raw-evidence" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "days"),
    [("raw-evidence", 3650), ("report", 1825), ("build-output", 90), ("scratch", 7), ("permanent", None)],
)
def test_the_event_records_the_period_that_the_class_stands_for(name: str, days: int | None) -> None:
    (event,) = decide(None, commands.create(retention_class=name), 0, LIMITS)
    assert isinstance(event.payload, PackageCreated)
    assert event.payload.retention_days == days


@pytest.mark.parametrize("field", ["name", "producer", "subject", "actor"])
@pytest.mark.parametrize("value", ["", "x" * 257, "a\nb", "a\x00b", "a\x7fb", "a\x85b", "\ud800"])
def test_a_text_that_breaks_its_rule_is_refused_by_name(field: str, value: str) -> None:
    command = commands.create()
    broken = {field: value}
    with pytest.raises(InvalidRequestError, match=field):
        decide(None, replace(command, **broken), 0, LIMITS)  # type: ignore[arg-type] # only text fields are changed


def test_oversized_metadata_is_refused() -> None:
    with pytest.raises(TooLargeError, match="metadata"):
        decide(None, commands.create(metadata='{"k":"' + "v" * 65_536 + '"}'), 0, LIMITS)


@pytest.mark.parametrize("metadata", ["", "x", "[]", "1", '{"a":1e999}', '{"a":9007199254740993}', '{"a":"\\ud800"}'])
def test_metadata_that_no_reader_takes_is_refused(metadata: str) -> None:
    with pytest.raises(InvalidRequestError, match="metadata"):
        decide(None, commands.create(metadata=metadata), 0, LIMITS)


def test_metadata_that_the_log_could_not_take_is_refused_even_when_the_setting_allows_it() -> None:
    roomy = Limits(max_metadata_bytes=10_000_000)
    with pytest.raises(TooLargeError, match="larger than the log takes"):
        decide(None, commands.create(metadata='{"k":"' + "v" * 1_000_000 + '"}'), 0, roomy)


def test_files_need_a_package_that_exists_and_is_open() -> None:
    with pytest.raises(PackageNotFoundError):
        decide(None, commands.ingest(uuid4(), "a"), 0, LIMITS)
    with pytest.raises(IllegalPackageStateError, match="finalized"):
        decide(after(CREATE, commands.finalize(PACKAGE)), commands.ingest(PACKAGE, "a"), 0, LIMITS)


def test_a_path_is_ingested_once() -> None:
    state = after(CREATE, commands.ingest(PACKAGE, "a"))
    with pytest.raises(DuplicateRelativePathError):
        decide(state, commands.ingest(PACKAGE, "a", name="other"), 0, LIMITS)
    with pytest.raises(DuplicateRelativePathError):
        decide(state, commands.ingest(PACKAGE, "b", "b", name="twice"), 0, LIMITS)


def test_a_command_of_many_files_is_all_or_nothing() -> None:
    state = after(CREATE, commands.ingest(PACKAGE, "a"))
    with pytest.raises(DuplicateRelativePathError):
        decide(state, commands.ingest(PACKAGE, "new", "a", name="mixed"), 0, LIMITS)
    assert set(state.files) == {"a"}


def test_a_package_takes_no_more_files_than_the_limit() -> None:
    limits = Limits(max_files_per_package=2)
    state = after(CREATE, commands.ingest(PACKAGE, "a", "b"), limits=limits)
    with pytest.raises(TooLargeError, match="at most 2 files"):
        decide(state, commands.ingest(PACKAGE, "c", name="more"), 0, limits)


def test_an_empty_package_may_be_finalized_but_only_once() -> None:
    state = after(CREATE, commands.finalize(PACKAGE))
    assert acknowledge(state, commands.finalize(PACKAGE)).manifest_digest == state.manifest_digest
    with pytest.raises(IllegalPackageStateError):
        decide(state, commands.finalize(PACKAGE, name="again"), 0, LIMITS)


def test_a_retry_becomes_nothing_and_gets_the_first_answer() -> None:
    ingest = commands.ingest(PACKAGE, "a", "b")
    state = after(CREATE, ingest)
    first = acknowledge(state, ingest)
    for event in decide(state, commands.ingest(PACKAGE, "c", name="later"), 0, LIMITS):
        evolve(state, event)
    assert decide(state, ingest, 0, LIMITS) == ()
    assert acknowledge(state, ingest) == first


def test_a_command_id_with_another_request_is_refused() -> None:
    state = after(CREATE, commands.ingest(PACKAGE, "a"))
    for other in (
        commands.ingest(PACKAGE, "b"),
        commands.ingest(PACKAGE, "a", "b"),
        commands.ingest(PACKAGE, "a", actor="eve"),
        IngestFiles(PACKAGE, commands.command_id("ingest"), "ada", (commands.stored("a", b"other bytes"),)),
        commands.finalize(PACKAGE, name="ingest"),
    ):
        with pytest.raises(CommandReusedError):
            decide(state, other, 0, LIMITS)


def test_the_check_before_the_body_says_what_decide_would_say() -> None:
    state = after(CREATE, commands.ingest(PACKAGE, "a"))
    assert check_ingest(state, PACKAGE, ["b"], None, 1_000, LIMITS) == "report"
    assert check_ingest(state, PACKAGE, ["a"], commands.command_id("ingest"), 1_000, LIMITS) == "report"
    with pytest.raises(DuplicateRelativePathError):
        check_ingest(state, PACKAGE, ["a"], uuid4(), 1_000, LIMITS)
    with pytest.raises(InvalidPathError):
        check_ingest(state, PACKAGE, ["../a"], None, 1_000, LIMITS)
    with pytest.raises(PackageNotFoundError):
        check_ingest(None, PACKAGE, ["a"], None, 1_000, LIMITS)


def test_a_torn_command_takes_only_its_own_retry_which_appends_the_rest() -> None:
    ingest = commands.ingest(PACKAGE, "a", "b", "c")
    state = after(CREATE)
    whole = decide(state, ingest, 1_000, LIMITS)
    evolve(state, whole[0])
    with pytest.raises(PushBackError):
        decide(state, commands.finalize(PACKAGE), 0, LIMITS)
    rest = decide(state, ingest, 1_000, LIMITS)
    assert [*rest] == [*whole][1:]
    evolve_all(state, rest)
    assert state == after(CREATE, ingest)
    assert [file.relative_path for file in acknowledge(state, ingest).files] == ["a", "b", "c"]
    assert state.unfinished is None


_NAMED = st.tuples(st.integers(0, 3), st.lists(st.sampled_from("abcdef"), min_size=1, max_size=2))


@given(st.lists(_NAMED, min_size=1, max_size=4), st.booleans())
def test_commands_become_together_what_they_become_one_after_the_other(
    named: list[tuple[int, list[str]]], finalized: bool
) -> None:
    start = (CREATE, commands.ingest(PACKAGE, "a", name=0), *((commands.finalize(PACKAGE),) if finalized else ()))
    asked = [commands.ingest(PACKAGE, *paths, name=name) for name, paths in named]
    together, singly = after(*start), after(*start)
    try:
        expected = _one_after_the_other(singly, asked)
    except ArtifactStoreError:
        expected = None
    try:
        run = decide(together, IngestTogether(PACKAGE, tuple(asked)), 2_000, LIMITS)
    except ArtifactStoreError:
        assert expected is None or len(expected) < sum(len(command.files) for command in asked), "none is a retry"
        return
    assert isinstance(run, FileRun)
    assert [*run] == expected
    assert run.digests == [event_digest(event) for event in run]
    assert evolve(together, run) == singly
    assert [*together.commands] == [*singly.commands]
    assert [acknowledge(together, command) for command in asked] == [acknowledge(singly, command) for command in asked]


def _one_after_the_other(state: PackageState, asked: list[IngestFiles]) -> list[Event]:
    """The events that they become."""
    events: list[Event] = []
    for command in asked:
        for event in decide(state, command, 2_000, LIMITS):
            events.append(event)
            evolve(state, event)
    return events


def test_commands_are_not_decided_together_while_another_is_not_whole() -> None:
    torn = commands.ingest(PACKAGE, "a", "b", name="torn")
    state = after(CREATE)
    evolve(state, decide(state, torn, 1_000, LIMITS)[0])
    for asked in ([commands.ingest(PACKAGE, "c"), commands.ingest(PACKAGE, "d", name=2)], [torn]):
        with pytest.raises(PushBackError):
            decide(state, IngestTogether(PACKAGE, tuple(asked)), 1_000, LIMITS)


def test_a_large_manifest_travels_as_a_claim_check() -> None:
    limits = Limits(inline_manifest_bytes=400)
    state = after(CREATE, commands.ingest(PACKAGE, "a"), limits=limits)
    events = decide(state, commands.finalize(PACKAGE), 0, limits)
    payload = events[0].payload
    assert isinstance(payload, PackageFinalized)
    assert payload.manifest is None
    assert payload.manifest_key is not None
    assert payload.manifest_key.endswith(events[0].payload_digest.hex())
    manifest = claim_check(state, events)
    assert manifest is not None
    assert manifest_digest(manifest) == events[0].payload_digest


def test_evolve_refuses_what_cannot_follow() -> None:
    state = after(CREATE)
    first, second = decide(state, commands.ingest(PACKAGE, "a", "b"), 0, LIMITS)
    with pytest.raises(CorruptError, match="does not follow"):
        evolve(state, second)
    with pytest.raises(CorruptError, match="precedes its creation"):
        evolve(None, first)
    with pytest.raises(CorruptError, match="created twice"):
        evolve(state, decide(None, CREATE, 0, LIMITS)[0])


PAIRS = [("a.txt", "a.txt/b"), ("a.txt/b", "a.txt"), ("a", "a/b/c"), ("a/b/c", "a"), ("a/b/c", "a/b")]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_path_that_would_be_both_a_file_and_a_folder_is_refused(first: str, second: str) -> None:
    state = after(CREATE, commands.ingest(PACKAGE, first, "other", name=1))
    command = commands.ingest(PACKAGE, "fine", second, name=2)
    with pytest.raises(PathConflictError, match=f"'{second}' cannot") as caught:
        decide(state, command, 1_000, LIMITS)
    assert caught.value.status == 409
    with pytest.raises(PathConflictError):
        check_ingest(state, PACKAGE, [second], uuid4(), 1_000, LIMITS)
    with pytest.raises(PathConflictError):
        decide(state, IngestTogether(PACKAGE, (commands.ingest(PACKAGE, "x", name=3), command)), 1_000, LIMITS)
    with pytest.raises(PathConflictError):
        decide(after(CREATE), commands.ingest(PACKAGE, first, second), 1_000, LIMITS)


@pytest.mark.parametrize("path", ["a", "a.txt.b", "a.tx", "a.txu/b", "b/a.txt", "a.txt-/b"])
def test_paths_that_only_look_alike_are_taken(path: str) -> None:
    state = after(CREATE, commands.ingest(PACKAGE, "a.txt", name=1))
    assert len(decide(state, commands.ingest(PACKAGE, path, name=2), 1_000, LIMITS)) == 1


def with_pair(first: str, second: str) -> PackageState:
    """A package of a time when a path could be both: its events are put together from two histories."""
    state = after(CREATE, commands.ingest(PACKAGE, first, name=1))
    files, folders = state.files, state.folders
    state.files, state.folders = {}, set()
    (event,) = decide(state, commands.ingest(PACKAGE, second, name=2), 1_000, LIMITS)
    state.files, state.folders = files, folders
    return evolve(state, event)


@pytest.mark.parametrize(("first", "second"), [("a.txt", "a.txt/b"), ("a.txt/b", "a.txt")])
def test_a_history_that_holds_both_stays_valid_and_takes_what_does_not_add_to_it(first: str, second: str) -> None:
    state = with_pair(first, second)
    assert list(state.files) == [first, second]
    state = evolve_all(state, decide(state, commands.ingest(PACKAGE, "c", name=3), 1_000, LIMITS))
    with pytest.raises(PathConflictError):
        decide(state, commands.ingest(PACKAGE, "a.txt/d", name=4), 1_000, LIMITS)
    assert decide(state, commands.finalize(PACKAGE), 1_000, LIMITS)


def test_the_rest_of_a_torn_command_is_taken_although_newer_rules_would_refuse_it() -> None:
    state = after(CREATE)
    whole = commands.ingest(PACKAGE, "a.txt", "a.txt/b")
    replaced = replace(whole, files=(whole.files[0], commands.stored("other")))
    first, _ = decide(state, replaced, 1_000, LIMITS)
    state = evolve(state, first)
    (rest,) = decide(state, whole, 1_000, LIMITS)
    assert rest.command_index == 1


def test_a_package_lies_in_a_bounded_number_of_folders() -> None:
    limits = Limits(max_files_per_package=200)
    deep = ["/".join([name] * 512) for name in "abc"]
    state = after(CREATE, commands.ingest(PACKAGE, *deep[:2], name=1), limits=limits)
    with pytest.raises(TooLargeError, match="at most 1,312 folders"):
        decide(state, commands.ingest(PACKAGE, deep[2], name=2), 1_000, limits)
    again = [path + "b" for path in deep[:2]]
    assert len(decide(state, commands.ingest(PACKAGE, *again, name=3), 1_000, limits)) == 2


def test_a_finalization_and_its_retries_report_paths_that_differ_only_by_case() -> None:
    command = commands.finalize(PACKAGE)
    before = after(CREATE, commands.ingest(PACKAGE, "README", "readme", "lib/a", "LIB"))
    events = decide(before, command, 2_000, LIMITS)
    state = evolve_all(before, events)
    answer = acknowledge(state, command)
    assert answer.unportable_count == 2
    assert answer.unportable_paths == (("README", "readme"), ("LIB", "lib"))
    assert acknowledge(evolve_all(state, decide(state, command, 3_000, LIMITS)), command) == answer
    folded = after(CREATE, commands.ingest(PACKAGE, "README", "readme", "lib/a", "LIB"))
    assert acknowledge(evolve(folded, events[0]), command) == answer


def test_an_open_package_takes_no_command_once_nothing_came_to_it_for_a_year() -> None:
    known = commands.ingest(PACKAGE, "a", name=1)
    state, late = after(CREATE, known), 1_000 + MAX_IDLE_MICROS
    new: list[Command] = [commands.ingest(PACKAGE, "b", name=2), commands.finalize(PACKAGE)]
    for command in new:
        assert decide(state, command, late, LIMITS)
        with pytest.raises(PackageAbandonedError, match=f"package {PACKAGE} is open"):
            decide(state, command, late + 1, LIMITS)
    with pytest.raises(PackageAbandonedError):
        check_ingest(state, PACKAGE, ["b"], uuid4(), late + 1, LIMITS)
    together = tuple(commands.ingest(PACKAGE, name, name=name) for name in "bc")
    with pytest.raises(PackageAbandonedError):
        decide(state, IngestTogether(PACKAGE, together), late + 1, LIMITS)
    assert not decide(state, known, late + 1, LIMITS), "what is known is answered"
    (event,) = decide(state, new[0], late + 1, Limits(max_idle_micros=2 * late))
    assert list(evolve(state, event).files) == ["a", "b"], "a history with such a pause is valid"


@pytest.mark.parametrize(
    "forged",
    [
        {"key": "snapshots/x/0/index"},
        {"key": "resumable/x"},
        {"key": "blobs/../snapshots/x"},
        {"key": "blobs//x"},
        {"key": "/etc/passwd"},
        {"key": "blobs/" + "x" * 512},
        {"offset": -1},
        {"length": 31},
        {"length": -32, "size_bytes": -32},
        {"blake3": b"short"},
        {"sha256": b""},
        {"backend_id": "a\nb"},
    ],
)
def test_a_receipt_that_no_store_gives_is_refused_whoever_sent_it(forged: dict[str, Any]) -> None:
    command = commands.ingest(PACKAGE, "a")
    with pytest.raises(InvalidRequestError):
        decide(after(CREATE), replace(command, files=(replace(command.files[0], **forged),)), 2_000, LIMITS)
