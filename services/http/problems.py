"""Problems (RFC 9457): how an error travels as `application/problem+json`, and how it is read back."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict, Field

from services import errors
from services.errors import ArtifactStoreError, PushBackError, RangeNotSatisfiableError, RejectedError, UnavailableError

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:artifact-store:problem:"


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

    @property
    def name(self) -> str:
        """The last part of the type."""
        return self.type.removeprefix(TYPE_PREFIX)


def problem(status: int, name: str, detail: str, **more: object) -> Problem:
    """A problem of this status and name; the title is the name in words."""
    title = name.replace("-", " ").capitalize()
    detail = detail.encode("utf-8", "backslashreplace").decode()  # it may quote what came from outside
    return Problem.model_validate(
        {"type": TYPE_PREFIX + name, "title": title, "status": status, "detail": detail, **more}
    )


def problem_of(error: ArtifactStoreError) -> Problem:
    """How this error travels."""
    more: dict[str, object] = {}
    if isinstance(error, PushBackError | UnavailableError):
        more["retry_after"] = error.retry_after
    if isinstance(error, RangeNotSatisfiableError):
        more["size"] = error.size
    return problem(error.status, error.problem, error.detail, **more)


def error_of(found: Problem) -> ArtifactStoreError:
    """The error that this problem was, of the very class; of an unknown kind, the class that says what to do next."""
    kind = _BY_NAME.get(found.name)
    if kind is RangeNotSatisfiableError:
        return RangeNotSatisfiableError(found.detail, found.size or 0)
    if kind is PushBackError or found.status == 429:
        return PushBackError(found.detail, 1.0 if found.retry_after is None else found.retry_after)
    if kind is None and found.status == 408:  # the sender kept still for too long, and may go on
        kind = UnavailableError
    if kind is None:
        kind = RejectedError if found.status < 500 else UnavailableError if found.status > 500 else ArtifactStoreError
    return kind(found.detail)


def _tree(kind: type[ArtifactStoreError]) -> Iterator[type[ArtifactStoreError]]:
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from _tree(child)


_BY_NAME = {kind.problem: kind for kind in _tree(ArtifactStoreError)}
