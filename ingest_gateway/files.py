"""Files: stream one in, list a package's, show one by path or id."""

from __future__ import annotations

from aiohttp import web

from artifact_store.documents.http import quoted
from artifact_store.documents.shapes import FileAnswer, FileIngestedAnswer, FilePageAnswer
from ingest_gateway.answers import JSON, LOCATION, TEXT, json_answer
from ingest_gateway.call import Call
from ingest_gateway.operations import BINARY, Body, Route, Success
from ingest_gateway.packages import ANYONE, INGESTING, READING, WRITING, link_to_next
from ingest_gateway.parameters import (
    ACTOR,
    CONTENT_ADDRESS,
    CURSOR,
    DIGESTS,
    FILE_ID,
    IDEMPOTENCY_KEY,
    LIMIT,
    PACKAGE_ID,
    RELATIVE_PATH,
    WAIT_SEQUENCE,
    declared,
)
from services.core.fields import check_text
from services.core.paths import check_path
from services.errors import (
    FileNotFoundInRegistryError,
    InvalidPathError,
    InvalidRequestError,
    PackageNotFoundError,
    PackageParkedError,
    SequenceBeyondLogError,
    TooLargeError,
    UnavailableError,
    WaitTimeoutError,
)
from services.views.models import DEFAULT_PAGE

ANY_MEDIA_TYPE = "application/octet-stream"


async def ingest_file(call: Call) -> web.StreamResponse:
    """PUT /v1/packages/{package_id}/files/{relative_path}."""
    package_id, relative_path = call.path(PACKAGE_ID), call.path(RELATIVE_PATH)
    check_path(relative_path)
    command_id, actor = call.header(IDEMPOTENCY_KEY), call.header(ACTOR) or ANYONE
    media_type = call.request.headers.get("Content-Type", ANY_MEDIA_TYPE)
    check_text("Content-Type", media_type)
    said = declared(call.request.content_length, call.header(CONTENT_ADDRESS), call.take_sha256())
    largest = call.gateway.bounds.max_file_bytes
    if said.size_bytes is not None and said.size_bytes > largest:
        raise TooLargeError(f"a file may have {largest:,} bytes here")
    # The registry asks the writer before it takes the first byte of the body, and the first byte that is taken sends
    # 100-continue: a client that waits for it is spared an upload that would be refused.
    done = await call.registry.ingest(
        package_id, relative_path, media_type, call.body(), actor, declared=said, command_id=command_id
    )
    location = f"/v1/packages/{package_id}/files/{quoted(relative_path)}"
    return json_answer(FileIngestedAnswer.of(done), status=201, headers={"Location": location})


async def list_files(call: Call) -> web.StreamResponse:
    """GET /v1/packages/{package_id}/files."""
    page = await call.registry.list_files(
        call.path(PACKAGE_ID),
        limit=call.query(LIMIT) or DEFAULT_PAGE,
        cursor=call.query(CURSOR),
        wait_sequence=call.query(WAIT_SEQUENCE),
    )
    return json_answer(FilePageAnswer.of(page), headers=link_to_next(call, page.next))


async def show_file_at(call: Call) -> web.StreamResponse:
    """GET /v1/packages/{package_id}/files/{relative_path}."""
    package_id, relative_path = call.path(PACKAGE_ID), call.path(RELATIVE_PATH)
    check_path(relative_path)
    file = await call.registry.get_file_at(package_id, relative_path, wait_sequence=call.query(WAIT_SEQUENCE))
    return json_answer(FileAnswer.of(file))


async def show_file(call: Call) -> web.StreamResponse:
    """GET /v1/files/{file_id}."""
    return json_answer(FileAnswer.of(await call.registry.get_file_record(call.path(FILE_ID))))


ROUTES = (
    Route(
        "GET",
        "/v1/packages/{package_id}/files",
        list_files,
        "List a package's files by the bytes of their paths",
        (Success(200, "A page", {JSON: FilePageAnswer}, {"Link": TEXT}),),
        parameters=(PACKAGE_ID, LIMIT, CURSOR, WAIT_SEQUENCE),
        problems=(
            InvalidRequestError,
            PackageNotFoundError,
            PackageParkedError,
            SequenceBeyondLogError,
            UnavailableError,
            WaitTimeoutError,
        ),
        tag="files",
    ),
    Route(
        "PUT",
        "/v1/packages/{package_id}/files/{relative_path}",
        ingest_file,
        "Stream a file into a package",
        (Success(201, "Bytes and event are durable", {JSON: FileIngestedAnswer}, {"Location": LOCATION}),),
        parameters=(PACKAGE_ID, RELATIVE_PATH, IDEMPOTENCY_KEY, ACTOR, CONTENT_ADDRESS, *DIGESTS),
        body=Body(
            {"*/*": BINARY},
            description="The bytes. `Content-Type` becomes the file's media type (absent: application/octet-stream).",
        ),
        problems=(*INGESTING, *READING, *WRITING),
        description="Package, path and state are checked before the body is read. A body that ends early, differs from "
        "what is declared or comes with a `Content-Encoding` leaves nothing behind.",
        tag="files",
        transfer="uploads",
    ),
    Route(
        "GET",
        "/v1/packages/{package_id}/files/{relative_path}",
        show_file_at,
        "Show a file by its path",
        (Success(200, "The file's metadata", {JSON: FileAnswer}),),
        parameters=(PACKAGE_ID, RELATIVE_PATH, WAIT_SEQUENCE),
        problems=(
            InvalidRequestError,
            InvalidPathError,
            PackageNotFoundError,
            FileNotFoundInRegistryError,
            PackageParkedError,
            UnavailableError,
            SequenceBeyondLogError,
            WaitTimeoutError,
        ),
        tag="files",
    ),
    Route(
        "GET",
        "/v1/files/{file_id}",
        show_file,
        "Show a file by its id",
        (Success(200, "The file's metadata", {JSON: FileAnswer}),),
        parameters=(FILE_ID,),
        problems=(InvalidRequestError, FileNotFoundInRegistryError, UnavailableError, WaitTimeoutError),
        tag="files",
    ),
)
