"""Files: upload one, list those of a package, show one by path or id, read its bytes.

Bytes are read whole or as a range. They may be cached for ever under their digest, and browsers do not run them.
"""

from __future__ import annotations

import re
import unicodedata
from contextlib import aclosing
from urllib.parse import quote

from aiohttp import web

from artifact_store.byte_streams import joined
from artifact_store.documents.http import quoted, repr_digest
from artifact_store.documents.shapes import FileAnswer, FileIngestedAnswer, FilePageAnswer
from artifact_store.errors import (
    FileNotFoundInRegistryError,
    InvalidPathError,
    InvalidRequestError,
    PackageNotFoundError,
    PackageParkedError,
    RangeNotSatisfiableError,
    SequenceBeyondLogError,
    TooLargeError,
    UnavailableError,
    WaitTimeoutError,
)
from artifact_store.manifest import ContentAddress
from artifact_store.models import DEFAULT_PAGE, File
from artifact_store.rules import check_path, check_text
from ingest_gateway.protocol.declaration import BINARY, Body, Route, Success
from ingest_gateway.protocol.http_errors import PreconditionFailedError
from ingest_gateway.protocol.negotiation import not_modified, requested
from ingest_gateway.protocol.parameters import (
    ACTOR,
    CONTENT_ADDRESS,
    CURSOR,
    DIGESTS,
    FILE_ID,
    IDEMPOTENCY_KEY,
    IF_MATCH,
    IF_NONE_MATCH,
    IF_RANGE,
    LIMIT,
    PACKAGE_ID,
    RANGE,
    RELATIVE_PATH,
    WAIT_SEQUENCE,
)
from ingest_gateway.protocol.request import (
    ETAG,
    IMMUTABLE,
    JSON,
    LOCATION,
    NOT_KEPT,
    TEXT,
    Call,
    bytes_answer,
    declared,
    json_answer,
)
from ingest_gateway.routes.packages import INGESTING, READING, WRITING, link_to_next
from services.blobs.packs import is_small
from services.core.access import Right

ANY_MEDIA_TYPE = "application/octet-stream"

_AT_ONCE_BYTES = 64 * 1024
"""Contents of at most this length are sent together with the head of the answer."""


async def ingest_file(call: Call) -> web.StreamResponse:
    """PUT /v1/packages/{package_id}/files/{relative_path}."""
    package_id, relative_path = call.path(PACKAGE_ID), call.path(RELATIVE_PATH)
    command_id, actor = call.header(IDEMPOTENCY_KEY), call.actor
    media_type = call.request.headers.get("Content-Type", ANY_MEDIA_TYPE)
    check_text("Content-Type", media_type)
    said = declared(call.request.content_length, call.header(CONTENT_ADDRESS), call.take_sha256())
    largest = call.gateway.bounds.max_file_bytes
    if said.size_bytes is not None and said.size_bytes > largest:
        raise TooLargeError(f"a file may have at most {largest:,} bytes here")
    # Reading the body sends 100 Continue. If the client waits for that, the registry asks the writer first, so that the
    # client never sends a file that would be refused.
    held = call.held_body() if is_small(said) else None
    done = await call.registry.ingest(
        package_id,
        relative_path,
        media_type,
        call.body() if held is None else held,
        actor,
        declared=said,
        command_id=command_id,
        ask_first=call.waits_to_send,
    )
    location = f"/v1/packages/{package_id}/files/{quoted(relative_path)}"
    headers = {"Location": location, **NOT_KEPT}
    return bytes_answer(FileIngestedAnswer.json_of(done), JSON, status=201, headers=headers)


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


_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - a grammar's token (RFC 9110 §5.6.2), no secret
_MEDIA_TYPE = re.compile(rf"{_TOKEN}/{_TOKEN}(?:[ \t]*;[\x20-\x7e\t]*)?")


