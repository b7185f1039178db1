"""An answer that is no success, back into an error of `services.errors`: by its problem document, or by its status."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from pydantic import ValidationError

from services.errors import (
    ArtifactStoreError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    PushBackError,
    RangeNotSatisfiableError,
    RejectedError,
    TooLargeError,
    UnavailableError,
)
from services.http import headers, problems

MAX_PROBLEM_BYTES = 64 * 1024
"""How much of an answer that is an error is read."""

_BY_STATUS: Mapping[int, type[ArtifactStoreError]] = {
    400: InvalidRequestError,
    404: NotFoundError,
    408: UnavailableError,
    409: ConflictError,
    413: TooLargeError,
    429: PushBackError,
    502: UnavailableError,
    503: UnavailableError,
    504: UnavailableError,
}


def error_of(status: int, answer_headers: Mapping[str, str], body: bytes) -> ArtifactStoreError:
    """The error that an answer stands for.

    `retry_after` of the result is what the answer asks for, 0 for an UnavailableError when it asks for nothing.
    """
    try:
        error = problems.error_of(problems.Problem.model_validate_json(body))
    except ValidationError:  # something between the client and the gateway answered
        error = _by_status(status, answer_headers)
    pause = retry_after(answer_headers.get(headers.RETRY_AFTER))
    if isinstance(error, PushBackError) and pause is not None:
        error.retry_after = pause
    elif isinstance(error, UnavailableError):
        error.retry_after = pause or 0.0
    return error


def _by_status(status: int, answer_headers: Mapping[str, str]) -> ArtifactStoreError:
    detail = f"the gateway's address answered with status {status} and no explanation"
    if status == 416:
        return RangeNotSatisfiableError(detail, _whole_size(answer_headers.get("Content-Range")))
    return _BY_STATUS.get(status, RejectedError if status < 500 else ArtifactStoreError)(detail)


def retry_after(text: str | None) -> float | None:
    """Seconds to wait by `Retry-After` (RFC 9110 §10.2.3: seconds, or a date); None when it is absent or broken."""
    if text is None:
        return None
    if re.fullmatch(r"\d{1,9}(\.\d+)?", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _whole_size(content_range: str | None) -> int:
    """The length in `Content-Range: bytes */N` (RFC 9110 §14.4), 0 when it is not said."""
    match = re.fullmatch(r"bytes \*/(\d+)", content_range or "")
    return int(match[1]) if match else 0
