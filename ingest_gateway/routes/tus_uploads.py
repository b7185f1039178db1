"""Uploads in several requests, in the protocol tus 1.0: begin one, add bytes, show and end it.

Also parts of large files, which clients send straight to the blob store. Each answer has the headers of tus, and
OPTIONS names the versions and extensions that the gateway supports.
"""

from __future__ import annotations

from datetime import datetime
from email.utils import format_datetime
from functools import wraps
from uuid import UUID

from aiohttp import web

from artifact_store.documents import http as headers_
from artifact_store.documents import resumable_uploads as names
from artifact_store.documents import times
from artifact_store.documents.resumable_uploads import (
    CONTENT_TYPE,
    MEDIA_TYPE,
    RELATIVE_PATH,
    DirectPartAnswer,
    DirectPartsAnswer,
    DirectPartsRequest,
    UploadAnswer,
)
from artifact_store.documents.shapes import FileIngestedAnswer
from artifact_store.errors import (
    ArtifactStoreError,
    ChecksumMismatchError,
    InvalidRequestError,
    PackageParkedError,
    SequenceBeyondLogError,
    UploadBusyError,
    UploadNotFoundError,
    UploadOffsetError,
    WaitTimeoutError,
)
from ingest_gateway.admission import Quota
from ingest_gateway.protocol.declaration import BINARY, Body, Handler, Route, Schema, Success
from ingest_gateway.protocol.http_errors import (
    MethodNotAllowedError,
    ProtocolError,
    UnsupportedMediaTypeError,
    answer_of,
)
from ingest_gateway.protocol.parameters import (
    ACTOR,
    CONTENT_ADDRESS,
    CONTENT_DIGEST,
    CONTENT_MD5,
    DIGESTS,
    FILE_DIGEST,
    IDEMPOTENCY_KEY,
    PACKAGE_ID,
    UPLOAD_ID,
    WAIT_SEQUENCE,
    Parameter,
    whole_number,
)
from ingest_gateway.protocol.request import (
    JSON,
    LOCATION,
    TEXT,
    Call,
    declared,
    json_answer,
)
from ingest_gateway.routes.files import ANY_MEDIA_TYPE
from ingest_gateway.routes.packages import INGESTING, READING, WRITING
from services.blobs.port import DirectPart
from services.blobs.resumable.states import UploadState
from services.blobs.resumable.uploads import ALGORITHMS, Checksum, NewUpload, acknowledgement_of
from services.core.access import Right


class UnsupportedTusVersionError(ProtocolError, problem="unsupported-tus-version", status=412):
    """`Tus-Resumable` is missing or names an unsupported version; `Tus-Version` names the supported ones."""


def _checksum(text: str) -> Checksum:
    return Checksum(*names.parse_checksum(text))


_SIZE = {"type": "integer", "format": "int64", "minimum": 0}

RESUMABLE = Parameter(
    names.TUS_RESUMABLE,
    "header",
    str,
    "The version of tus that the client speaks",
    {"type": "string", "enum": [names.VERSION]},
    names.VERSION,
)
UPLOAD_LENGTH = Parameter(
    names.UPLOAD_LENGTH, "header", whole_number(names.UPLOAD_LENGTH), "Bytes of the whole file; must be said", _SIZE, 11
)
UPLOAD_OFFSET = Parameter(
    names.UPLOAD_OFFSET,
    "header",
    whole_number(names.UPLOAD_OFFSET),
    "Where the upload stands, as HEAD says; must be said",
    _SIZE,
    0,
)
UPLOAD_METADATA = Parameter(
    names.UPLOAD_METADATA,
    "header",
    names.decode_metadata,
    "Pairs of a key and a value in base64. `relative_path` (or `filename`) is the file's path in the package and must "
    "be there, `media_type` (or `filetype`) its media type (absent: application/octet-stream); others are kept only",
    {"type": "string"},
    names.encode_metadata({"relative_path": "report.txt", "media_type": "text/plain"}),
)
UPLOAD_CHECKSUM = Parameter(
    names.UPLOAD_CHECKSUM,
    "header",
    _checksum,
    f"Algorithm ({', '.join(ALGORITHMS)}) and digest in base64 of this request's bytes, which are then taken whole or "
    "not at all",
    {"type": "string"},
)
METHOD_OVERRIDE = Parameter(
    names.METHOD_OVERRIDE,
    "header",
    str,
    "The method that is meant",
    {"type": "string", "enum": ["PATCH", "DELETE"]},
)