async def get_content(call: Call) -> web.StreamResponse:
    """GET and HEAD /v1/files/{file_id}/content."""
    found = await call.registry.find_content(call.path(FILE_ID))
    file = found.file
    tag = ContentAddress.of_digest(file.blake3)
    headers = _headers(file, tag)
    request = call.request
    if not_modified(call.list_header("If-Match"), call.list_header("If-None-Match"), tag):
        del headers["Content-Type"]
        return web.Response(status=304, headers=headers)
    asked = request.headers.get("Range") if request.method == "GET" else None  # RFC 9110 §14.2: only GET has ranges
    part = requested(asked, request.headers.get("If-Range"), tag, file.size_bytes)
    length = file.size_bytes if part is None else part.length
    if part is not None:
        headers["Content-Range"] = part.content_range
    if length == 0:
        return bytes_answer(b"", headers.pop("Content-Type"), headers=headers)
    if part is None and length <= _AT_ONCE_BYTES and request.method == "GET":
        body = await call.registry.read_held(found)
        return bytes_answer(body, headers.pop("Content-Type"), headers=headers)
    status = 200 if part is None else 206
    response = web.StreamResponse(status=status, headers=headers)
    response.content_length = length
    if request.method == "HEAD":
        await call.start(response)
        return response
    # Most failures are raised here. Once the status is sent, a failure can only cut the connection.
    chunks = await call.registry.read_content(found, 0 if part is None else part.offset, length)
    async with aclosing(chunks):
        if length <= _AT_ONCE_BYTES:
            return bytes_answer(await joined(chunks), headers.pop("Content-Type"), status=status, headers=headers)
        await call.start(response)
        async for chunk in chunks:
            await call.send(response, chunk)
    await call.finish(response)
    return response


def _headers(file: File, tag: ContentAddress) -> dict[str, str]:
    return {
        "Content-Type": file.media_type if _MEDIA_TYPE.fullmatch(file.media_type) else ANY_MEDIA_TYPE,
        "ETag": f'"{tag}"',
        "Cache-Control": IMMUTABLE,
        "Accept-Ranges": "bytes",
        "Repr-Digest": repr_digest(file.sha256),
        # Producers' bytes are not trusted: a browser saves them, and neither sniffs nor runs them in our origin.
        "Content-Disposition": disposition(file.relative_path),
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "sandbox; default-src 'none'",
    }


def disposition(relative_path: str) -> str:
    """`attachment` under the path's last segment (RFC 6266): in ASCII and, where that differs, in UTF-8 (RFC 8187)."""
    name = relative_path.rpartition("/")[2]
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    plain = re.sub(r'["\\%/]', "_", plain).strip() or "file"
    extended = "" if plain == name else f"; filename*=UTF-8''{quote(name, safe='')}"
    return f'attachment; filename="{plain}"{extended}'


ROUTES = (
    Route(
        "GET",
        "/v1/packages/{package_id}/files",
        list_files,
        "List a package's files by the bytes of their paths",
        (Success(200, "A page", {JSON: FilePageAnswer}, {"Link": TEXT}),),
        access=Right.READ,
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
        access=Right.WRITE,
        parameters=(PACKAGE_ID, RELATIVE_PATH, IDEMPOTENCY_KEY, ACTOR, CONTENT_ADDRESS, *DIGESTS),
        body=Body(
            {ANY_MEDIA_TYPE: BINARY},
            description="The bytes. Any other `Content-Type` may be sent: it becomes the file's media type.",
        ),
        problems=(*INGESTING, *READING, *WRITING),
        description="Package, path and state are checked before `100 Continue` is sent, and again when the bytes are "
        "stored. A body that ends early, differs from what is declared or comes with a `Content-Encoding` leaves "
        "nothing behind.",
        tag="files",
        transfer="uploads",
    ),
    Route(
        "GET",
        "/v1/packages/{package_id}/files/{relative_path}",
        show_file_at,
        "Show a file by its path",
        (Success(200, "The file's metadata", {JSON: FileAnswer}),),
        access=Right.READ,
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
        access=Right.READ,
        parameters=(FILE_ID,),
        problems=(InvalidRequestError, FileNotFoundInRegistryError, UnavailableError, WaitTimeoutError),
        tag="files",
    ),
    Route(
        "GET",
        "/v1/files/{file_id}/content",
        get_content,
        "Read a file's bytes",
        (
            Success(
                200,
                "The whole content",
                {ANY_MEDIA_TYPE: BINARY},
                {"ETag": ETAG, "Repr-Digest": TEXT, "Accept-Ranges": TEXT},
            ),
            Success(
                206, "The range", {ANY_MEDIA_TYPE: BINARY}, {"ETag": ETAG, "Content-Range": TEXT, "Accept-Ranges": TEXT}
            ),
            Success(304, "The client has it", headers={"ETag": ETAG}),
        ),
        access=Right.READ,
        parameters=(FILE_ID, RANGE, IF_RANGE, IF_MATCH, IF_NONE_MATCH),
        problems=(
            InvalidRequestError,
            FileNotFoundInRegistryError,
            PreconditionFailedError,
            RangeNotSatisfiableError,
            UnavailableError,
            WaitTimeoutError,
        ),
        description="`ETag` is the content address. The content never changes and may be cached for good. If "
        "reading fails on the way, or the client takes less than 1 KiB/s, the connection is cut before "
        "`Content-Length` is reached.",
        tag="files",
        transfer="downloads",
    ),
)
