"""The faster ways of the write path give the same as the plain ways, for every input."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import asdict, replace
from datetime import UTC, datetime
from io import BytesIO
from typing import Any
from uuid import UUID, uuid5

import cbor2
import fastavro
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from artifact_store.canonical import canonical_cbor, cbor_text, ordered_cbor
from artifact_store.events import (
    DELEGATED_FILE_INGESTED,
    FILE_INGESTED,
    Event,
    FileIngested,
    LogSkipped,
    LossAccepted,
    PackageCreated,
    PackageFinalized,
    Payload,
    StorageReceipt,
    payload_map,
    type_with,
)
from artifact_store.rules import holds_control
from schemas.codec import decode, encode, schema_text
from schemas.digests import event_digest
from schemas.headers import headers, headers_all
from schemas.identifiers import file_id
from schemas.runs import CommandFiles, FileRun, StoredFile, avro_long, encode_all, file_ids
from services.core.decide import Limits, decide
from services.core.state import evolve, manifest_item, receipt_item
from tests.commands import create, ingest

_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=300)
_SIZE = st.integers(0, 2**63 - 1)
_LONG = st.integers(-(2**63), 2**63 - 1)
_DIGEST = st.binary(min_size=32, max_size=32)
_RECEIPT = st.builds(StorageReceipt, st.uuids(), _TEXT, _TEXT, _SIZE, _SIZE, _SIZE)
_INGESTED = st.builds(FileIngested, st.uuids(), _TEXT, _TEXT, _SIZE, _DIGEST, _DIGEST, _RECEIPT)


def _event(principal: str | None, **fields: Any) -> Event:
    return Event(event_type=type_with(FILE_INGESTED, principal), principal=principal, **fields)


_EVENT = st.builds(
    _event,
    principal=st.none() | _TEXT,
    event_id=st.uuids(),
    package_id=st.uuids(),
    sequence=_LONG,
    created_at=_LONG,
    actor=_TEXT,
    command_id=st.uuids(),
    command_index=st.integers(0, 2**31 - 1),
    command_count=st.integers(0, 2**31 - 1),
    payload_digest=_DIGEST,
    previous_digest=_DIGEST,
    payload=_INGESTED,
)
_FILES = st.lists(
    st.builds(StoredFile, _TEXT, _TEXT, _SIZE, _DIGEST, _DIGEST, _TEXT, _TEXT, _SIZE, _SIZE, _LONG),
    min_size=1,
    max_size=3,
)
_SCHEMAS = {
    event_type: fastavro.parse_schema(json.loads(schema_text(event_type)))
    for event_type in (FILE_INGESTED, DELEGATED_FILE_INGESTED)
}
_CREATED = st.builds(PackageCreated, _TEXT, _TEXT, _TEXT, _TEXT, st.none() | _SIZE, _TEXT)
_LOG = UUID(int=9)
_ORIGIN = PackageCreated("n", "häll", "s", "scratch", 7, "{}")
_FINALIZED = st.builds(PackageFinalized, st.none() | st.binary(), st.none() | _TEXT, _SIZE, _SIZE)


_INT = st.integers(0, 2**31 - 1)
_SKIPPED = st.builds(LogSkipped, st.uuids(), _INT, _SIZE, _DIGEST, _SIZE, _TEXT, _TEXT)
_LOST = st.builds(
    LossAccepted,
    *(st.uuids(), _INT, _TEXT, st.none() | st.uuids(), _SIZE, _DIGEST, st.none() | _DIGEST, _SIZE, _TEXT),
)


@given(_INGESTED | _CREATED | _FINALIZED | _SKIPPED | _LOST)
def test_a_payloads_map_is_written_in_canonical_order(payload: Payload) -> None:
    found = payload_map(payload)
    assert ordered_cbor(found) == canonical_cbor(found)


@given(_EVENT)
def test_an_event_is_encoded_as_the_schema_file_with_its_logical_types_has_it(event: Event) -> None:
    out = BytesIO()
    record = {**asdict(event), "payload": payload_map(event.payload)}
    fastavro.schemaless_writer(out, _SCHEMAS[event.event_type], record)
    assert encode(event)[10:] == out.getvalue()
    assert decode(encode(event)) == event


@given(
    st.lists(st.tuples(st.uuids(), _TEXT, _FILES, st.integers(0, 100), st.none() | _TEXT), max_size=4),
    st.uuids(),
    _LONG,
    st.integers(1, 2**40),
    _DIGEST,
)
def test_a_run_of_files_is_the_events_that_the_plain_way_gives(
    commands: list[tuple[UUID, str, list[StoredFile], int, str | None]],
    package_id: UUID,
    created_at: int,
    sequence: int,
    digest: bytes,
) -> None:
    run = FileRun.of_files(
        package_id,
        [CommandFiles(id_, actor, done, done + len(files), files, who) for id_, actor, files, done, who in commands],
        sequence=sequence,
        created_at=created_at,
        previous=digest,
    )
    events = []
    for command_id, actor, files, done, principal in commands:
        for index, file in enumerate(files, done):
            payload = _payload(package_id, file)
            event = Event(
                event_id=uuid5(package_id, str(sequence)),
                event_type=type_with(FILE_INGESTED, principal),
                package_id=package_id,
                sequence=sequence,
                created_at=created_at,
                actor=actor,
                principal=principal,
                command_id=command_id,
                command_index=index,
                command_count=done + len(files),
                payload_digest=blake3(canonical_cbor(payload_map(payload))).digest(),
                previous_digest=digest,
                payload=payload,
            )
            events.append(event)
            sequence, digest = sequence + 1, event_digest(event)
    assert [*run] == events
    assert len(run) == len(events)
    assert encode_all(run) == [encode(event) for event in events]
    assert run.digests == [event_digest(event) for event in events]


@given(
    st.lists(
        st.tuples(st.uuids(), _FILES, st.integers(0, 100), st.none() | _TEXT, st.sampled_from([None, "ci:bot"])),
        min_size=1,
        max_size=3,
    )
)
def test_a_runs_headers_are_those_of_its_events(
    commands: list[tuple[UUID, list[StoredFile], int, str | None, str | None]],
) -> None:
    parts = [CommandFiles(id_, "ada", done, done + len(files), files, who) for id_, files, done, _, who in commands]
    run = FileRun.of_files(UUID(int=5), parts, sequence=7, created_at=1_900_000_000_000_000, previous=bytes(32))
    traces = [trace for _, files, _, trace, _ in commands for _ in files]
    found = [dict(each) for each in headers_all(run, _LOG, _ORIGIN, [trace for _, _, _, trace, _ in commands])]
    assert found == [headers(event, _LOG, _ORIGIN, trace) for event, trace in zip(run, traces, strict=True)]


@given(st.uuids(), st.lists(_TEXT, max_size=4))
def test_the_ids_of_many_files_are_those_of_each(package_id: UUID, paths: list[str]) -> None:
    assert file_ids(package_id, paths) == [file_id(package_id, path) for path in paths]


@given(_EVENT)
def test_an_event_is_a_run_of_its_own(event: Event) -> None:
    assert isinstance(event.payload, FileIngested)
    run = FileRun.of(event, event.payload)
    assert [*run] == [event]
    assert run[0] == event
    assert encode_all(run) == [encode(event)]
    assert run.digests == (event_digest(event),)


def _payload(package_id: UUID, file: StoredFile) -> FileIngested:
    file_id = uuid5(package_id, f"file:{file.relative_path}")
    location_id = uuid5(file_id, f"location:{file.backend_id}:{file.key}:{file.offset}:{file.length}")
    receipt = StorageReceipt(location_id, file.backend_id, file.key, file.offset, file.length, file.stored_at)
    return FileIngested(
        file_id, file.relative_path, file.media_type, file.size_bytes, file.blake3, file.sha256, receipt
    )


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"blake3": bytes(31)}, "32 bytes"),
        ({"sha256": bytes(33)}, "32 bytes"),
        ({"offset": 1 << 63}, "not an Avro long"),
        ({"stored_at": -(1 << 63) - 1}, "not an Avro long"),
        ({"key": "\ud800"}, "surrogates"),
    ],
)
def test_a_file_that_no_record_can_hold_is_refused(change: dict[str, Any], rule: str) -> None:
    state = evolve(None, decide(None, create(), 1, Limits())[0])
    command = ingest(state.package_id, "a")
    part = CommandFiles(command.command_id, command.actor, 0, 1, (replace(command.files[0], **change),))
    with pytest.raises(ValueError, match=rule):
        encode_all(FileRun.of_files(state.package_id, [part], sequence=2, created_at=2, previous=state.digest))


@given(_LONG)
def test_a_number_is_written_as_avro_has_it(number: int) -> None:
    out = BytesIO()
    fastavro.schemaless_writer(out, "long", number)
    assert avro_long(number) == out.getvalue()


@pytest.mark.parametrize("size", [0, 1, 23, 24, 255, 256, 1_024, 1_025, 65_535, 65_536, 70_000])
def test_a_text_is_written_as_cbor_has_it(size: int) -> None:
    assert cbor_text(b"x" * size) == canonical_cbor("x" * size)


@given(st.uuids(), st.uuids(), _FILES)
def test_the_items_of_a_manifest_are_canonical(file_id: UUID, location_id: UUID, files: list[StoredFile]) -> None:
    for file in files:
        for item in (manifest_item(str(file_id), file), receipt_item(str(file_id), str(location_id), file)):
            assert item == canonical_cbor(cbor2.loads(item))


def test_control_characters_and_surrogates_are_those_of_unicode() -> None:
    for code in range(0x110000):
        assert holds_control(chr(code)) == (unicodedata.category(chr(code)) in ("Cc", "Cs")), hex(code)


@pytest.mark.parametrize("micros", [0, 1, 999_999, 1_000_000, 1_700_000_000_000_000, 1_700_000_000_000_100])
def test_the_time_in_the_headers_is_the_events_in_iso_form(micros: int) -> None:
    event = decide(None, create(), micros, Limits())[0]
    plain = datetime.fromtimestamp(micros // 1_000_000, UTC).replace(microsecond=micros % 1_000_000)
    assert headers(event, _LOG, None)["ce_time"] == plain.isoformat().replace("+00:00", "Z").encode()
