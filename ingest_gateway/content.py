"""The bytes of a file: whole or a range, cached for good under their digest, and never run by a browser."""

from __future__ import annotations

import re
import unicodedata
from contextlib import aclosing
from urllib.parse import quote

from aiohttp import web

from artifact_store.documents.http import repr_digest
from ingest_gateway import ranges
from ingest_gateway.answers import ETAG, IMMUTABLE, TEXT, bytes_answer
from ingest_gateway.call import Call
from ingest_gateway.files import ANY_MEDIA_TYPE
from ingest_gateway.negotiation import not_modified
from ingest_gateway.operations import BINARY, Route, Success
from ingest_gateway.parameters import FILE_ID, IF_MATCH, IF_NONE_MATCH, IF_RANGE, RANGE
from ingest_gateway.problems import PreconditionFailedError
from services.core.content_address import ContentAddress
from services.errors import (
    FileNotFoundInRegistryError,
    InvalidRequestError,
    RangeNotSatisfiableError,
    UnavailableError,
    WaitTimeoutError,
)
from services.views.models import File

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - a grammar's token (RFC 9110 §5.6.2), no secret
_MEDIA_TYPE = re.compile(rf"{_TOKEN}/{_TOKEN}(?:[ \t]*;[\x20-\x7e\t]*)?")


async def get_content(call: Call) -> web.StreamResponse:
    """GET and HEAD /v1/files/{file_id}/content."""
    file = await call.registry.get_file_record(call.path(FILE_ID))
    tag = ContentAddress.of_digest(file.blake3)
    headers = _headers(file, tag)
    request = call.request
    if not_modified(call.list_header("If-Match"), call.list_header("If-None-Match"), tag):
        del headers["Content-Type"]
        return web.Response(status=304, headers=headers)
    asked = request.headers.get("Range") if request.method == "GET" else None  # RFC 9110 §14.2: GET alone has ranges
    part = ranges.requested(asked, request.headers.get("If-Range"), tag, file.size_bytes)
    length = file.size_bytes if part is None else part.length
    if part is not None:
        headers["Content-Range"] = part.content_range
    if length == 0:
        return bytes_answer(b"", headers.pop("Content-Type"), headers=headers)
    response = web.StreamResponse(status=200 if part is None else 206, headers=headers)
    response.content_length = length
    if request.method == "HEAD":
        await call.start(response)
        return response
    # What can fail fails here: afterwards the status is sent, and a failure can only cut the connection.
    chunks = await call.registry.open_content(file.file_id, 0 if part is None else part.offset, length)
    async with aclosing(chunks):
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
        # What producers store is foreign: a browser saves it, and neither sniffs nor runs it in our origin.
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
        "/v1/files/{file_id}/content",
        get_content,
        "Read a file's bytes",
        (
            Success(200, "The whole", {"*/*": BINARY}, {"ETag": ETAG, "Repr-Digest": TEXT, "Accept-Ranges": TEXT}),
            Success(206, "The range", {"*/*": BINARY}, {"ETag": ETAG, "Content-Range": TEXT, "Accept-Ranges": TEXT}),
            Success(304, "The client has it", headers={"ETag": ETAG}),
        ),
        parameters=(FILE_ID, RANGE, IF_RANGE, IF_MATCH, IF_NONE_MATCH),
        problems=(
            InvalidRequestError,
            FileNotFoundInRegistryError,
            PreconditionFailedError,
            RangeNotSatisfiableError,
            UnavailableError,
            WaitTimeoutError,
        ),
        description="`ETag` is the content address. The content never changes and may be cached for good. Should the "
        "bytes fail on the way, or the client take less than 1 KiB/s, the connection is cut before `Content-Length` "
        "is reached.",
        tag="files",
        transfer="downloads",
    ),
)
