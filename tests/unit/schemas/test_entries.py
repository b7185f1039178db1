"""Reading `v1.file.ingested` field by field gives the same as the general codec, and never accepts more."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifact_store.canonical import MAX_LEVELS, jcs
from artifact_store.events import (
    DELEGATED_FILE_INGESTED,
    FILE_INGESTED,
    Event,
    FileIngested,
    PackageCreated,
    StorageReceipt,
    payload_map,
)
from schemas.codec import UndecodableEventError, decode, encode
from schemas.runs import FileFields, entry_of, read_entry, read_fields
from tests.views_history import History

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=200)
longs = st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-70, 70)
ids = st.uuids()
digests = st.binary(min_size=32, max_size=32)
files = st.builds(
    FileIngested,
    ids,
    texts,
    texts,
    longs,
    digests,
    digests,
    st.builds(StorageReceipt, ids, texts, texts, longs, longs, longs),
)
ints = st.integers(-(1 << 31), (1 << 31) - 1) | st.integers(0, 100)
ingested = st.builds(
    Event, ids, st.just(FILE_INGESTED), ids, longs, longs, texts, ids, ints, ints, digests, digests, files
)


@given(ingested)
def test_fields_are_those_of_the_decoded_event(event: Event) -> None:
    value = encode(event)
    fields = read_fields(value, {})
    assert fields is not None
    assert fields == entry_of(decode(value))
    delegated = replace(event, event_type=DELEGATED_FILE_INGESTED, principal="ci:bot")
    assert read_fields(encode(delegated), {}) is None  # version 2 is rare: the general codec reads it
    assert entry_of(decode(encode(delegated))) == fields
    if event.created_at < 0:
        with pytest.raises(UndecodableEventError, match="1970"):
            read_entry(value)
    else:
        assert read_entry(value) == fields


def _broken(value: bytes, field: str) -> bytes:
    """The value with a byte in this field that does not belong there."""
    text = str(getattr(decode(value), field)).encode()
    return value.replace(text, b"\xff" + text[1:], 1)


@pytest.mark.parametrize("field", ["event_id", "command_id", "actor"])
@given(ingested, st.text("xyz", min_size=20, max_size=200))
def test_what_no_fold_needs_is_looked_at_all_the_same(field: str, event: Event, actor: str) -> None:
    value = _broken(encode(replace(event, actor=actor)), field)
    with pytest.raises(UndecodableEventError):
        decode(value)
    assert read_fields(value, {}) is None


@pytest.mark.parametrize("field", ["event_id", "command_id"])
def test_an_identifier_whose_dashes_hide_what_it_lacks_is_no_identifier(field: str) -> None:
    event = next(e for e in History().fill(1, 1).events if e.event_type == FILE_INGESTED)
    text = str(getattr(event, field)).encode()
    value = encode(event).replace(text, b"-" + text[1:])
    assert read_fields(value, {}) is None
    with pytest.raises(UndecodableEventError):
        read_entry(value)


@pytest.mark.parametrize("event", History().fill(2, 1).events, ids=lambda event: event.event_type)
def test_a_text_with_a_nul_is_refused_wherever_it_is(event: Event) -> None:
    nul: dict[str, Any] = {"actor": "a\0"}
    refused = [replace(event, **nul)]
    for name, text in payload_map(event.payload).items():
        if isinstance(text, str) and name != "file_id":
            nul = {name: "a\0"}
            refused.append(replace(event, payload=replace(event.payload, **nul)))
    if isinstance(event.payload, FileIngested):
        for name in ("backend_id", "key"):
            nul = {name: "a\0"}
            receipt = replace(event.payload.receipt, **nul)
            refused.append(replace(event, payload=replace(event.payload, receipt=receipt)))
    for value in map(encode, refused):
        assert read_fields(value, {}) is None
        with pytest.raises(UndecodableEventError, match="NUL"):
            decode(value)


@given(ingested, st.data())
def test_what_is_not_as_written_is_refused_or_read_as_the_general_codec_reads_it(
    event: Event, data: st.DataObject
) -> None:
    value = bytearray(encode(event))
    head = 10  # behind the framing
    match data.draw(st.sampled_from(["change", "cut", "insert"])):
        case "change":
            value[data.draw(st.integers(head, len(value) - 1))] = data.draw(st.integers(0, 255))
        case "cut":
            del value[data.draw(st.integers(head, len(value) - 1)) :]
        case _:
            value.insert(data.draw(st.integers(head, len(value))), data.draw(st.integers(0, 255)))
    found = read_fields(bytes(value), {})
    try:
        expected = entry_of(decode(bytes(value)))
    except UndecodableEventError:
        assert found is None
    else:
        assert found in (None, expected)


def test_every_type_of_event_comes_back() -> None:
    events = History().fill(packages=4, files=2).events
    entries = [read_entry(encode(event)) for event in events]
    assert entries == [entry_of(event) for event in events]
    assert {type(entry) for entry in entries} == {FileFields, Event}


def test_what_cannot_be_read_is_refused() -> None:
    broken = encode(next(e for e in History().fill(1, 1).events if e.event_type == FILE_INGESTED))[:-1]
    with pytest.raises(UndecodableEventError):
        read_entry(broken)


def test_an_identifier_that_is_none_is_refused() -> None:
    event = next(e for e in History().fill(1, 1).events if e.event_type == FILE_INGESTED)
    value = encode(event).replace(str(event.package_id).encode(), b"z" * 36)
    assert read_fields(value, {}) is None
    with pytest.raises(UndecodableEventError):
        read_entry(value)


_numbers = st.integers() | st.floats() | st.sampled_from([2**53, 2**53 + 1, -(2**53), 2.0**53, 1e300, 1e-300])
_json = st.recursive(
    st.none() | st.booleans() | _numbers | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@given(st.dictionaries(st.text(max_size=3), _json, max_size=3) | _json, st.booleans())
def test_metadata_is_taken_exactly_when_it_is_an_object_that_has_a_jcs_form(value: Any, escaped: bool) -> None:
    try:
        text = json.dumps(value, ensure_ascii=escaped)
        text.encode()
        jcs(json.loads(text))
        lawful = isinstance(value, dict)
    except UnicodeEncodeError:
        return  # no record holds it
    except ValueError:
        lawful = False
    assert _taken(text) == lawful


@pytest.mark.parametrize("innermost", ["{}", "1", "[]", "[1]"])
@pytest.mark.parametrize("levels", range(MAX_LEVELS - 2, MAX_LEVELS + 3))
def test_metadata_may_be_as_deep_as_what_writers_take(levels: int, innermost: str) -> None:
    text = '{"a":' * levels + innermost + "}" * levels
    try:
        jcs(json.loads(text))
        lawful = True
    except ValueError:
        lawful = False
    assert _taken(text) == lawful


def _taken(metadata: str) -> bool:
    event = History().fill(1, 1).events[0]
    assert isinstance(event.payload, PackageCreated)
    try:
        read_entry(encode(replace(event, payload=replace(event.payload, metadata=metadata))))
    except UndecodableEventError:
        return False
    return True


@pytest.mark.parametrize("event", History().fill(2, 1).events, ids=lambda event: event.event_type)
def test_a_time_before_1970_is_refused_whatever_reads_it(event: Event) -> None:
    with pytest.raises(UndecodableEventError, match="1970"):
        read_entry(encode(replace(event, created_at=-1)))
    assert read_entry(encode(replace(event, created_at=0))).created_at == 0


@pytest.mark.parametrize(
    "text", ["", "none", "[]", "7", '{"a":NaN}', '{"a":1e999}', '{"a":"\\ud800"}', '{"a":' * 9000 + "1" + "}" * 9000]
)
def test_metadata_that_nobody_could_be_shown_is_refused(text: str) -> None:
    event = History().fill(1, 1).events[0]
    assert isinstance(event.payload, PackageCreated)
    with pytest.raises(UndecodableEventError, match="metadata"):
        read_entry(encode(replace(event, payload=replace(event.payload, metadata=text))))


@pytest.mark.parametrize("event", History().fill(2, 1).events, ids=lambda event: event.event_type)
def test_a_key_is_the_package_s_id_as_it_is_written_although_the_event_writes_it_otherwise(event: Event) -> None:
    key = str(event.package_id).encode()
    value = encode(event)
    odd = value.replace(key, key.upper())
    packages: dict[bytes, UUID] = {}
    for spelled in (value, odd):
        assert read_entry(spelled, key, packages).package_id == event.package_id
        for _ in range(2):
            with pytest.raises(UndecodableEventError, match="key"):
                read_entry(spelled, key.upper(), packages)
