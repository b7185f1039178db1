"""Canonical forms: CBOR (RFC 8949 §4.2) for digests, JCS (RFC 8785) for JSON that people read."""

from __future__ import annotations

import json
import math
from struct import Struct
from typing import Any

import cbor2
import rfc8785

_MAX_SAFE = 2**53
"""Up to this integer, doubles are exact and have their own JCS text."""
MAX_LEVELS = 64
"""How deep a JSON value may be nested."""


def canonical_cbor(value: Any) -> bytes:
    """Encode deterministically: shortest heads, definite lengths, map keys in bytewise order of their encodings.

    cbor2 sorts keys length first (RFC 7049 §3.9); for keys that are all text strings, as ours are, that is the same
    order as RFC 8949 §4.2.1 asks for, because the head of a longer string is larger.
    """
    return cbor2.dumps(value, canonical=True)


def ordered_cbor(value: Any) -> bytes:
    """As `canonical_cbor`, for a value without floats whose maps are written in canonical order: four times as fast."""
    return cbor2.dumps(value)


def cbor_text(encoded: bytes) -> bytes:
    """A text string, given in UTF-8."""
    size = len(encoded)
    return (_TEXT_HEADS[size] if size < _USUAL_TEXT else _text_head(size)) + encoded


def _text_head(size: int) -> bytes:
    head = cbor_integer(size)
    return bytes([head[0] | 0x60]) + head[1:]


def cbor_integer(number: int) -> bytes:
    """An integer in its shortest encoding."""
    if 0 <= number < _SMALL:
        return _SMALL_INTEGERS[number]
    if _TWO_BYTES < number <= _FOUR_BYTES:
        return _FOUR(0x1A, number)
    if _FOUR_BYTES < number <= _EIGHT_BYTES:
        return _EIGHT(0x1B, number)
    return cbor2.dumps(number)


_SMALL = 1 << 12
_SMALL_INTEGERS = tuple(map(cbor2.dumps, range(_SMALL)))
_TWO_BYTES, _FOUR_BYTES, _EIGHT_BYTES = (1 << 16) - 1, (1 << 32) - 1, (1 << 64) - 1
_FOUR, _EIGHT = Struct(">BI").pack, Struct(">BQ").pack

_USUAL_TEXT = 1_025
_TEXT_HEADS = tuple(_text_head(size) for size in range(_USUAL_TEXT))


def cbor_array_head(length: int) -> bytes:
    """The head of a definite-length array, so that its items can be encoded one by one."""
    head = cbor_integer(length)
    return head[:1].translate(_UINT_TO_ARRAY) + head[1:]


_UINT_TO_ARRAY = bytes((b & 0x1F) | 0x80 for b in range(256))


def jcs(value: Any, *, levels: int = MAX_LEVELS) -> str:
    """The JCS text of a JSON value.

    Numbers are normalised first: 1.0 and 1 are the same number and give the same text.

    Raises:
        ValueError: an integer beyond ±2^53, a non-finite number, a lone surrogate, a key that is not a string, more
            than `levels` levels, or a type that JSON does not have; the text names the rule.
    """
    try:
        return rfc8785.dumps(_prepare(value, levels)).decode()
    except UnicodeEncodeError:
        raise ValueError("text holds a lone surrogate") from None


def is_jcs_object(text: str) -> bool:
    """Whether `text` is a JSON object that `jcs` accepts; it need not be in JCS form. Ten times faster than `jcs`.

    `text` must not contain lone surrogates, which no record does; escaped ones are noticed.
    """
    if text == "{}":
        return True
    try:
        value = json.loads(
            text,
            parse_int=lambda digits: _safe(int(digits)),
            parse_float=lambda digits: _safe(float(digits)),
            parse_constant=lambda name: _safe(float(name)),
        )
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and _is_shallow(value)


def _safe(number: float) -> float:
    if not abs(number) <= _MAX_SAFE:
        raise ValueError("not finite, or beyond ±2^53")
    return number


def _is_shallow(value: dict[str, Any]) -> bool:
    """Whether nothing lies deeper than MAX_LEVELS."""
    level: list[Any] = [value]
    for _ in range(MAX_LEVELS):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return True
    return not any(level)


def plain_json(value: Any) -> Any:
    """The value with every integral number as `int`, so that its canonical CBOR is as unique as its JCS text.

    Raises ValueError as `jcs` does.
    """
    match value:
        case dict():
            return {k: plain_json(v) for k, v in value.items()}
        case list() | tuple():
            return [plain_json(v) for v in value]
        case float() if value.is_integer():
            return int(value)
    return value


def _prepare(value: Any, levels: int) -> Any:
    if levels < 0:
        raise ValueError(f"more than {MAX_LEVELS} levels deep")
    match value:
        case None | bool():
            return value
        case str():
            _check_text(value)
            return value
        case int():
            if abs(value) > _MAX_SAFE:
                raise ValueError("an integer is beyond ±2^53")
            # The JCS library draws the line one below; the double of the same value has the same text.
            return float(value) if abs(value) == _MAX_SAFE else value
        case float():
            if not math.isfinite(value):
                raise ValueError("a number is not finite")
            return _prepare(int(value), levels) if value.is_integer() else value
        case dict():
            for key in value:
                if not isinstance(key, str):
                    raise ValueError("a key is not a string")
                _check_text(key)
            return {k: _prepare(v, levels - 1) for k, v in value.items()}
        case list() | tuple():
            return [_prepare(v, levels - 1) for v in value]
    raise ValueError(f"{type(value).__name__} is not a JSON type")


def _check_text(text: str) -> None:
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("text holds a lone surrogate")
