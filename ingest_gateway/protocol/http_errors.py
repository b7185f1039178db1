"""Errors of HTTP itself, and the one place where an error becomes an answer (RFC 9457)."""

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


class MalformedHttpError(ProtocolError):
    """The message is not valid HTTP, or its framing is broken."""

    status = 400
    problem = "malformed-http"


class IncompleteBodyError(ProtocolError):
    """The body ended before its announced end."""

    status = 400
    problem = "incomplete-body"


class ForeignOriginError(ProtocolError):
    """A page of another site sent the request."""

    status = 403
    problem = "foreign-origin"


class UnknownResourceError(ProtocolError):
    """No resource has this path."""

    status = 404
    problem = "unknown-resource"


class MethodNotAllowedError(ProtocolError):
    """The resource does not take this method; `Allow` names those it takes."""

    status = 405
    problem = "method-not-allowed"


class NotAcceptableError(ProtocolError):
    """There is no representation that `Accept` takes."""

    status = 406
    problem = "not-acceptable"


class BodyTimeoutError(ProtocolError):
    """The body stood still, or came too slowly, for too long."""

    status = 408
    problem = "body-timeout"


class AnswerTimeoutError(ProtocolError):
    """The client took the answer's bytes too slowly, or not at all: it is cut off, and so never told this."""

    status = 408
    problem = "answer-timeout"


class PreconditionFailedError(ProtocolError):
    """`If-Match` names another representation."""

    status = 412
    problem = "precondition-failed"


class UnsupportedMediaTypeError(ProtocolError):
    """The body's media type or coding is not taken here."""

    status = 415
    problem = "unsupported-media-type"


class UnknownHostError(ProtocolError):
    """`Host` is no name of this gateway."""

    status = 421
    problem = "unknown-host"


class ExpectationFailedError(ProtocolError):
    """`Expect` asks for something other than 100-continue."""

    status = 417
    problem = "expectation-failed"


class HeadTooLargeError(ProtocolError):
    """The request's line and headers have more bytes together than are taken."""

    status = 431
    problem = "head-too-large"


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
    """The answer to an unexpected error, whose text stays in the log."""
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
