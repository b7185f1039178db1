"""Positions: how far a reader has read in the log; opaque to clients, printable, resumable."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import Self
from uuid import UUID

import cbor2

from artifact_store.canonical import canonical_cbor
from artifact_store.errors import InvalidPositionError, LogIdentityError

MAX_TEXT = 64 * 1024

_FORMAT = 1
_BLOCK = 32
"""How many partitions are encoded together: when one of them moves, the others' blocks stay as they are."""

_PREVIOUS_PARTITIONS = 64
"""Up to this many partitions, a position is written in the previous format, which the previous release can also read.
So a client that follows the log can switch between gateways of both releases during an upgrade."""

_MAX_BLOCKS = 2048
"""A text that names a partition beyond these blocks is refused before it takes memory."""

_MAX_BITS = 64


@dataclass(frozen=True, slots=True)
class Position:
    """The log's identity and, per partition, the offset of the next record; an absent partition is at its start."""

    log: UUID
    offsets: Mapping[int, int]
    _blocks: dict[int, bytes] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The encoded offsets by block number, of all blocks or none; filled when first needed."""

    def __str__(self) -> str:
        """URL-safe base64 without padding (RFC 4648 §5) of the format's number, the identity and the blocks of offsets.

        With 1,024 partitions, it is shorter than 6 KiB if their offsets are within 2³² of each other.
        """
        return _text(self._encoded_previously() if self._is_small else self._encoded())

    @property
    def _is_small(self) -> bool:
        return len(self.offsets) <= _PREVIOUS_PARTITIONS

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a position that came from outside, in this format or the previous one. Raises InvalidPositionError."""
        try:
            if len(text) > MAX_TEXT:
                raise ValueError("too long")
            raw = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
            if _text(raw) != text:
                raise ValueError("another text of the same bytes")
            return cls._read(raw) if raw[:1] == bytes([_FORMAT]) else cls._read_previous(raw)
        except (ValueError, TypeError, IndexError, OverflowError, RecursionError, cbor2.CBORDecodeError):
            raise InvalidPositionError("this is not a position that the log has given out") from None

    @classmethod
    def _read(cls, raw: bytes) -> Self:
        """Read the bytes of `_encoded`. Parts that a later release adds after them are skipped."""
        count, at = _number(raw, 17)
        offsets: dict[int, int] = {}
        blocks: dict[int, bytes] = {}
        block = -1
        for _ in range(count):
            gap, at = _number(raw, at)
            block += gap + 1
            if block >= _MAX_BLOCKS:
                raise ValueError("no log has so many partitions")
            end = _block_end(raw, at)
            blocks[block] = raw[at:end]
            for place, following in enumerate(_unpacked(blocks[block]), block * _BLOCK):
                if following:
                    offsets[place] = following - 1
            at = end
        last = 0
        while at < len(raw):
            part, at = _number(raw, at)
            size, at = _number(raw, at)
            at += size
            if part <= last or at > len(raw):
                raise ValueError("parts out of order, or one cut off")
            last = part
        position = cls(UUID(bytes=raw[1:17]), offsets)
        position._blocks.update(blocks)
        return position

    @classmethod
    def _read_previous(cls, raw: bytes) -> Self:
        """Read the canonical CBOR array [identity, {partition: offset}]."""
        log, offsets = cbor2.loads(raw)
        if not isinstance(log, bytes):  # UUID would accept a text of 16 characters, and fail with an AssertionError
            raise TypeError("the identity is no byte string")
        position = cls(UUID(bytes=log), dict(offsets))
        if not all(_is_count(p) and _is_count(o) for p, o in position.offsets.items()):
            raise ValueError("not a position")
        if position._encoded_previously() != raw:
            raise ValueError("not canonical")
        return position

    def _encoded_previously(self) -> bytes:
        return canonical_cbor([self.log.bytes, self.offsets])

    def _encoded(self) -> bytes:
        blocks = self._filled()
        pieces = [bytes([_FORMAT]), self.log.bytes, _digits(len(blocks))]
        before = -1
        for block in sorted(blocks):
            pieces += (_digits(block - before - 1), blocks[block])
            before = block
        return b"".join(pieces)

    def _filled(self) -> dict[int, bytes]:
        if not self._blocks and self.offsets:
            for block, _ in groupby(sorted(self.offsets), lambda partition: partition // _BLOCK):
                self._blocks[block] = _packed(self.offsets, block)
        return self._blocks

    def after(self, partition: int, offset: int) -> Position:
        """The position after the record at `offset` of `partition`."""
        moved = Position(self.log, {**self.offsets, partition: offset + 1})
        if moved._is_small:
            return moved
        block = partition // _BLOCK
        moved._blocks.update(self._filled())
        moved._blocks[block] = _packed(moved.offsets, block)
        return moved

    def covers(self, other: Position) -> bool:
        """Whether this is at or beyond `other` in every partition."""
        return all(self.offsets.get(p, 0) >= offset for p, offset in other.offsets.items())

    def furthest(self, other: Position) -> Position:
        """The least position that covers both, which must be of the same log."""
        offsets = dict(self.offsets)
        for partition, offset in other.offsets.items():
            offsets[partition] = max(offset, offsets.get(partition, 0))
        return Position(self.log, offsets)

    def left_behind(self, reached: Position | None) -> dict[int, int]:
        """By partition, how many offsets `reached` is behind this. None, or another log's position, counts as zero."""
        offsets = {} if reached is None or reached.log != self.log else reached.offsets
        return {p: max(0, offset - offsets.get(p, 0)) for p, offset in sorted(self.offsets.items())}

    def require(self, log: UUID) -> None:
        """Raise LogIdentityError unless the position is of this log."""
        if self.log != log:
            raise LogIdentityError(
                f"the position belongs to log {self.log}, but this is log {log}: it has no meaning here"
            )

    def require_within(self, end: Position) -> None:
        """Raise LogIdentityError unless the position is of the log of `end`, InvalidPositionError if it is after it."""
        self.require(end.log)
        if not end.covers(self):
            raise InvalidPositionError("the position is beyond the end of the log")


def _packed(offsets: Mapping[int, int], block: int) -> bytes:
    """The offsets of one block: the number of its partitions, the least value, and each value's difference from it.

    A value is the offset plus one, or 0 for an absent partition. Differences have as many bits as the largest needs.
    """
    values = [offsets.get(partition, -1) + 1 for partition in range(block * _BLOCK, (block + 1) * _BLOCK)]
    while not values[-1]:
        values.pop()
    least = min(values)
    bits = (max(values) - least).bit_length()
    packed = 0
    for value in reversed(values):
        packed = packed << bits | value - least
    size = (len(values) * bits + 7) // 8
    return b"%c%b%c%b" % (len(values), _digits(least), bits, packed.to_bytes(size, "little"))


@lru_cache(maxsize=4096)  # most blocks of two successive positions are the same
def _unpacked(block: bytes) -> tuple[int, ...]:
    """The values that `_packed` encoded. Raises ValueError if it would have encoded them differently."""
    least, at = _number(block, 1)
    bits, packed = block[at], int.from_bytes(block[at + 1 :], "little")
    values = tuple(least + (packed >> place * bits & (1 << bits) - 1) for place in range(block[0]))
    if not values[-1] or _packed({place: value - 1 for place, value in enumerate(values)}, 0) != block:
        raise ValueError("not canonical")
    return values


def _block_end(raw: bytes, at: int) -> int:
    count, (_, width) = raw[at], _number(raw, at + 1)
    end = width + 1 + (count * raw[width] + 7) // 8
    if not 1 <= count <= _BLOCK or raw[width] > _MAX_BITS or end > len(raw):
        raise ValueError("not a block of offsets")
    return end


def _digits(number: int) -> bytes:
    """A number in LEB128: seven bits per byte, lowest first."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def _number(raw: bytes, at: int) -> tuple[int, int]:
    """The LEB128 number at `at`, and the index after it. Raises ValueError, IndexError."""
    number, bits = raw[at] & 0x7F, 0
    while raw[at] & 0x80:
        at, bits = at + 1, bits + 7
        if bits > _MAX_BITS or not raw[at]:
            raise ValueError("not a number, or not the shortest form of it")
        number |= (raw[at] & 0x7F) << bits
    return number, at + 1


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
