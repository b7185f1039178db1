"""Avro's primitive encodings of numbers and texts (Avro 1.12 specification, "Primitive Types"), for the write path."""

from __future__ import annotations

_PAIR = 1 << 14
"""Two bytes of a number hold seven bits each."""

_LOW = _PAIR - 1

_MORE = tuple(bytes((pair & 0x7F | 0x80, pair >> 7 | 0x80)) for pair in range(_PAIR))
"""Two bytes that more bytes follow."""

_LAST = tuple(bytes((pair,) if pair < 0x80 else (pair & 0x7F | 0x80, pair >> 7)) for pair in range(_PAIR))
"""The last byte or two."""


def avro_long(number: int) -> bytes:
    """Zig-zag, then seven bits a byte, the lowest first. Raises ValueError for a number that is no long."""
    if 0 <= number < _PAIR >> 1:
        return _LAST[number << 1]
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError("a number is no Avro long")
    left = number << 1 if number >= 0 else ~(number << 1)
    # Sizes, and times in µs, without a loop: they are what is mostly asked for.
    if left < 1 << 28:
        return _MORE[left & _LOW] + _LAST[left >> 14] if left >= _PAIR else _LAST[left]
    if 1 << 42 <= left < 1 << 56:
        return _MORE[left & _LOW] + _MORE[left >> 14 & _LOW] + _MORE[left >> 28 & _LOW] + _LAST[left >> 42]
    found = _MORE[left & _LOW]
    left >>= 14
    while left >= _PAIR:
        found += _MORE[left & _LOW]
        left >>= 14
    return found + _LAST[left]


def avro_text(encoded: bytes) -> bytes:
    """A text in UTF-8: its length in bytes, then it."""
    size = len(encoded)
    return (_LAST[size << 1] if size < _PAIR >> 1 else avro_long(size)) + encoded
