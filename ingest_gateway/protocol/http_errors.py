"""Errors of the HTTP protocol, and the one place where an error becomes an answer (RFC 9457)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from aiohttp import web

from artifact_store.documents.http import RETRY_AFTER
from artifact_store.documents.problem_details import MEDIA_TYPE, FieldFault, Problem, problem, problem_of
from artifact_store.errors import (
    ArtifactStoreError,
    ForbiddenError,
    InvalidRequestError,
    RejectedError,
    UnauthenticatedError,
)


class ProtocolError(RejectedError):
    """The request breaks a rule of HTTP rather than of the registry. `headers` go out with the answer."""

    def __init__(self, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.headers = headers or {}


class MalformedHttpError(ProtocolError, problem="malformed-http", status=400):
    """The message is not valid HTTP, or its framing is broken."""


class IncompleteBodyError(ProtocolError, problem="incomplete-body", status=400):
    """The body ended before its announced end."""


class ForeignOriginError(ProtocolError, problem="foreign-origin", status=403):
    """A page of another site sent the request."""


class UnknownResourceError(ProtocolError, problem="unknown-resource", status=404):
    """No resource has this path."""


class MethodNotAllowedError(ProtocolError, problem="method-not-allowed", status=405):
    """The resource does not take this method; `Allow` names those it takes."""


class NotAcceptableError(ProtocolError, problem="not-acceptable", status=406):
    """There is no representation that `Accept` takes."""


class BodyTimeoutError(ProtocolError, problem="body-timeout", status=408):
    """The body stood still, or came too slowly, for too long."""


class AnswerTimeoutError(ProtocolError, problem="answer-timeout", status=408):
    """The client took the answer's bytes too slowly, or not at all: it is cut off, and so never told this."""


class PreconditionFailedError(ProtocolError, problem="precondition-failed", status=412):
    """`If-Match` names another representation."""


class UnsupportedMediaTypeError(ProtocolError, problem="unsupported-media-type", status=415):
    """The body's media type or coding is not taken here."""


class UnknownHostError(ProtocolError, problem="unknown-host", status=421):
    """`Host` is no name of this gateway."""


class ExpectationFailedError(ProtocolError, problem="expectation-failed", status=417):
    """`Expect` asks for something other than 100-continue."""


class HeadTooLargeError(ProtocolError, problem="head-too-large", status=431):
    """The request's line and headers have more bytes together than are taken."""


class InvalidFieldsError(InvalidRequestError):
    """Fields of a JSON body are missing, unknown or mistyped; `faults` names each."""

    def __init__(self, faults: tuple[FieldFault, ...]) -> None:
        super().__init__("; ".join(f"{fault.field}: {fault.message}" for fault in faults))
        self.faults = faults


def answer_of(error: ArtifactStoreError) -> web.Response:
    """The problem document for this error."""
    found = problem_of(error)
    headers: dict[str, str] = {}
    if isinstance(error, InvalidFieldsError):
        found = found.model_copy(update={"errors": error.faults})
    if isinstance(error, ProtocolError):
        headers.update(error.headers)
    if isinstance(error, UnauthenticatedError | ForbiddenError):
        headers["WWW-Authenticate"] = error.challenge
    if found.size is not None:
        headers["Content-Range"] = f"bytes */{found.size}"
    if found.retry_after is not None:
        headers[RETRY_AFTER] = str(max(1, math.ceil(found.retry_after)))
    return problem_answer(found, headers)


def internal() -> web.Response:
    """The answer to an unexpected error. The error's text stays in the log."""
    return problem_answer(problem(500, ArtifactStoreError.problem, "an error that was not foreseen; see the log"), {})


def problem_answer(found: Problem, headers: Mapping[str, str]) -> web.Response:
    """The problem as `application/problem+json`."""
    body = found.model_dump_json(exclude_none=True).encode()
    response = web.Response(
        status=found.status,
        body=body,
        headers={"Content-Type": MEDIA_TYPE, "Cache-Control": "no-store", **headers},
    )
    if headers.get("Connection") == "close":
        response.force_close()  # also when more requests have arrived already (RFC 9112 §9.6)
    return response
