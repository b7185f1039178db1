"""Packages: create, finalize, list and show them, and list their usage by producer, retention class and day."""

from __future__ import annotations

from aiohttp import web

from artifact_store.documents.shapes import (
    CreatePackageRequest,
    NothingRequest,
    PackageAnswer,
    PackageCreatedAnswer,
    PackageFinalizedAnswer,
    PackagePageAnswer,
    UsagePageAnswer,
)
from artifact_store.errors import (
    AnswerExpiredError,
    CommandReusedError,
    ContentMismatchError,
    DuplicateRelativePathError,
    IllegalPackageStateError,
    InvalidPathError,
    InvalidRequestError,
    PackageAbandonedError,
    PackageNotFoundError,
    PackageParkedError,
    PathConflictError,
    PushBackError,
    SequenceBeyondLogError,
    TooLargeError,
    UnavailableError,
    UnknownRetentionClassError,
    WaitTimeoutError,
)
from artifact_store.models import DEFAULT_PAGE, PackageFilter
from ingest_gateway.admission import Quota
from ingest_gateway.protocol.declaration import Body, Route, Success
from ingest_gateway.protocol.http_errors import BodyTimeoutError, IncompleteBodyError, UnsupportedMediaTypeError
from ingest_gateway.protocol.parameters import (
    ACTOR,
    CURSOR,
    DIGESTS,
    IDEMPOTENCY_KEY,
    LIMIT,
    MANIFEST_DIGEST,
    PACKAGE_ID,
    PRODUCER,
    RETENTION_CLASS,
    STATUS,
    SUBJECT,
    WAIT_SEQUENCE,
)
from ingest_gateway.protocol.request import (
    JSON,
    LOCATION,
    TEXT,
    Call,
    json_answer,
)
from services.core.access import Right
from services.log.port import NotAppendedError


async def create_package(call: Call) -> web.StreamResponse:
    """POST /v1/packages."""
    command_id, actor = call.header(IDEMPOTENCY_KEY), call.actor
    quotas, principal = call.gateway.quotas, call.counted_as
    for quota in (Quota.PACKAGES, Quota.METADATA_BYTES):
        quotas.require(quota, principal)
    wanted = await call.json(CreatePackageRequest)
    quotas.count(Quota.PACKAGES, principal, 1)
    quotas.count(Quota.METADATA_BYTES, principal, call.received)
    done = await call.registry.create(
        wanted.name,
        wanted.producer,
        wanted.subject,
        wanted.retention_class,
        actor,
        wanted.metadata,
        command_id=command_id,
    )
    location = f"/v1/packages/{done.package_id}"
    return json_answer(PackageCreatedAnswer.of(done), status=201, headers={"Location": location})


async def finalize_package(call: Call) -> web.StreamResponse:
    """POST /v1/packages/{package_id}/finalize."""
    package_id = call.path(PACKAGE_ID)
    command_id, actor = call.header(IDEMPOTENCY_KEY), call.actor
    await call.json(NothingRequest)
    done = await call.registry.finalize(package_id, actor, command_id=command_id)
    return json_answer(PackageFinalizedAnswer.of(done))


async def list_packages(call: Call) -> web.StreamResponse:
    """GET /v1/packages."""
    where = PackageFilter(
        producer=call.query(PRODUCER),
        subject=call.query(SUBJECT),
        status=call.query(STATUS),
        retention_class=call.query(RETENTION_CLASS),
        manifest_digest=call.query(MANIFEST_DIGEST),
    )
    limit = call.query(LIMIT) or DEFAULT_PAGE
    page = await call.registry.list_packages(where, limit=limit, cursor=call.query(CURSOR))
    return json_answer(PackagePageAnswer.of(page), headers=link_to_next(call, page.next))


async def show_package(call: Call) -> web.StreamResponse:
    """GET /v1/packages/{package_id}."""
    package = await call.registry.get_package(call.path(PACKAGE_ID), wait_sequence=call.query(WAIT_SEQUENCE))
    return json_answer(PackageAnswer.of(package))


def link_to_next(call: Call, cursor: str | None) -> dict[str, str]:
    """The `Link` header of a page (RFC 8288); empty on the last page."""
    return {} if cursor is None else {"Link": f'<{call.same_with(cursor=cursor)}>; rel="next"'}


