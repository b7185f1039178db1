"""Content negotiation and conditional requests (RFC 9110 §12.5.1, §13.1): pure functions over header texts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ingest_gateway.problems import NotAcceptableError, PreconditionFailedError

_QUALITY = re.compile(r"(?:0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)")
_TAG = re.compile(r'[\s,]*(?:(?P<weak>W/)?"(?P<value>[\x21\x23-\x7e\x80-\U0010ffff]*)")\s*(?:,|$)')


def choose(accept: str | None, offered: Sequence[str]) -> str:
    """The first of the `offered` media types that `accept` likes best.

    The most specific media range that matches decides; other parameters than `q` are not looked at. Raises
    NotAcceptableError when none is taken.
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
    """The tags of an `If-Match` or `If-None-Match` list, each with whether it is weak; None for what is no list."""
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

    `If-Match` compares strongly, `If-None-Match` weakly. What is neither `*` nor a list of tags matches nothing. Raises
    PreconditionFailedError.
    """
    if if_match is not None and if_match.strip() != "*" and (False, tag) not in (entity_tags(if_match) or []):
        raise PreconditionFailedError("If-Match names another representation")
    if if_none_match is None:
        return False
    return if_none_match.strip() == "*" or any(value == tag for _, value in entity_tags(if_none_match) or [])
