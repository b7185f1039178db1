"""Everything released stays readable: every released schema, and bytes that were written with each.

A file in `golden/` is never changed; a new version of an event adds files.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import fastavro
import pytest
from blake3 import blake3
from fastavro.schema import fingerprint, to_parsing_canonical_form

from artifact_store.canonical import canonical_cbor
from artifact_store.events import (
    DELEGATED_FILE_INGESTED,
    DELEGATED_PACKAGE_CREATED,
    DELEGATED_PACKAGE_FINALIZED,
    FILE_INGESTED,
    Event,
    LogSkipped,
    LossAccepted,
)
from schemas import identifiers
from schemas.codec import EVENT_TYPES, UndecodableEventError, decode, encode, schema_text
from schemas.digests import event_digest, payload_digest_holds
from schemas.runs import CommandFiles, FileRun
from services.core.decide import Command, IngestFiles, Limits, decide
from services.core.state import PackageState, evolve
from services.log.records import AdministrativeHead, administrative_event
from tests import commands

GOLDEN = Path(__file__).parent / "golden"
VALUES = sorted(GOLDEN.glob("*.avro"))


def history() -> list[Event]:
    """A history with every event type; a claim-checked manifest in the second package."""
    events: list[Event] = []
    for name, limits in (("one", Limits()), ("two", Limits(inline_manifest_bytes=1))):
        created = commands.create(name, retention_class="permanent" if name == "two" else "report")
        run: list[Command] = [
            created,
            commands.ingest(created.package_id, "data/é.bin", "b", name="files"),
            commands.finalize(created.package_id),
        ]
        state: PackageState | None = None
        for at, command in enumerate(run):
            now = 1_700_000_000_000_000 + at
            if state is not None and isinstance(command, IngestFiles):
                decided = _ingested(state, command, now)
            else:
                decided = decide(state, command, now, limits)
            for event in decided:
                state = evolve(state, event)
                events.append(event)
    return [*events, *administrative(), *delegated()]


def delegated() -> list[Event]:
    """A history of a package in which a principal acts in another's name, and once in their own."""
    id_ = commands.command_id("three")
    created = replace(commands.create("three"), package_id=identifiers.package_id("ci:bot", id_), principal="ci:bot")
    package_id, state, events = created.package_id, None, list[Event]()
    run: list[Command] = [
        created,
        replace(commands.ingest(package_id, "data/é.bin", "b", name="files"), principal="ci:bot"),
        commands.ingest(package_id, "c", name="own", actor="ci:bot"),
        replace(commands.finalize(package_id), principal="ci:bot"),
    ]
    for at, command in enumerate(run):
        for event in decide(state, command, 1_700_000_000_000_005 + at, Limits()):
            state = evolve(state, event)
            events.append(event)
    return events


def _ingested(state: PackageState, command: IngestFiles, now: int) -> Sequence[Event]:
    """The events of the command, with receipts as they were recorded before the core refused such keys."""
    files = tuple(replace(file, key=f"blobs/{file.relative_path}") for file in command.files)
    part = CommandFiles(command.command_id, command.actor, 0, len(files), files)
    return FileRun.of_files(
        state.package_id, [part], sequence=state.sequence + 1, created_at=now, previous=state.digest
    )


def administrative() -> list[Event]:
    """Both kinds of records that belong to a partition and to no package."""
    log = UUID(int=7)
    skipped = LogSkipped(
        log, 3, 41, b"\x01" * 32, 18, "the value is not in a framing that is known", "a stray producer"
    )
    lost = LossAccepted(log, 3, "file", UUID(int=8), 99, b"\x02" * 32, None, 57, "restored from the copy of Monday")
    first = administrative_event(skipped, None, created_at=1_700_000_000_000_003, actor="ada", command_id=UUID(int=9))
    after = AdministrativeHead(first.sequence, event_digest(first))
    second = administrative_event(lost, after, created_at=1_700_000_000_000_004, actor="ada", command_id=UUID(int=10))
    return [first, second]


@pytest.mark.parametrize("event_type", EVENT_TYPES)
def test_a_released_schema_is_never_changed(event_type: str) -> None:
    released = (GOLDEN / f"{event_type}.avsc").read_text(encoding="utf-8")
    assert schema_text(event_type) == released


