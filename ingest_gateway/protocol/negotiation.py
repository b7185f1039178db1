"""Content negotiation, conditional and range requests (RFC 9110 §12.5.1, §13.1, §14): pure functions of headers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from artifact_store.errors import RangeNotSatisfiableError
from ingest_gateway.protocol.http_errors import NotAcceptableError, PreconditionFailedError

_QUALITY = re.compile(r"(?:0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)")
_TAG = re.compile(r'[\s,]*(?:(?P<weak>W/)?"(?P<value>[\x21\x23-\x7e\x80-\U0010ffff]*)")\s*(?:,|$)')


def choose(accept: str | None, offered: Sequence[str]) -> str:
    """The `offered` media type that `accept` prefers; the first one of equal preference.

    The most specific media range that matches decides. Parameters other than `q` are ignored. Raises
    NotAcceptableError if `accept` accepts none.
    """
    if accept is None or not accept.strip():
        return offered[0]
    ranges = [_media_range(part) for part in accept.split(",") if part.strip()]
    best, best_quality = None, 0.0
    for media_type in offered:
        kind = media_type.partition("/")[0]
        matches = {name: quality for name, quality in ranges if name in (media_type, f"{kind}/*", "*/*")}
        quality = next((matches[n] for n in (media_type, f"{kind}/*", "*/*") if n in matches), 0.0)
        if quality > best_quality:
            best, best_quality = media_type, quality
    if best is None:
        raise NotAcceptableError(f"this comes as {' or '.join(offered)}")
    return best


def _media_range(part: str) -> tuple[str, float]:
    name, *parameters = (piece.strip().lower() for piece in part.split(";"))
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip() == "q":
            text = value.strip()
            return name, float(text) if _QUALITY.fullmatch(text) else 0.0
    return name, 1.0


def entity_tags(header: str) -> list[tuple[bool, str]] | None:
    """The tags of an `If-Match` or `If-None-Match` list, each with whether it is weak; None if it is malformed."""
    tags: list[tuple[bool, str]] = []
    at = 0
    text = header.strip(" \t,")  # a list may have empty elements (RFC 9110 §5.6.1.2)
    while at < len(text):
        match = _TAG.match(text, at)
        if match is None:
            return None
        tags.append((match["weak"] is not None, match["value"]))
        at = match.end()
    return tags


def not_modified(if_match: str | None, if_none_match: str | None, tag: str) -> bool:
    """Whether 304 is the answer for a representation with the strong tag `tag` (without its quotes).

    `If-Match` compares strongly, `If-None-Match` weakly. A malformed header matches nothing. Raises
    PreconditionFailedError.
    """
    if if_match is not None and if_match.strip() != "*" and (False, tag) not in (entity_tags(if_match) or []):
        raise PreconditionFailedError("If-Match names another representation")
    if if_none_match is None:
        return False
    return if_none_match.strip() == "*" or any(value == tag for _, value in entity_tags(if_none_match) or [])


_RANGE = re.compile(
    r"bytes=[ \t]*(?:(?P<first>[0-9]{1,19})-(?P<last>[0-9]{1,19})?|-(?P<suffix>[0-9]{1,19}))[ \t]*", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Slice:
    """`length` bytes from `offset` of a representation of `size` bytes."""

    offset: int
    length: int
    size: int

    @property
    def content_range(self) -> str:
        """The value of `Content-Range`."""
        return f"bytes {self.offset}-{self.offset + self.length - 1}/{self.size}"


def requested(header: str | None, if_range: str | None, tag: str, size: int) -> Slice | None:
    """The slice that `Range` asks for; None to answer with the whole.

    Ignored, as RFC 9110 §14.2 allows or demands: another unit, a malformed range, more than one range, and any range
    if `If-Range` is not the strong tag `tag` (without its quotes).

    Raises RangeNotSatisfiableError if the representation has no byte in the range.
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
        raise RangeNotSatisfiableError(f"the file has {size:,} bytes; the range holds none of them", size)
    return Slice(offset, length, size)