def capabilities(longest: int) -> dict[str, str]:
    """Headers of the answer to OPTIONS; `longest` is the most bytes that an upload may have."""
    return {
        names.TUS_VERSION: names.VERSION,
        names.TUS_EXTENSION: ",".join(names.EXTENSIONS),
        names.TUS_MAX_SIZE: str(longest),
        names.TUS_CHECKSUM_ALGORITHM: ",".join(ALGORITHMS),
    }


def http_date(moment: datetime) -> str:
    """An aware time in UTC as RFC 9110 §5.6.7 writes it."""
    return format_datetime(moment, usegmt=True)


def spoken(handler: Handler) -> Handler:
    """Wrap a handler for clients of tus: it refuses other versions, and every answer names ours."""

    @wraps(handler)
    async def speak(call: Call) -> web.StreamResponse:
        try:
            said = call.header(RESUMABLE)
            # OPTIONS is sent before a version is agreed on, and GET and HEAD are useful without tus.
            needless = call.request.method == "OPTIONS" or (said is None and call.request.method in ("GET", "HEAD"))
            if said != names.VERSION and not needless:
                raise UnsupportedTusVersionError(
                    f"{names.TUS_RESUMABLE} must say {names.VERSION}", {names.TUS_VERSION: names.VERSION}
                )
            response = await handler(call)
        except ArtifactStoreError as error:
            response = answer_of(error)
        response.headers[names.TUS_RESUMABLE] = names.VERSION
        return response

    return speak


_RESOURCE = "/v1/packages/{package_id}/uploads"
_UPLOAD = _RESOURCE + "/{upload_id}"


@spoken
async def describe_uploads(call: Call) -> web.StreamResponse:
    """OPTIONS: the versions and extensions of tus that this server supports."""
    call.path(PACKAGE_ID)
    return web.Response(status=204, headers=capabilities(call.registry.uploads.longest))


@spoken
async def describe_upload(call: Call) -> web.StreamResponse:
    """OPTIONS of one upload: the same."""
    call.path(PACKAGE_ID)
    call.path(UPLOAD_ID)
    return web.Response(status=204, headers=capabilities(call.registry.uploads.longest))


@spoken
async def begin_upload(call: Call) -> web.StreamResponse:
    """POST /v1/packages/{package_id}/uploads."""
    package_id = call.path(PACKAGE_ID)
    length, said = call.header(UPLOAD_LENGTH), call.header(UPLOAD_METADATA)
    if length is None:
        raise InvalidRequestError(f"{names.UPLOAD_LENGTH} is missing: give the length of an upload when you begin it")
    paths = [said[key] for key in RELATIVE_PATH if said is not None and key in said]
    if said is None or not paths:
        raise InvalidRequestError(f"{names.UPLOAD_METADATA} must name the file's {RELATIVE_PATH[0]}")
    has_body = call.request.headers.get("Content-Type", "").lower() == CONTENT_TYPE
    if call.checked and call.request.can_read_body and not has_body:
        raise UnsupportedMediaTypeError(f"the body must be {CONTENT_TYPE}", {"Accept": CONTENT_TYPE})
    checksum = call.header(UPLOAD_CHECKSUM)
    new = NewUpload(
        package_id=package_id,
        relative_path=paths[0],
        media_type=next((said[key] for key in MEDIA_TYPE if said.get(key)), ANY_MEDIA_TYPE),
        actor=call.actor,
        principal=call.registry.principal,
        length=length,
        declared=declared(length, call.header(CONTENT_ADDRESS), _file_sha256(call)),
        command_id=call.header(IDEMPOTENCY_KEY),
        metadata=call.request.headers[names.UPLOAD_METADATA],
    )
    quotas, uploads, sender = call.gateway.quotas, call.registry.uploads, call.counted_as
    quotas.require(Quota.RESUMABLE_UPLOADS, sender)
    begins = await call.gateway.open_uploads.take(sender, new.upload_id, uploads.is_open)
    quotas.count(Quota.RESUMABLE_UPLOADS, sender, 1)
    try:
        state = await uploads.create(new)
    except BaseException:
        if begins:
            call.gateway.open_uploads.end(sender, new.upload_id)
        raise
    _count(call, state)
    if has_body and not state.offset and call.request.can_read_body:
        state = await _append(call, state.upload_id, 0, checksum)
    headers = {"Location": _location(state), **_headers(call, state)}
    direct = await uploads.direct_part_bytes(state)
    if direct is not None:
        headers[names.UPLOAD_DIRECT] = str(direct)
    return web.Response(status=201, headers=headers)


