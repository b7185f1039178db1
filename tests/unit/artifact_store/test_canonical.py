"""Canonical forms: one value, one text, one encoding."""

from __future__ import annotations

import json
import math
from typing import Any

import cbor2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from artifact_store.canonical import canonical_cbor, cbor_array_head, cbor_integer, jcs

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e15, 1e15) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_jcs_is_a_fixed_point(value: Any) -> None:
    text = jcs(value)
    assert jcs(json.loads(text)) == text


@given(st.dictionaries(st.text(max_size=300), st.integers(), max_size=12))
def test_canonical_cbor_sorts_keys_by_their_encoding(value: dict[str, int]) -> None:
    """RFC 8949 §4.2.1, recomputed from the encodings of single keys."""
    keys = list(cbor2.loads(canonical_cbor(value)))
    assert keys == sorted(value, key=lambda key: cbor2.dumps(key))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"b": 1, "a": 2}, '{"a":2,"b":1}'),
        (1.0, "1"),
        (-0.0, "0"),
        (2**53, "9007199254740992"),
        (1.5, "1.5"),
        (1e-7, "1e-7"),
        ("é€\n", '"é€\\n"'),
        ({"\U0001f600": 1, "\ufb33": 2}, '{"\U0001f600":1,"\ufb33":2}'),
    ],
)
def test_known_jcs_texts(value: Any, text: str) -> None:
    assert jcs(value) == text


@pytest.mark.parametrize(
    "value",
    [2**53 + 1, -(2**53) - 1, 1e21, math.inf, math.nan, "\ud800", {"\udfff": 1}, {1: 2}, b"bytes", {1, 2}],
)
def test_what_json_cannot_say_alike_everywhere_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        jcs(value)


def test_nesting_is_bounded() -> None:
    value: Any = 1
    for _ in range(65):
        value = [value]
    with pytest.raises(ValueError, match="levels"):
        jcs(value)


@pytest.mark.parametrize("border", [0, 24, 1 << 8, 1 << 12, 1 << 16, 1 << 32, (1 << 64) - 1, -(1 << 63)])
def test_an_integer_is_written_as_cbor_has_it(border: int) -> None:
    for number in (border - 1, border, border + 1):
        assert cbor_integer(number) == canonical_cbor(number)


@given(st.integers(0, 2**40))
@example(0)
@example(23)
@example(24)
@example(255)
@example(256)
@example(65_535)
@example(65_536)
@example((1 << 32) - 1)
@example(1 << 32)
def test_an_array_head_is_that_of_an_array_of_this_length(length: int) -> None:
    head = cbor_array_head(length)
    assert head[0] >> 5 == 4
    assert bytes([head[0] & 0x1F]) + head[1:] == cbor2.dumps(length)
