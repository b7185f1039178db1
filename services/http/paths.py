"""Relative paths and identifiers in URLs: quoted once and read back exactly once (RFC 3986 §2.4)."""

from __future__ import annotations

import re
from urllib.parse import quote, unquote_to_bytes
from uuid import UUID

from services.errors import InvalidPathError, InvalidRequestError

_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_ENCODED_SEPARATOR = re.compile(r"%2[Ff]")
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")

UUID_PATTERN = f"^{_UUID.pattern}$"


def quoted(relative_path: str) -> str:
    """The path as it stands in a URL. Separators stay; everything else but unreserved characters is percent-encoded."""
    return quote(relative_path, safe="/")


def unquoted(raw: str) -> str:
    """The relative path that a raw part of a request target stands for, decoded exactly once.

    `raw` may hold undecoded bytes as surrogate escapes. Only the encoding is judged here, not the path's own rules.

    Raises:
        InvalidPathError: an encoded separator, a broken percent-encoding, or bytes that are not UTF-8.
    """
    if _ENCODED_SEPARATOR.search(raw):
        raise InvalidPathError("a relative path must not hold encoded separators (%2F)")
    if _PERCENT.search(raw):
        raise InvalidPathError("a relative path must not hold a '%' that is no percent-encoding")
    try:
        return unquote_to_bytes(raw.encode("utf-8", "surrogateescape")).decode("utf-8")
    except UnicodeError:
        raise InvalidPathError("a relative path must be UTF-8") from None


def parse_id(name: str, text: str) -> UUID:
    """An identifier in its one canonical form. Raises InvalidRequestError, which names `name`."""
    if not _UUID.fullmatch(text):
        raise InvalidRequestError(f"{name} must be a UUID in lower-case canonical form")
    return UUID(text)
