"""Header names of the interface, and digests in headers (RFC 9530, RFC 1864), written and read."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable

from services.errors import InvalidRequestError

IDEMPOTENCY_KEY = "Idempotency-Key"
ACTOR = "X-Actor"
CONTENT_ADDRESS = "X-Content-Address"
CONTENT_DIGEST = "Content-Digest"
REPR_DIGEST = "Repr-Digest"
CONTENT_MD5 = "Content-MD5"
RETRY_AFTER = "Retry-After"
LAST_EVENT_ID = "Last-Event-ID"

_SHA256 = "sha-256"

HASHES = {_SHA256: hashlib.sha256, "sha-512": hashlib.sha512}
"""Algorithms of RFC 9530 that are checked, by their names: those that are not insecure."""

# One member of a structured dictionary whose value is a byte sequence, parameters allowed and ignored (RFC 9651 §3.2).
_MEMBER = re.compile(
    r"(?P<key>[a-z*][a-z0-9_.*-]*)=:(?P<value>[A-Za-z0-9+/=]*):(?P<parameters>(?:; *[a-z*][a-z0-9_.*-]*(?:=[^;,]*)?)*)"
)


def repr_digest(sha256: bytes) -> str:
    """The header's value for a SHA-256 of 32 raw bytes."""
    return f"{_SHA256}=:{base64.b64encode(sha256).decode()}:"


def parse_digests(name: str) -> Callable[[str], dict[str, bytes]]:
    """Reads the header of this name: the digests that it declares, by algorithm, of those that are in HASHES.

    Others are ignored beside one of these, as RFC 9530 §2 allows, and refused alone: nobody is to take bytes for
    checked that were not. Of a key that comes twice the last one counts (RFC 9651 §3.2).

    The reader raises InvalidRequestError: the value is no dictionary of byte sequences, a digest has another length, or
    none of the algorithms is known.
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
            raise InvalidRequestError(f"{name} names no algorithm that is checked here: declare {' or '.join(HASHES)}")
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
    except binascii.Error:
        raise InvalidRequestError(f"{what} is not in base64") from None
    if len(found) != length:
        raise InvalidRequestError(f"{what} must have {length} bytes, not {len(found)}")
    return found
