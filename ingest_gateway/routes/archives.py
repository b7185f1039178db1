"""Archives: many files in one request, all or none, and a whole package in one answer.

Producers also ask here which blobs are stored already, so that they need not send them again.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from aiohttp import web

from artifact_store.archives.bundle import MAX_BUNDLE_FILES, SMALL_FILE_BYTES
from artifact_store.archives.tar import ArchiveLimits, TarReader, entries_of, tar_of
from artifact_store.documents.http import MAX_KNOWN, TAR
from artifact_store.documents.shapes import (
    FilesIngestedAnswer,
    IngestNamedRequest,
    KnownBlobsAnswer,
    KnownBlobsRequest,
)
from artifact_store.errors import (
    IllegalPackageStateError,
    InvalidArchiveError,
    InvalidPathError,
    InvalidRequestError,
    PackageNotFoundError,
    PackageParkedError,
    SequenceBeyondLogError,
    UnavailableError,
    UnknownContentError,
    WaitTimeoutError,
)
from artifact_store.manifest import ContentAddress
from ingest_gateway.protocol.codings import CODINGS, decoded
from ingest_gateway.protocol.declaration import BINARY, Body, Route, Success
from ingest_gateway.protocol.http_errors import PreconditionFailedError, UnsupportedMediaTypeError
from ingest_gateway.protocol.negotiation import not_modified
from ingest_gateway.protocol.parameters import (
    ACTOR,
    AFTER,
    DIGESTS,
    IDEMPOTENCY_KEY,
    IF_MATCH,
    IF_NONE_MATCH,
    LARGEST,
    PACKAGE_ID,
    WAIT_SEQUENCE,
)
from ingest_gateway.protocol.request import (
    ETAG,
    IMMUTABLE,
    JSON,
    TEXT,
    Call,
    bytes_answer,
    json_answer,
)
from ingest_gateway.routes.packages import INGESTING, READING, WRITING
from services.core.access import Right

_MAX_NAMED_BYTES = 16 << 20
"""The most bytes of JSON that name files: enough for 10,000 files with the longest paths."""

_COMPRESSED = {"application/gzip": "gzip", "application/zstd": "zstd"}


async def ingest_files(call: Call) -> web.StreamResponse:
    """POST /v1/packages/{package_id}/files."""
    package_id = call.path(PACKAGE_ID)
    command_id, actor = call.header(IDEMPOTENCY_KEY), call.actor
    media_type = call.request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if media_type == JSON:
        named = await call.json(IngestNamedRequest, limit=_MAX_NAMED_BYTES)
        done = await call.registry.ingest_named(package_id, named.to_files(), actor, command_id=command_id)
    else:
        coding = _coding(call, media_type)
        body = call.body(coded=True)
        reader = TarReader(ArchiveLimits(MAX_BUNDLE_FILES, call.gateway.bounds.max_file_bytes, SMALL_FILE_BYTES))
        files = entries_of(reader, body if coding is None else decoded(body, coding))
        # As with a single file, the writer is asked before the first byte of the body is read.
        done = await call.registry.ingest_files(package_id, files, actor, command_id=command_id)
    return bytes_answer(await asyncio.to_thread(FilesIngestedAnswer.json_of, done), JSON, status=201)


def _coding(call: Call, media_type: str) -> str | None:
    """The coding of an archive, by media type or `Content-Encoding`. Raises UnsupportedMediaTypeError."""
    if media_type != TAR and media_type not in _COMPRESSED:
        raise UnsupportedMediaTypeError(
            f"files come as {TAR}, as it is or in {' or '.join(_COMPRESSED)}, or by name as {JSON}",
            {"Accept": ", ".join((TAR, *_COMPRESSED, JSON))},
        )
    coding = (call.list_header("Content-Encoding") or "identity").strip().lower()
    if coding == "identity":
        return _COMPRESSED.get(media_type)
    if coding not in CODINGS or media_type != TAR:
        raise UnsupportedMediaTypeError(
            f"an archive's Content-Encoding may be {' or '.join(sorted(CODINGS))}, once",
            {"Accept-Encoding": ", ".join(sorted(CODINGS))},
        )
    return coding


async def get_archive(call: Call) -> web.StreamResponse:
    """GET and HEAD /v1/packages/{package_id}/archive."""
    package_id, after, largest = call.path(PACKAGE_ID), call.query(AFTER), call.query(LARGEST)
    package = await call.registry.get_package(package_id, wait_sequence=call.query(WAIT_SEQUENCE))
    if package.manifest_digest is None or package.finalized_at is None:
        raise IllegalPackageStateError(
            f"package {package_id} is open; it can be read as an archive once it is finalized"
        )
    headers = {
        "Content-Type": TAR,
        "Cache-Control": IMMUTABLE,
        "Content-Disposition": f'attachment; filename="{package_id}.tar"',
        "X-Content-Type-Options": "nosniff",
    }
    if after is None and largest is None:
        tag = f"tar-1:{package.manifest_digest}"
        headers["ETag"] = f'"{tag}"'
        if not_modified(call.list_header("If-Match"), call.list_header("If-None-Match"), tag):
            del headers["Content-Type"]
            return web.Response(status=304, headers=headers)
    response = web.StreamResponse(status=200, headers=headers)
    if call.request.method == "HEAD":
        await call.start(response)
        return response
    with call.gateway.admission.archives.place(call.client):
        files = call.registry.read_files(package_id, after=after, largest=largest)
        async with aclosing(files), aclosing(tar_of(files, package.finalized_at // 1_000_000)) as pieces:
            first = await anext(pieces)  # most failures appear here, while the status can still report them
            await call.start(response)
            await call.send(response, first)
            async for piece in pieces:
                await call.send(response, piece)
        await call.finish(response)
    return response


async def known_blobs(call: Call) -> web.StreamResponse:
    """POST /v1/blobs/known."""
    asked = await call.json(KnownBlobsRequest)
    known = await call.registry.known_blobs(asked.to_digests())
    return json_answer(KnownBlobsAnswer(known=sorted(map(ContentAddress.of_digest, known))))


ROUTES = (
    Route(
        "POST",
        "/v1/packages/{package_id}/files",
        ingest_files,
        "Stream many files into a package: all of them or none",
        (Success(201, "All bytes and events are durable", {JSON: FilesIngestedAnswer}),),
        access=Right.WRITE,
        parameters=(PACKAGE_ID, IDEMPOTENCY_KEY, ACTOR, *DIGESTS),
        body=Body(
            {TAR: BINARY, **dict.fromkeys(_COMPRESSED, BINARY), JSON: IngestNamedRequest},
            description="A tar archive, plain or compressed by gzip or Zstandard (by `Content-Encoding` or the media "
            "type); or the names of files whose bytes are stored already.",
        ),
        problems=(
            *INGESTING,
            InvalidArchiveError,
            UnknownContentError,
            *READING,
            *WRITING,
        ),
        description=f"At most {MAX_BUNDLE_FILES:,} files. Folders are ignored. Links, devices, sparse files, paths "
        "that break a rule, are repeated, or are both a file and a folder, and an archive without its end marker are "
        "refused: the error names the entry, and nothing is recorded. A leading `./` is removed. Media types follow "
        f"from the names. Files of up to {SMALL_FILE_BYTES:,} bytes are packed. Package and state are checked before "
        "the body is read. With `application/json`, the stored bytes of the files are read and verified; "
        "`unknown-content` means that they must be sent.",
        tag="files",
        transfer="uploads",
    ),
    Route(
        "GET",
        "/v1/packages/{package_id}/archive",
        get_archive,
        "Read a finalized package as a tar archive",
        (
            Success(
                200,
                "The files, ordered by the bytes of their paths",
                {TAR: BINARY},
                {"ETag": ETAG, "Cache-Control": TEXT},
            ),
            Success(304, "The client has it", headers={"ETag": ETAG}),
        ),
        access=Right.READ,
        parameters=(PACKAGE_ID, AFTER, LARGEST, WAIT_SEQUENCE, IF_MATCH, IF_NONE_MATCH),
        problems=(
            InvalidRequestError,
            InvalidPathError,
            PackageNotFoundError,
            IllegalPackageStateError,
            PackageParkedError,
            PreconditionFailedError,
            UnavailableError,
            SequenceBeyondLogError,
            WaitTimeoutError,
        ),
        description="The same package always gives the same bytes. If reading fails on the way, the connection is cut "
        "before the archive's end marker; continue with `after` and the last complete file. It is also cut if the "
        "client takes less than 1 KiB/s.",
        tag="files",
        transfer="downloads",
    ),
    Route(
        "POST",
        "/v1/blobs/known",
        known_blobs,
        "Ask which blobs are stored",
        (Success(200, "Those that are stored", {JSON: KnownBlobsAnswer}),),
        access=Right.WRITE,
        parameters=DIGESTS,
        body=Body({JSON: KnownBlobsRequest}, example={"addresses": [f"blake3:{'0' * 64}"]}),
        problems=(InvalidRequestError, *READING, UnavailableError),
        description=f"At most {MAX_KNOWN:,} content addresses. Known bytes can be ingested by name "
        "(`POST /v1/packages/{package_id}/files` with `application/json`) instead of being sent.",
        tag="files",
    ),
)
