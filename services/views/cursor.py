"""Cursors: the key of a page's last row, as opaque text that a client sends back."""

from __future__ import annotations

import base64
import binascii
from typing import Any
from uuid import UUID

import cbor2
from sqlalchemy import BigInteger, Column, Integer, Text, Uuid
from sqlalchemy.types import TypeEngine

from schemas.canonical import canonical_cbor
from services.errors import InvalidRequestError

_MAX_TEXT = 4096


def write_cursor(listing: str, *key: int | str | UUID) -> str:
    """The cursor behind the row of this key: base64url (RFC 4648 §5) of the canonical CBOR array [listing, key…]."""
    return _encoded([listing, *(part.bytes if isinstance(part, UUID) else part for part in key)])


def _encoded(parts: list[Any]) -> str:
    return base64.urlsafe_b64encode(canonical_cbor(parts)).rstrip(b"=").decode()


def read_cursor(text: str, listing: str, *columns: Column[Any]) -> list[Any]:
    """The key in a cursor of this listing: a value that the database takes for each of these columns.

    Raises InvalidRequestError: it is not one that the listing has given out.
    """
    try:
        if len(text) > _MAX_TEXT:
            raise ValueError("too long")
        raw = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
        found = cbor2.loads(raw)
        if not isinstance(found, list) or found[:1] != [listing]:
            raise ValueError("not a cursor of this listing")
        key = [_value(part, column.type) for part, column in zip(found[1:], columns, strict=True)]
        if _encoded(found) != text:
            raise ValueError("not in the form that is given out")
    except (ValueError, TypeError, binascii.Error, cbor2.CBORDecodeError, RecursionError, OverflowError):
        raise InvalidRequestError("the cursor is not one that this listing has given out") from None
    return key


def _value(part: object, kind: TypeEngine[Any]) -> Any:
    """The part as a value of the column's type, whatever rules a writer has for it. Raises ValueError."""
    match part:
        case bytes() if isinstance(kind, Uuid):
            return UUID(bytes=part)
        case str() if isinstance(kind, Text) and "\0" not in part:
            return part
        case int() if isinstance(kind, Integer) and not isinstance(part, bool):
            bits = 64 if isinstance(kind, BigInteger) else 32
            if -(1 << bits - 1) <= part < 1 << bits - 1:
                return part
    raise ValueError("not a key of this listing")
