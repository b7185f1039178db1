"""Positions: where in the log a reader stands; opaque to clients, printable, resumable."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self
from uuid import UUID

import cbor2

from schemas.canonical import canonical_cbor
from services.errors import InvalidPositionError, LogIdentityError

MAX_TEXT = 64 * 1024


@dataclass(frozen=True, slots=True)
class Position:
    """The log's identity and, per partition, the offset of the next record; an absent partition stands at its start."""

    log: UUID
    offsets: Mapping[int, int]

    def __str__(self) -> str:
        """URL-safe text without padding (RFC 4648 §5) of the canonical CBOR array [identity, {partition: offset}]."""
        raw = canonical_cbor([self.log.bytes, dict(self.offsets)])
        return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a position that came from outside. Raises InvalidPositionError."""
        try:
            if len(text) > MAX_TEXT:
                raise ValueError("too long")
            raw = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
            log, offsets = cbor2.loads(raw)
            position = cls(UUID(bytes=log), dict(offsets))
            if not all(_is_count(p) and _is_count(o) for p, o in position.offsets.items()) or str(position) != text:
                raise ValueError("not a position")
        except (ValueError, TypeError, binascii.Error, cbor2.CBORDecodeError, RecursionError, OverflowError):
            raise InvalidPositionError("this is not a position that the log has given out") from None
        return position

    def after(self, partition: int, offset: int) -> Position:
        """The position behind the record at `offset` of `partition`."""
        return Position(self.log, {**self.offsets, partition: offset + 1})

    def covers(self, other: Position) -> bool:
        """Whether this is at or beyond `other` in every partition."""
        return all(self.offsets.get(p, 0) >= offset for p, offset in other.offsets.items())

    def furthest(self, other: Position) -> Position:
        """The position that is at or beyond both, of the same log, and beyond nothing that neither is."""
        offsets = dict(self.offsets)
        for partition, offset in other.offsets.items():
            offsets[partition] = max(offset, offsets.get(partition, 0))
        return Position(self.log, offsets)

    def left_behind(self, reached: Position | None) -> dict[int, int]:
        """Per partition, how many offsets lie between `reached` and this; all where nothing of this log was reached."""
        offsets = {} if reached is None or reached.log != self.log else reached.offsets
        return {p: max(0, offset - offsets.get(p, 0)) for p, offset in sorted(self.offsets.items())}

    def require(self, log: UUID) -> None:
        """Raise LogIdentityError unless the position is of this log."""
        if self.log != log:
            raise LogIdentityError(f"the position is of log {self.log}, this is log {log}: it says nothing here")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