def test_every_released_schema_has_an_event_type_that_still_reads_it() -> None:
    assert {path.stem for path in GOLDEN.glob("*.avsc")} <= set(EVENT_TYPES)


@pytest.mark.parametrize("path", VALUES, ids=lambda path: path.stem)
def test_old_bytes_still_read_and_hold_their_digests(path: Path) -> None:
    event = decode(path.read_bytes())
    facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert event.event_type == facts["event_type"]
    assert str(event.event_id) == facts["event_id"]
    assert event.payload_digest.hex() == facts["payload_digest"]
    assert event_digest(event).hex() == facts["event_digest"]
    assert payload_digest_holds(event) in (True, None)


def test_version_1_reads_as_an_event_that_its_actor_sent() -> None:
    for path in VALUES:
        event = decode(path.read_bytes())
        assert (event.principal is not None) == event.event_type.startswith("v2.")
        assert event.principal in (None, "ci:bot")


def test_an_event_is_written_in_version_2_only_with_a_principal() -> None:
    types = [event.event_type for event in delegated()]
    assert types == [
        DELEGATED_PACKAGE_CREATED,
        *[DELEGATED_FILE_INGESTED] * 2,
        FILE_INGESTED,
        DELEGATED_PACKAGE_FINALIZED,
    ]


def test_who_sent_a_command_cannot_be_changed_without_a_trace() -> None:
    event = delegated()[1]
    who = [event.actor, "ci:bot"]
    about = [event.event_type, str(event.package_id), event.sequence, event.created_at]
    link = [*about, *who, str(event.command_id), event.payload_digest, event.previous_digest]
    assert event_digest(event) == blake3(canonical_cbor(link)).digest()
    assert event_digest(replace(event, principal="ci:eve")) != event_digest(event)


def test_the_same_history_still_gives_the_same_bytes() -> None:
    assert [encode(event) for event in history()] == [path.read_bytes() for path in VALUES]


@pytest.mark.parametrize("event", history(), ids=lambda event: f"{event.event_type}-{event.sequence}")
def test_plain_fastavro_reads_an_event_with_nothing_but_its_schema_file(event: Event) -> None:
    """Avro 1.12, single-object encoding: C3 01, the schema's CRC-64-AVRO fingerprint, then the datum."""
    schema = json.loads(schema_text(event.event_type))
    value = encode(event)
    assert value[:2] == b"\xc3\x01"
    assert value[2:10].hex() == fingerprint(to_parsing_canonical_form(schema), "CRC-64-AVRO")
    record: Any = fastavro.schemaless_reader(io.BytesIO(value[10:]), schema, None)
    assert record["package_id"] == event.package_id
    assert isinstance(record["event_id"], UUID)
    assert round(record["created_at"].timestamp() * 1_000_000) == event.created_at


def test_the_fingerprint_is_that_of_the_avro_specification() -> None:
    """The fingerprint of the schema "null", from the reference implementation's published test vectors."""
    assert fingerprint('"null"', "CRC-64-AVRO") == (0x63DD24E7CC258F8A).to_bytes(8, "little").hex()


def test_another_framing_is_not_read() -> None:
    value = encode(history()[0])
    with pytest.raises(UndecodableEventError, match="framing"):
        decode(b"\x00" + (7).to_bytes(4) + value[10:])


@pytest.mark.parametrize(
    "value", [b"", b"\xc3", b"\xc3\x01", b"\xc3\x01" + bytes(8), b"\x00" + bytes(9), b"{}", encode(history()[0])[:-1]]
)
def test_bytes_that_are_no_event_are_refused(value: bytes) -> None:
    with pytest.raises(UndecodableEventError):
        decode(value)


def test_an_event_whose_type_is_not_that_of_its_schema_is_refused() -> None:
    event = history()[0]
    value = encode(event).replace(event.event_type.encode(), event.event_type.encode().upper())
    with pytest.raises(UndecodableEventError, match="type"):
        decode(value)


def test_bytes_behind_an_event_are_refused() -> None:
    with pytest.raises(UndecodableEventError, match="follow"):
        decode(encode(history()[0]) + b"\x00")
