"""Cursors: the key of a page's last row, as opaque text that a client sends back."""

from __future__ import annotations

import base64
import binascii
from typing import Any

import cbor2

from schemas.canonical import canonical_cbor
from services.errors import InvalidRequestError

_MAX_TEXT = 4096


def write_cursor(listing: str, *key: int | str | bytes) -> str:
    """The cursor behind the row of this key: base64url (RFC 4648 §5) of the canonical CBOR array [listing, key…]."""
    return base64.urlsafe_b64encode(canonical_cbor([listing, *key])).rstrip(b"=").decode()


def read_cursor(text: str, listing: str, *types: type) -> list[Any]:
    """The key in a cursor of this listing. Raises InvalidRequestError: it is not one that the listing has given out."""
    try:
        if len(text) > _MAX_TEXT:
            raise ValueError("too long")
        raw = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
        found = cbor2.loads(raw)
        if not isinstance(found, list) or [type(part) for part in found] != [str, *types] or found[0] != listing:
            raise ValueError("not a cursor of this listing")
        if write_cursor(*found) != text:
            raise ValueError("not in the form that is given out")
    except (ValueError, TypeError, binascii.Error, cbor2.CBORDecodeError, RecursionError, OverflowError):
        raise InvalidRequestError("the cursor is not one that this listing has given out") from None
    return found[1:]
