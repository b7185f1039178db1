"""Positions: each has exactly one text, which is correct, and any other text is refused."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable
from uuid import UUID

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifact_store import position as position_module
from artifact_store.canonical import canonical_cbor
from artifact_store.errors import InvalidPositionError, LogIdentityError
from artifact_store.position import MAX_TEXT, Position

LOG = UUID("11111111-2222-3333-4444-555555555555")
OTHER = UUID("99999999-2222-3333-4444-555555555555")

few = st.dictionaries(st.integers(0, 1023), st.integers(0, 2**63 - 1), max_size=20)
many = st.builds(lambda first, others: dict.fromkeys(range(65), first) | others, st.integers(0, 2**63 - 1), few)
offsets = few | many
"""Of few partitions, whose positions the previous release reads as well, and of more."""

positions = st.builds(Position, st.uuids(), offsets)


def text_of(value: object) -> str:
    return base64.urlsafe_b64encode(cbor2.dumps(value)).rstrip(b"=").decode()


@given(positions)
def test_a_position_is_its_text_and_the_text_is_the_position(position: Position) -> None:
    text = str(position)

    assert Position.parse(text) == position
    assert str(Position.parse(text)) == text
    assert text.isascii()
    assert set(text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


@given(offsets)
def test_the_text_does_not_depend_on_the_order_of_partitions(found: dict[int, int]) -> None:
    assert str(Position(LOG, dict(reversed(found.items())))) == str(Position(LOG, found))


@given(st.text())
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidPositionError):
        Position.parse(text)


@given(positions, st.data())
def test_a_damaged_text_is_refused_or_another_position_never_the_same(position: Position, data: st.DataObject) -> None:
    text = str(position)
    index = data.draw(st.integers(0, len(text) - 1))
    damaged = text[:index] + data.draw(st.sampled_from("AZaz09-_")) + text[index + 1 :]
    try:
        read = Position.parse(damaged)
    except InvalidPositionError:
        return
    assert (read == position) is (damaged == text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "=",
        str(Position(LOG, {0: 1})) + "=",
        str(Position(LOG, {0: 1})) + "\n",
        " " + str(Position(LOG, {0: 1})),
        "A" * (MAX_TEXT + 1),
        text_of([LOG.bytes]),
        text_of([LOG.bytes, {0: 1}, 2]),
        text_of([LOG.bytes[:15], {0: 1}]),
        text_of([str(LOG), {0: 1}]),
        text_of(["sixteen letters.", {0: 1}]),
        text_of([LOG.bytes, [0, 1]]),
        text_of([LOG.bytes, {0: -1}]),
        text_of([LOG.bytes, {-1: 0}]),
        text_of([LOG.bytes, {0: 1.0}]),
        text_of([LOG.bytes, {0: True}]),
        text_of([LOG.bytes, {"0": 1}]),
        text_of([LOG.bytes, {1: 0, 0: 1}]),
        text_of({"log": LOG.bytes}),
        text_of(None),
        base64.urlsafe_b64encode(b"\x81" * 5000).rstrip(b"=").decode(),
    ],
)
def test_what_the_log_did_not_give_out_is_refused(text: str) -> None:
    with pytest.raises(InvalidPositionError):
        Position.parse(text)


@given(positions)
def test_a_text_of_the_previous_format_is_still_read(position: Position) -> None:
    text = base64.urlsafe_b64encode(canonical_cbor([position.log.bytes, dict(position.offsets)])).rstrip(b"=").decode()

    assert Position.parse(text) == position


@given(few)
def test_a_position_of_few_partitions_is_read_by_the_previous_release(found: dict[int, int]) -> None:
    text = base64.urlsafe_b64encode(canonical_cbor([LOG.bytes, found])).rstrip(b"=").decode()

    assert str(Position(LOG, found)) == text


@pytest.mark.parametrize(
    "offset",
    [
        lambda: 10**9,
        lambda: 10**9 + random.randrange(-(10**7), 10**7),
        lambda: random.randrange(2 * 10**9),
        lambda: 10**12 + random.randrange(2**32),
        lambda: random.choice([0, 10**9]),
    ],
)
def test_a_position_of_1024_partitions_fits_in_6_kib(offset: Callable[[], int]) -> None:
    random.seed(1024)

    assert len(str(Position(LOG, {p: offset() for p in range(1024)}))) < 6 * 1024


def test_the_position_after_the_next_event_encodes_the_offsets_around_that_event_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    position = Position(LOG, {p: 10**9 + p for p in range(1024)})
    str(position)
    encoded: list[tuple[dict[int, int], int]] = []
    packed = position_module._packed

    def counted(found: dict[int, int], block: int) -> bytes:
        encoded.append((found, block))
        return packed(found, block)

    monkeypatch.setattr(position_module, "_packed", counted)
    for partition in range(0, 1024, 100):
        position = position.after(partition, 10**9 + 2_000)
        str(position)

    assert len(encoded) == len(range(0, 1024, 100))


@given(offsets, st.lists(st.tuples(st.integers(0, 1023), st.integers(0, 2**62)), max_size=20))
def test_a_text_does_not_depend_on_the_way_that_led_to_the_position(
    start: dict[int, int], moves: list[tuple[int, int]]
) -> None:
    position, expected = Position(LOG, start), dict(start)
    for partition, offset in moves:
        position = position.after(partition, offset)
        expected[partition] = offset + 1

        assert str(position) == str(Position(LOG, expected))


def test_a_part_that_a_later_release_adds_behind_the_offsets_is_passed_over() -> None:
    position = Position(LOG, dict.fromkeys(range(70), 5))
    raw = base64.urlsafe_b64decode(_padded(str(position)))
    later = base64.urlsafe_b64encode(raw + b"\x01\x03abc").rstrip(b"=").decode()

    assert Position.parse(later) == position


@pytest.mark.parametrize(
    "raw",
    [
        b"",  # no number of blocks
        b"\x01",  # no block
        b"\x01\x00\x01\x02",  # a block cut off
        b"\x01\x00\x00\x01\x00",  # a block of no partition
        b"\x01\x00\x21\x01\x00",  # a block of too many partitions
        b"\x01\x00\x01\x00\x00",  # nothing in the last place of a block
        b"\x01\x00\x02\x01\x01\x03",  # a base that is not the least
        b"\x01\x00\x02\x01\x01\x06",  # a bit beyond the last place
        b"\x01\x00\x02\x01\x02\x04",  # more bits than are needed
        b"\x01\x00\x01\x81\x00\x00",  # a number with leading zeros
        b"\x01\x00\x01" + b"\xff" * 12 + b"\x01\x00",  # a number without bounds
        b"\x01" + b"\xff" * 8 + b"\x01\x01\x01\x00",  # a partition that no log has
        b"\x01\x00\x01\x01\xff",  # more bits than an offset has
        b"\xff\xff\xff\xff\x0f",  # blocks without end
        b"\x00\x00\x00",  # a part without a number
        b"\x00\x01\x05abc",  # a part cut off
        b"\x00\x02\x01a\x01\x01a",  # parts out of order
    ],
)
def test_what_is_malformed_behind_the_identity_is_refused(raw: bytes) -> None:
    text = base64.urlsafe_b64encode(b"\x01" + LOG.bytes + raw).rstrip(b"=").decode()

    with pytest.raises(InvalidPositionError):
        Position.parse(text)


def test_after_moves_one_partition_behind_a_record() -> None:
    position = Position(LOG, {0: 5, 1: 7})

    assert position.after(0, 9) == Position(LOG, {0: 10, 1: 7})
    assert position.after(2, 0) == Position(LOG, {0: 5, 1: 7, 2: 1})
    assert position.offsets == {0: 5, 1: 7}


@given(offsets, offsets)
def test_covering_goes_partition_by_partition(one: dict[int, int], two: dict[int, int]) -> None:
    both = {partition: max(one.get(partition, 0), two.get(partition, 0)) for partition in one.keys() | two.keys()}

    assert Position(LOG, both).covers(Position(LOG, one))
    assert Position(LOG, both).covers(Position(LOG, two))
    assert Position(LOG, one).covers(Position(LOG, {}))
    assert Position(LOG, one).covers(Position(LOG, two)) is (both == one or _equal_but_for_zeros(both, one))


def _padded(text: str) -> str:
    return text + "=" * (-len(text) % 4)


def _equal_but_for_zeros(one: dict[int, int], two: dict[int, int]) -> bool:
    return {p: o for p, o in one.items() if o} == {p: o for p, o in two.items() if o}


def test_a_position_of_another_log_is_refused() -> None:
    Position(LOG, {}).require(LOG)
    with pytest.raises(LogIdentityError, match=str(OTHER)):
        Position(OTHER, {}).require(LOG)
