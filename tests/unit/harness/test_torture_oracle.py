"""The torture's comparison of promises with the log notices every way in which the log could break one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from uuid import uuid4

import pytest

from artifact_store.events import Event, FileIngested, LogSkipped
from schemas.digests import event_digest, record_digest
from services.core.decide import Command, FinalizePackage, IngestFiles, Limits, decide
from services.core.state import PackageState, evolve
from services.log.records import administrative_event
from tests.commands import create, stored
from tests.faults.torture.oracle import Verdict, compare
from tests.faults.torture.work import CREATE, FINALIZE, INGEST, Answer, Entry, Work

Damage = Callable[[list[Event]], Sequence[Event]]


def history() -> tuple[list[Entry], list[Event]]:
    """A package with two files, finalized: what was promised, and the log that keeps the promises."""
    made = create()
    added = [IngestFiles(made.package_id, uuid4(), "ada", (stored(path),)) for path in ("a", "b")]
    commands: list[tuple[str, str, Command]] = [
        (CREATE, "", made),
        *((INGEST, command.files[0].relative_path, command) for command in added),
        (FINALIZE, "", FinalizePackage(made.package_id, uuid4(), "ada")),
    ]
    state: PackageState | None = None
    entries, events = [], []
    for kind, path, command in commands:
        (event,) = decide(state, command, 1_000, Limits())
        state = evolve(state, event)
        address = ""
        if isinstance(event.payload, FileIngested):
            address = f"blake3:{event.payload.blake3.hex()}"
        elif kind == FINALIZE:
            address = f"blake3:{event.payload_digest.hex()}"
        answer = Answer(event.sequence, event_digest(event).hex(), address)
        entries.append(Entry(Work(kind, command.package_id, command.command_id, path), answer, 0.0, 1.0, 1))
        events.append(event)
    return entries, events


def judged(damage: Damage) -> tuple[int, int, int]:
    """Missing, duplicates and violations of a log that was damaged so."""
    entries, events = history()
    verdict = Verdict()
    compare(entries, damage(events), verdict)
    return verdict.missing, verdict.duplicates, verdict.violations


def with_path_of_first(events: list[Event]) -> list[Event]:
    second = events[2]
    assert isinstance(second.payload, FileIngested)
    return [*events[:2], replace(second, payload=replace(second.payload, relative_path="a")), events[3]]


def test_a_log_that_keeps_every_promise_is_clean() -> None:
    assert judged(list) == (0, 0, 0)


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        pytest.param(lambda events: events[:-1], "missing", id="an event is gone"),
        pytest.param(lambda events: [*events, events[1]], "duplicates", id="an event is there twice"),
        pytest.param(lambda events: [*events, replace(events[1], sequence=9)], "duplicates", id="a command is twice"),
        pytest.param(with_path_of_first, "duplicates", id="a path is there twice"),
        pytest.param(
            lambda events: [*events[:3], replace(events[3], sequence=3)], "duplicates", id="a number is there twice"
        ),
        pytest.param(
            lambda events: [*events, replace(events[3], sequence=5, command_id=uuid4())],
            "violations",
            id="an event that nobody asked for",
        ),
        pytest.param(
            lambda events: [*events[:3], replace(events[3], created_at=2_000)],
            "violations",
            id="an event is another than the one acknowledged",
        ),
    ],
)
def test_damage_is_noticed(damage: Damage, kind: str) -> None:
    missing, duplicates, violations = judged(damage)
    assert {"missing": missing, "duplicates": duplicates, "violations": violations}[kind] > 0


def test_an_event_by_a_wrong_clock_is_noticed() -> None:
    entries, events = history()
    verdict = Verdict()
    compare(entries, events, verdict, began=86_400_000_000)
    assert verdict.violations == len(events)


@pytest.mark.parametrize(
    ("strays", "confirmed"), [([b"a"], []), ([], [b"a"]), ([b"a"], [b"a", b"a"]), ([b"a"], [b"b"])]
)
def test_a_foreign_record_that_is_not_confirmed_just_once_is_noticed(
    strays: list[bytes], confirmed: list[bytes]
) -> None:
    assert violations_with([b"a", b"b"], [b"b", b"a"]) == 0
    assert violations_with(strays, confirmed) > 0


def violations_with(strays: list[bytes], confirmed: list[bytes]) -> int:
    """How many there are when these records are no events, and these are confirmed to be none."""
    entries, events = history()
    for value in confirmed:
        payload = LogSkipped(uuid4(), 0, 7, record_digest(b"", value), len(value), "no event", "")
        events.append(administrative_event(payload, None, created_at=2_000, actor="ada", command_id=uuid4()))
    verdict = Verdict()
    compare(entries, events, verdict, strays=strays)
    return verdict.violations
