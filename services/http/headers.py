"""Header names of the interface, and `Repr-Digest` (RFC 9530), a structured field (RFC 9651), written and read."""

from __future__ import annotations

import base64
import binascii
import re

from services.errors import InvalidRequestError

IDEMPOTENCY_KEY = "Idempotency-Key"
ACTOR = "X-Actor"
CONTENT_ADDRESS = "X-Content-Address"
REPR_DIGEST = "Repr-Digest"
RETRY_AFTER = "Retry-After"
LAST_EVENT_ID = "Last-Event-ID"

_SHA256 = "sha-256"
# One member of a structured dictionary whose value is a byte sequence, parameters allowed and ignored (RFC 9651 §3.2).
_MEMBER = re.compile(
    r"(?P<key>[a-z*][a-z0-9_.*-]*)=:(?P<value>[A-Za-z0-9+/=]*):(?P<parameters>(?:; *[a-z*][a-z0-9_.*-]*(?:=[^;,]*)?)*)"
)


def repr_digest(sha256: bytes) -> str:
    """The header's value for a SHA-256 of 32 raw bytes."""
    return f"{_SHA256}=:{base64.b64encode(sha256).decode()}:"


def parse_repr_digest(value: str) -> bytes | None:
    """The SHA-256 (32 raw bytes) that the header declares; None when it names other algorithms only.

    Of a key that comes twice the last one counts, as RFC 9651 §3.2 says.

    Raises InvalidRequestError: it is no dictionary of byte sequences, or its SHA-256 has another length.
    """
    found: bytes | None = None
    for member in value.split(","):
        match = _MEMBER.fullmatch(member.strip(" \t"))
        if match is None:
            raise InvalidRequestError(f"{REPR_DIGEST} must be a dictionary of byte sequences: {_SHA256}=:BASE64:")
        if match["key"] == _SHA256:
            try:
                found = base64.b64decode(match["value"], validate=True)
            except binascii.Error:
                raise InvalidRequestError(f"{REPR_DIGEST}: {_SHA256} is not in base64") from None
            if len(found) != 32:
                raise InvalidRequestError(f"{REPR_DIGEST}: a {_SHA256} has 32 bytes, not {len(found)}")
    return found
