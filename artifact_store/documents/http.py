"""The parts of HTTP requests outside their bodies: header names, digests in headers, paths and identifiers in URLs.

Digests follow RFC 9530 and RFC 1864. A path is quoted once and read back exactly once (RFC 3986 §2.4).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from functools import lru_cache
from urllib.parse import quote, unquote_to_bytes
from uuid import UUID

from artifact_store.errors import InvalidPathError, InvalidRequestError

IDEMPOTENCY_KEY = "Idempotency-Key"
ACTOR = "X-Actor"
CONTENT_ADDRESS = "X-Content-Address"
CONTENT_DIGEST = "Content-Digest"
REPR_DIGEST = "Repr-Digest"
CONTENT_MD5 = "Content-MD5"
RETRY_AFTER = "Retry-After"
LAST_EVENT_ID = "Last-Event-ID"
REQUEST_ID = "X-Request-Id"
LOG_END = "X-Log-End"
"""The header with the position of the log's end when the request came."""

TAR = "application/x-tar"

MAX_KNOWN = 1_000
"""How many blobs one request may ask about."""

_SHA256 = "sha-256"

HASHES = {_SHA256: hashlib.sha256, "sha-512": hashlib.sha512}
"""The algorithms of RFC 9530 that are checked, by name: the secure ones."""

# One member of a structured dictionary whose value is a byte sequence, parameters allowed and ignored (RFC 9651 §3.2).
_MEMBER = re.compile(
    r"(?P<key>[a-z*][a-z0-9_.*-]*)=:(?P<value>[A-Za-z0-9+/=]*):(?P<parameters>(?:; *[a-z*][a-z0-9_.*-]*(?:=[^;,]*)?)*)"
)

_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")

_ENCODED_SEPARATOR = re.compile(r"%2[Ff]")

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")

UUID_PATTERN = f"^{_UUID.pattern}$"


def repr_digest(sha256: bytes) -> str:
    """The header's value for a SHA-256 of 32 raw bytes."""
    return f"{_SHA256}=:{base64.b64encode(sha256).decode()}:"


def parse_digests(name: str) -> Callable[[str], dict[str, bytes]]:
    """A parser for the header with this name. It returns the declared digests by algorithm, for algorithms in HASHES.

    Other algorithms are ignored beside one of these, as RFC 9530 §2 allows. Alone they are refused, so that nobody
    believes that the bytes were checked. If a key comes twice, the last one counts (RFC 9651 §3.2).

    The parser raises InvalidRequestError if the value is not a dictionary of byte sequences, a digest has the wrong
    length, or no algorithm is known.
    """

    def parse(value: str) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for member in value.split(","):
            match = _MEMBER.fullmatch(member.strip(" \t"))
            if match is None:
                raise InvalidRequestError(f"{name} must be a dictionary of byte sequences: {_SHA256}=:BASE64:")
            algorithm = match["key"]
            if algorithm in HASHES:
                found[algorithm] = _digest(f"{name}: {algorithm}", match["value"], HASHES[algorithm]().digest_size)
        if not found:
            raise InvalidRequestError(f"{name} names no supported algorithm: declare {' or '.join(HASHES)}")
        return found

    return parse


def parse_content_md5(value: str) -> bytes:
    """The 16 bytes that `Content-MD5` declares. Raises InvalidRequestError."""
    return _digest(CONTENT_MD5, value, 16)


def _digest(what: str, text: str, length: int) -> bytes:
    try:
        found = base64.b64decode(
            text + "=" * (-len(text) % 4), validate=True
        )  # padding may be left out: RFC 9651 §4.2.7
    except ValueError:  # it is not ASCII, or not base64
        raise InvalidRequestError(f"{what} is not base64") from None
    if len(found) != length:
        raise InvalidRequestError(f"{what} must have {length} bytes, not {len(found)}")
    return found


def quoted(relative_path: str) -> str:
    """The path in the form for a URL: everything except separators and unreserved characters is percent-encoded."""
    return quote(relative_path, safe="/")


def unquoted(raw: str) -> str:
    """The relative path in a raw part of a request target, decoded exactly once.

    `raw` may contain undecoded bytes as surrogate escapes. This only checks the encoding, not the rules for paths.

    Raises:
        InvalidPathError: an encoded separator, a broken percent-encoding, or bytes that are not UTF-8.
    """
    if _ENCODED_SEPARATOR.search(raw):
        raise InvalidPathError("a relative path must not hold encoded separators (%2F)")
    if _PERCENT.search(raw):
        raise InvalidPathError("a relative path must not hold a '%' that does not begin a percent-encoding")
    try:
        return unquote_to_bytes(raw.encode("utf-8", "surrogateescape")).decode("utf-8")
    except UnicodeError:
        raise InvalidPathError("a relative path must be UTF-8") from None


@lru_cache(4_096)
def parse_id(name: str, text: str) -> UUID:
    """An identifier in its one canonical form. Raises InvalidRequestError, which names `name`."""
    if not _UUID.fullmatch(text):
        raise InvalidRequestError(f"{name} must be a UUID in lower-case canonical form")
    return UUID(text)