WRITING = (PushBackError, NotAppendedError, UnavailableError)
"""Problems of every write."""
READING = (IncompleteBodyError, BodyTimeoutError, TooLargeError, UnsupportedMediaTypeError, ContentMismatchError)
"""Problems of every request body, whatever it holds."""
INGESTING = (
    InvalidRequestError,
    InvalidPathError,
    PackageNotFoundError,
    IllegalPackageStateError,
    AnswerExpiredError,
    PackageAbandonedError,
    DuplicateRelativePathError,
    PathConflictError,
    ContentMismatchError,
    CommandReusedError,
    TooLargeError,
)
"""Problems of ingesting a file, however its bytes arrive."""


async def list_usage(call: Call) -> web.StreamResponse:
    """GET /v1/usage."""
    page = await call.registry.list_usage(
        call.query(PRODUCER),
        call.query(RETENTION_CLASS),
        limit=call.query(LIMIT) or DEFAULT_PAGE,
        cursor=call.query(CURSOR),
    )
    return json_answer(UsagePageAnswer.of(page), headers=link_to_next(call, page.next))


ROUTES = (
    Route(
        "POST",
        "/v1/packages",
        create_package,
        "Create a package",
        (Success(201, "The package is on the log", {JSON: PackageCreatedAnswer}, {"Location": LOCATION}),),
        access=Right.WRITE,
        parameters=(IDEMPOTENCY_KEY, ACTOR, *DIGESTS),
        body=Body(
            {JSON: CreatePackageRequest},
            example={
                "name": "build 17",
                "producer": "ci",
                "subject": "main",
                "retention_class": "build-output",
                "metadata": {"commit": "f3a9c1"},
            },
        ),
        problems=(
            InvalidRequestError,
            UnknownRetentionClassError,
            AnswerExpiredError,
            PackageAbandonedError,
            CommandReusedError,
            *READING,
            *WRITING,
        ),
        description="Metadata is converted to JCS form (RFC 8785): at most 64 KiB, integers within ±2^53.",
    ),
    Route(
        "POST",
        "/v1/packages/{package_id}/finalize",
        finalize_package,
        "Freeze a package under its manifest",
        (Success(200, "The package is finalized", {JSON: PackageFinalizedAnswer}),),
        access=Right.WRITE,
        parameters=(PACKAGE_ID, IDEMPOTENCY_KEY, ACTOR, *DIGESTS),
        body=Body({JSON: NothingRequest}, required=False),
        problems=(
            InvalidRequestError,
            PackageNotFoundError,
            IllegalPackageStateError,
            AnswerExpiredError,
            PackageAbandonedError,
            CommandReusedError,
            *READING,
            *WRITING,
        ),
    ),
    Route(
        "GET",
        "/v1/packages",
        list_packages,
        "List packages, newest first",
        (Success(200, "A page", {JSON: PackagePageAnswer}, {"Link": TEXT}),),
        access=Right.READ,
        parameters=(PRODUCER, SUBJECT, STATUS, RETENTION_CLASS, MANIFEST_DIGEST, LIMIT, CURSOR),
        problems=(InvalidRequestError, UnavailableError),
        description='`Link: <…>; rel="next"` names the next page, if there is one.',
    ),
    Route(
        "GET",
        "/v1/packages/{package_id}",
        show_package,
        "Show a package",
        (Success(200, "The package as the view has it", {JSON: PackageAnswer}),),
        access=Right.READ,
        parameters=(PACKAGE_ID, WAIT_SEQUENCE),
        problems=(
            InvalidRequestError,
            PackageNotFoundError,
            PackageParkedError,
            SequenceBeyondLogError,
            UnavailableError,
            WaitTimeoutError,
        ),
    ),
    Route(
        "GET",
        "/v1/usage",
        list_usage,
        "Show how much came in, by producer, retention class and day",
        (Success(200, "A page", {JSON: UsagePageAnswer}, {"Link": TEXT}),),
        access=Right.READ,
        parameters=(PRODUCER, RETENTION_CLASS, LIMIT, CURSOR),
        problems=(InvalidRequestError, UnavailableError),
        description="As far as the usage view has come. A package counts on the day of its creation, a file on the day "
        "of its event; days begin at midnight UTC.",
        tag="usage",
    ),
)
