"""Problem details (RFC 9457): converts errors to `application/problem+json` and back."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from artifact_store.documents import http, times
from artifact_store.errors import (
    ArtifactStoreError,
    ConflictError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    PushBackError,
    RangeNotSatisfiableError,
    RejectedError,
    TooLargeError,
    UnauthenticatedError,
    UnavailableError,
)
from artifact_store.rules import parse_number

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:artifact-store:problem:"

MAX_PROBLEM_BYTES = 64 * 1024
"""How many bytes of an error answer are read."""


class FieldFault(BaseModel):
    """One field of a request that breaks a rule."""

    model_config = ConfigDict(frozen=True)

    field: str = Field(description="Where the field stands: names and indexes joined by dots")
    message: str = Field(description="The rule that it breaks")


class Problem(BaseModel):
    """An error, for programs by `type` and for people by `title` and `detail`."""

    model_config = ConfigDict(frozen=True)

    type: str = Field(description="Stable URN of the kind of problem", pattern=f"^{re.escape(TYPE_PREFIX)}[a-z0-9-]+$")
    title: str
    status: int = Field(ge=400, le=599)
    detail: str
    errors: tuple[FieldFault, ...] | None = Field(None, description="Every field that is at fault")
    retry_after: float | None = Field(None, description="Seconds to wait before the same request again")
    size: int | None = Field(None, description="Length of the whole in bytes, where a range cannot be satisfied")
    package_id: str | None = Field(None, description="The package that the problem is about")
    finalized_at: str | None = Field(None, description="When it was finalized (RFC 3339, UTC)")
    manifest_digest: str | None = Field(None, description="The content address of its manifest")
    events: str | None = Field(None, description="Where its events are read, each with its `command_id`")

    @property
    def name(self) -> str:
        """The last part of the type."""
        return self.type.removeprefix(TYPE_PREFIX)


def problem(status: int, name: str, detail: str, **more: object) -> Problem:
    """A problem with this status and name; the title is the name in words."""
    title = name.replace("-", " ").capitalize()
    detail = detail.encode("utf-8", "backslashreplace").decode()  # it may quote text from outside
    return Problem.model_validate(
        {"type": TYPE_PREFIX + name, "title": title, "status": status, "detail": detail, **more}
    )


def problem_of(error: ArtifactStoreError) -> Problem:
    """The problem document of this error."""
    more: dict[str, object] = {}
    if isinstance(error, PushBackError | UnavailableError):
        more["retry_after"] = error.retry_after
    if isinstance(error, RangeNotSatisfiableError):
        more["size"] = error.size
    facts = dict(error.facts)
    if "finalized_at" in facts:
        facts["finalized_at"] = times.to_text(int(facts["finalized_at"]))
    if "package_id" in facts:
        more["events"] = f"/v1/events?package_id={facts['package_id']}"
    return problem(error.status, error.problem, error.detail, **more, **facts)


def error_of(found: Problem) -> ArtifactStoreError:
    """The error in this problem, in its own class. For an unknown kind, a class that says what to do next."""
    kind = _BY_NAME.get(found.name)
    if kind is RangeNotSatisfiableError:
        return RangeNotSatisfiableError(found.detail, found.size or 0)
    if kind is PushBackError or found.status == 429:
        return PushBackError(found.detail, 1.0 if found.retry_after is None else found.retry_after)
    if kind is None and found.status == 408:  # the sender was silent for too long, but may continue
        kind = UnavailableError
    if kind is None:
        kind = RejectedError if found.status < 500 else UnavailableError if found.status > 500 else ArtifactStoreError
    error = kind(found.detail)
    error.facts = _facts(found)
    return error


def _facts(found: Problem) -> dict[str, str | int]:
    """The facts that `problem_of` copied from the error."""
    facts: dict[str, str | int] = {
        name: value for name in ("package_id", "manifest_digest") if (value := getattr(found, name)) is not None
    }
    if found.finalized_at is not None:
        with suppress(ValueError):  # the problem may come from anywhere
            facts["finalized_at"] = times.from_text(found.finalized_at)
    return facts


def _tree(kind: type[ArtifactStoreError]) -> Iterator[type[ArtifactStoreError]]:
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == ArtifactStoreError.__module__:
            yield from _tree(child)


_BY_NAME = {kind.problem: kind for kind in _tree(ArtifactStoreError)}


_BY_STATUS: Mapping[int, type[ArtifactStoreError]] = {
    400: InvalidRequestError,
    401: UnauthenticatedError,
    403: ForbiddenError,
    404: NotFoundError,
    408: UnavailableError,
    409: ConflictError,
    413: TooLargeError,
    429: PushBackError,
    502: UnavailableError,
    503: UnavailableError,
    504: UnavailableError,
}


def error_of_answer(status: int, answer_headers: Mapping[str, str], body: bytes) -> ArtifactStoreError:
    """The error in an answer of the gateway.

    Its `retry_after` is the pause that the answer asks for. An UnavailableError gets 0 if the answer asks for none.
    """
    try:
        error = error_of(Problem.model_validate_json(body))
    except ValidationError:  # an answer of `/readyz`, or of something between the client and the gateway
        error = _by_status(status, answer_headers, body)
    pause = retry_after(answer_headers.get(http.RETRY_AFTER))
    if isinstance(error, PushBackError) and pause is not None:
        error.retry_after = pause
    elif isinstance(error, UnavailableError):
        error.retry_after = pause or 0.0
    return error


class _Part(BaseModel):
    state: str
    cause: str | None


class _Readiness(BaseModel):
    """The answer of `/readyz`."""

    status: str
    parts: Mapping[str, _Part]


def _by_status(status: int, answer_headers: Mapping[str, str], body: bytes) -> ArtifactStoreError:
    try:
        found = _Readiness.model_validate_json(body)
    except ValidationError:
        detail = f"the gateway's address answered with status {status} and no explanation"
    else:
        causes = "; ".join(f"{name}: {part.cause}" for name, part in found.parts.items() if part.state != "ok")
        detail = (
            f"the gateway is {found.status}: {causes}" if causes else f"the gateway is {found.status}: it is stopping"
        )
    if status == 416:
        return RangeNotSatisfiableError(detail, _whole_size(answer_headers.get("Content-Range")))
    return _BY_STATUS.get(status, RejectedError if status < 500 else ArtifactStoreError)(detail)


def retry_after(text: str | None) -> float | None:
    """The seconds to wait in `Retry-After` (RFC 9110 §10.2.3: seconds, or a date); None if it is absent or invalid."""
    if text is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _whole_size(content_range: str | None) -> int:
    """The length in `Content-Range: bytes */N` (RFC 9110 §14.4); 0 if it is not given."""
    unit, _, size = (content_range or "").partition("/")
    return (unit == "bytes *" and parse_number(size)) or 0