@spoken
async def show_upload(call: Call) -> web.StreamResponse:
    """GET and HEAD /v1/packages/{package_id}/uploads/{upload_id}."""
    package_id, upload_id, wait_sequence = call.path(PACKAGE_ID), call.path(UPLOAD_ID), call.query(WAIT_SEQUENCE)
    if wait_sequence is not None:
        await call.registry.get_package(package_id, wait_sequence=wait_sequence)
    state = await call.registry.uploads.find(package_id, upload_id)
    _count(call, state)
    done = acknowledgement_of(state)
    answer = UploadAnswer(
        upload_id=state.upload_id,
        package_id=state.package_id,
        relative_path=state.relative_path,
        media_type=state.media_type,
        length=state.length,
        offset=state.offset,
        created_at=times.of_datetime(state.created_at),
        expires_at=times.of_datetime(call.registry.uploads.expires_at(state)),
        file=None if done is None else FileIngestedAnswer.of(done),
    )
    told = {names.UPLOAD_LENGTH: str(state.length), **_headers(call, state)}
    if state.metadata is not None:
        told[names.UPLOAD_METADATA] = state.metadata
    return json_answer(answer, headers=told)


@spoken
async def add_to_upload(call: Call) -> web.StreamResponse:
    """PATCH /v1/packages/{package_id}/uploads/{upload_id}."""
    return await _add(call)


async def send_parts_directly(call: Call) -> web.StreamResponse:
    """POST /v1/packages/{package_id}/uploads/{upload_id}/parts."""
    package_id, upload_id = call.path(PACKAGE_ID), call.path(UPLOAD_ID)
    asked = await call.json(DirectPartsRequest)
    state, given = await call.registry.uploads.send_direct(
        package_id,
        upload_id,
        asked.offset,
        [(DirectPart(part.number, part.length, part.crc32), part.etag) for part in asked.sent],
        [(part.length, part.crc32) for part in asked.wanted],
    )
    # This process does not see these bytes, because they go straight to the store.
    call.gateway.quotas.count(Quota.BYTES, call.counted_as, sum(part.length for part, _ in given))
    _count(call, state)
    parts = [DirectPartAnswer(number=part.number, url=at.url, headers=dict(at.headers)) for part, at in given]
    return json_answer(DirectPartsAnswer(offset=state.offset, parts=parts))


@spoken
async def end_upload(call: Call) -> web.StreamResponse:
    """DELETE /v1/packages/{package_id}/uploads/{upload_id}."""
    return await _end(call)


@spoken
async def override_upload(call: Call) -> web.StreamResponse:
    """POST /v1/packages/{package_id}/uploads/{upload_id}, for clients that can send neither PATCH nor DELETE."""
    method = call.header(METHOD_OVERRIDE)
    if method == "PATCH":
        return await _add(call)
    if method == "DELETE":
        return await _end(call)
    raise MethodNotAllowedError(
        f"POST is accepted here only with {names.METHOD_OVERRIDE}: PATCH or DELETE",
        {"Allow": "DELETE, GET, HEAD, PATCH"},
    )


async def _add(call: Call) -> web.StreamResponse:
    offset = call.header(UPLOAD_OFFSET)
    if offset is None:
        raise InvalidRequestError(f"{names.UPLOAD_OFFSET} is missing: HEAD says where the upload stands")
    if call.request.headers.get("Content-Type", "").lower() != CONTENT_TYPE:
        raise UnsupportedMediaTypeError(f"the body must be {CONTENT_TYPE}", {"Accept": CONTENT_TYPE})
    state = await _append(call, call.path(UPLOAD_ID), offset, call.header(UPLOAD_CHECKSUM))
    return web.Response(status=204, headers=_headers(call, state))


