"""Rules for the short texts and the metadata of a command."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from schemas.canonical import jcs
from services.errors import InvalidRequestError, TooLargeError

MAX_TEXT_CHARACTERS = 256

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Unicode's categories Cc and Cs, which are closed for good (Unicode Character Encoding Stability Policies)."""


@lru_cache(1_024)
def _holds_control_again(text: str) -> bool:
    """For short texts, which come again and again."""
    return _CONTROL.search(text) is not None


def holds_control(text: str) -> bool:
    """Whether the text holds a control character or a surrogate."""
    return _CONTROL.search(text) is not None


def check_text(field: str, value: str) -> None:
    """Raise InvalidRequestError, naming `field` and the rule, unless the value is 1 to 256 plain characters."""
    if not 1 <= len(value) <= MAX_TEXT_CHARACTERS:
        raise InvalidRequestError(f"{field} must have 1 to {MAX_TEXT_CHARACTERS} characters, not {len(value):,}")
    if _holds_control_again(value):
        raise InvalidRequestError(f"{field} must not hold control characters or surrogates")


def metadata_text(metadata: Any, max_bytes: int) -> str:
    """Bring metadata, a JSON object, to JCS form.

    Raises:
        InvalidRequestError: it is no object, or holds what I-JSON and JCS do not take.
        TooLargeError: the JCS form is longer than `max_bytes` bytes of UTF-8.
    """
    if not isinstance(metadata, dict):
        raise InvalidRequestError("metadata must be a JSON object")
    try:
        text = jcs(metadata)
    except ValueError as error:
        raise InvalidRequestError(f"metadata: {error}") from None
    check_metadata_size(text, max_bytes)
    return text


def check_metadata_size(text: str, max_bytes: int) -> None:
    """Raise TooLargeError when the JCS form is longer than `max_bytes` bytes of UTF-8."""
    size = len(text.encode())
    if size > max_bytes:
        raise TooLargeError(f"metadata is {size:,} bytes in JCS form; the limit is {max_bytes:,}")
