"""Byte ranges (RFC 9110 §14): which part of a file a request asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from services.errors import RangeNotSatisfiableError

_RANGE = re.compile(
    r"bytes=[ \t]*(?:(?P<first>[0-9]{1,19})-(?P<last>[0-9]{1,19})?|-(?P<suffix>[0-9]{1,19}))[ \t]*", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Slice:
    """`length` bytes from `offset`, of a whole of `size` bytes."""

    offset: int
    length: int
    size: int

    @property
    def content_range(self) -> str:
        """The value of `Content-Range`."""
        return f"bytes {self.offset}-{self.offset + self.length - 1}/{self.size}"


def requested(header: str | None, if_range: str | None, tag: str, size: int) -> Slice | None:
    """The slice that is asked for; None when the whole is the answer.

    Ignored, as RFC 9110 §14.2 allows or demands: another unit, a malformed range, more than one range, and any range
    when `If-Range` is not the strong tag `tag` (without its quotes).

    Raises RangeNotSatisfiableError when no byte lies in the range.
    """
    if header is None or (if_range is not None and if_range.strip() != f'"{tag}"'):
        return None
    match = _RANGE.fullmatch(header.strip())
    if match is None:
        return None
    if match["suffix"] is not None:
        length = min(int(match["suffix"]), size)
        offset = size - length
    else:
        offset = int(match["first"])
        last = size - 1 if match["last"] is None else min(int(match["last"]), size - 1)
        if match["last"] is not None and int(match["last"]) < offset:
            return None
        length = last - offset + 1
    if length <= 0:
        raise RangeNotSatisfiableError(f"the file has {size:,} bytes; none lies in the range", size)
    return Slice(offset, length, size)