async def _append(call: Call, upload_id: UUID, offset: int, checksum: Checksum | None) -> UploadState:
    state = await call.registry.uploads.append(
        call.path(PACKAGE_ID),
        upload_id,
        offset,
        call.body(),
        size=call.request.content_length,
        checksum=checksum,
        whole=call.checked,
    )
    _count(call, state)
    return state


def _count(call: Call, state: UploadState) -> None:
    """Count the upload as one that the sender holds open, unless it is a file by now."""
    count = call.gateway.open_uploads.touch if state.answer is None else call.gateway.open_uploads.end
    count(call.counted_as, state.upload_id)


def _file_sha256(call: Call) -> bytes | None:
    said = call.header(FILE_DIGEST)
    if said is not None and "sha-256" not in said:
        raise InvalidRequestError(f"{FILE_DIGEST.name} of an upload is checked by sha-256 alone: declare that")
    return None if said is None else said["sha-256"]


async def _end(call: Call) -> web.StreamResponse:
    await call.registry.uploads.remove(call.path(PACKAGE_ID), call.path(UPLOAD_ID))
    call.gateway.open_uploads.end(call.counted_as, call.path(UPLOAD_ID))
    return web.Response(status=204)


def _location(state: UploadState) -> str:
    return _UPLOAD.format(package_id=state.package_id, upload_id=state.upload_id)


def _headers(call: Call, state: UploadState) -> dict[str, str]:
    """Headers of every answer about an upload; once it is a file, also the file's address, digest and location."""
    found = {
        names.UPLOAD_OFFSET: str(state.offset),
        names.UPLOAD_EXPIRES: http_date(call.registry.uploads.expires_at(state)),
        "Cache-Control": "no-store",
    }
    done = acknowledgement_of(state)
    if done is not None:
        file = FileIngestedAnswer.of(done)
        found["Content-Location"] = f"/v1/files/{file.file_id}"
        found[headers_.CONTENT_ADDRESS] = file.content_address
        found[headers_.REPR_DIGEST] = headers_.repr_digest(bytes.fromhex(file.sha256))
    return found


_TOLD: dict[str, Schema] = {
    names.TUS_RESUMABLE: TEXT,
    names.UPLOAD_OFFSET: {"type": "integer", "minimum": 0},
    names.UPLOAD_EXPIRES: TEXT,
}
_CAPABLE: dict[str, Schema] = {
    names.TUS_RESUMABLE: TEXT,
    names.TUS_VERSION: TEXT,
    names.TUS_EXTENSION: TEXT,
    names.TUS_MAX_SIZE: {"type": "integer", "minimum": 0},
    names.TUS_CHECKSUM_ALGORITHM: TEXT,
}
_ADDING = (
    *INGESTING,
    UploadNotFoundError,
    UploadOffsetError,
    UploadBusyError,
    ChecksumMismatchError,
    UnsupportedTusVersionError,
    *READING,
    *WRITING,
)
_BYTES = Body({CONTENT_TYPE: BINARY}, required=False, description="The bytes from `Upload-Offset` on.")
_KEPT = (
    "The bytes of a request that was cut off are kept: HEAD says how many. The last byte puts the file into its "
    "package, as PUT would, and `Content-Location`, `X-Content-Address` and `Repr-Digest` name it."
)

ROUTES = (
    Route(
        "OPTIONS",
        _RESOURCE,
        describe_uploads,
        "Tell what of tus is spoken",
        (Success(204, "In the headers", headers=_CAPABLE),),
        access="open",
        parameters=(PACKAGE_ID,),
        problems=(InvalidRequestError,),
        tag="files",
    ),
    Route(
        "POST",
        _RESOURCE,
        begin_upload,
        "Begin an upload in several requests (tus 1.0, creation)",
        (Success(201, "The upload has begun", headers={"Location": LOCATION, **_TOLD, names.UPLOAD_DIRECT: _SIZE}),),
        access=Right.WRITE,
        parameters=(
            PACKAGE_ID,
            RESUMABLE,
            UPLOAD_LENGTH,
            UPLOAD_METADATA,
            UPLOAD_CHECKSUM,
            IDEMPOTENCY_KEY,
            ACTOR,
            CONTENT_ADDRESS,
            CONTENT_DIGEST,
            FILE_DIGEST,
            CONTENT_MD5,
        ),
        body=_BYTES,
        problems=_ADDING,
        description="With an `Idempotency-Key`, a repeat finds the upload that the first request began, with its "
        "offset. The request may contain the first bytes. " + _KEPT,
        tag="files",
        transfer="uploads",
    ),
    Route(
        "OPTIONS",
        _UPLOAD,
        describe_upload,
        "Tell what of tus is spoken",
        (Success(204, "In the headers", headers=_CAPABLE),),
        access="open",
        parameters=(PACKAGE_ID, UPLOAD_ID),
        problems=(InvalidRequestError,),
        tag="files",
    ),
    Route(
        "GET",
        _UPLOAD,
        show_upload,
        "Show how far an upload has come, and the file that it became",
        (
            Success(
                200,
                "The state of the upload",
                {JSON: UploadAnswer},
                {**_TOLD, names.UPLOAD_LENGTH: {"type": "integer"}},
            ),
        ),
        access=Right.WRITE,
        parameters=(PACKAGE_ID, UPLOAD_ID, RESUMABLE, WAIT_SEQUENCE),
        problems=(
            *INGESTING,
            UploadNotFoundError,
            UnsupportedTusVersionError,
            PackageParkedError,
            SequenceBeyondLogError,
            WaitTimeoutError,
            *WRITING,
        ),
        description="tus uses HEAD for this. If an upload has all its bytes but did not get into its package when the "
        "last one came, it is put there first.",
        tag="files",
    ),
    Route(
        "PATCH",
        _UPLOAD,
        add_to_upload,
        "Add bytes to an upload",
        (Success(204, "The bytes are stored", headers=_TOLD),),
        access=Right.WRITE,
        parameters=(PACKAGE_ID, UPLOAD_ID, RESUMABLE, UPLOAD_OFFSET, UPLOAD_CHECKSUM, *DIGESTS),
        body=_BYTES,
        problems=_ADDING,
        description="Only one request at a time may add to an upload, over all gateways. " + _KEPT,
        tag="files",
        transfer="uploads",
    ),
    Route(
        "DELETE",
        _UPLOAD,
        end_upload,
        "End an upload and remove its bytes",
        (Success(204, "Nothing is left of the upload; a file that it became stays"),),
        access=Right.WRITE,
        parameters=(PACKAGE_ID, UPLOAD_ID, RESUMABLE),
        problems=(InvalidRequestError, UploadNotFoundError, UploadBusyError, UnsupportedTusVersionError, *WRITING),
        tag="files",
    ),
    Route(
        "POST",
        _UPLOAD + "/parts",
        send_parts_directly,
        "Report parts that were sent straight to the blob store, and get addresses for the next ones",
        (Success(200, "Where the next parts go", {JSON: DirectPartsAnswer}),),
        access=Right.WRITE,
        parameters=(PACKAGE_ID, UPLOAD_ID, *DIGESTS),
        body=Body({JSON: DirectPartsRequest}, example={"offset": 0, "wanted": [{"length": 11, "crc32": 222957957}]}),
        problems=(*INGESTING, UploadNotFoundError, UploadOffsetError, UploadBusyError, *READING, *WRITING),
        description="For uploads whose creation was answered with `Upload-Direct`, the size of each part except the "
        "last. An address accepts this one part for fifteen minutes. When the last part is reported, all bytes are "
        "read back, and the file is put into its package before the answer. Bytes may also come by PATCH at any time.",
        tag="files",
        transfer="uploads",
    ),
    Route(
        "POST",
        _UPLOAD,
        override_upload,
        "Add to an upload or end it, where only POST can be sent",
        (Success(204, "As for PATCH or DELETE"),),
        access=Right.WRITE,
        parameters=(PACKAGE_ID, UPLOAD_ID, RESUMABLE, METHOD_OVERRIDE, UPLOAD_OFFSET, UPLOAD_CHECKSUM, *DIGESTS),
        body=_BYTES,
        problems=(*_ADDING, MethodNotAllowedError),
        tag="files",
        transfer="uploads",
    ),
)
