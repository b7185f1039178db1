"""The manifest of a finalized package: its exact bytes in CBOR, or their projection in JSON."""

from __future__ import annotations

import asyncio

from aiohttp import web
from blake3 import blake3

from artifact_store.errors import (
    IllegalPackageStateError,
    InvalidRequestError,
    PackageNotFoundError,
    PackageParkedError,
    SequenceBeyondLogError,
    UnavailableError,
    WaitTimeoutError,
)
from artifact_store.manifest import ContentAddress
from artifact_store.registry import ManifestFormat
from ingest_gateway.protocol.declaration import BINARY, Route, Success
from ingest_gateway.protocol.http_errors import NotAcceptableError, PreconditionFailedError
from ingest_gateway.protocol.negotiation import choose, not_modified
from ingest_gateway.protocol.parameters import (
    IF_MATCH,
    IF_NONE_MATCH,
    PACKAGE_ID,
    WAIT_SEQUENCE,
)
from ingest_gateway.protocol.request import (
    ETAG,
    IMMUTABLE,
    JSON,
    SENT_AT_ONCE_BYTES,
    TEXT,
    Call,
    bytes_answer,
)
from services.core.access import Right

CBOR = "application/cbor"
_FORMATS: dict[str, ManifestFormat] = {CBOR: "cbor", JSON: "json"}
_HASH_BESIDE_THE_LOOP = 1 << 20  # bytes; hashing more takes longer than handing it to a thread


async def get_manifest(call: Call) -> web.StreamResponse:
    """GET /v1/packages/{package_id}/manifest."""
    package_id, wait_sequence = call.path(PACKAGE_ID), call.query(WAIT_SEQUENCE)
    media_type = choose(call.list_header("Accept"), tuple(_FORMATS))
    data = await call.registry.get_manifest_bytes(package_id, _FORMATS[media_type], wait_sequence=wait_sequence)
    # The digest of the CBOR form is the manifest digest by definition; the JSON form's own is another.
    tag = await _digest(data)
    headers = {"ETag": f'"{tag}"', "Cache-Control": IMMUTABLE, "Vary": "Accept"}
    if not_modified(call.list_header("If-Match"), call.list_header("If-None-Match"), tag):
        return web.Response(status=304, headers=headers)
    if len(data) <= SENT_AT_ONCE_BYTES or call.request.method == "HEAD":
        return bytes_answer(data, media_type, headers=headers)
    response = web.StreamResponse(headers={"Content-Type": media_type, **headers})
    response.content_length = len(data)
    await call.start(response)
    await call.send(response, data)
    await call.finish(response)
    return response


async def _digest(data: bytes) -> ContentAddress:
    hashed = blake3(data) if len(data) <= _HASH_BESIDE_THE_LOOP else await asyncio.to_thread(blake3, data)
    return ContentAddress.of_digest(hashed.digest())


ROUTES = (
    Route(
        "GET",
        "/v1/packages/{package_id}/manifest",
        get_manifest,
        "Read a package's manifest",
        (
            Success(
                200,
                "The manifest in the form that `Accept` prefers",
                {CBOR: BINARY, JSON: {"type": "object"}},
                {"ETag": ETAG, "Vary": TEXT},
            ),
            Success(304, "The client has it", headers={"ETag": ETAG}),
        ),
        access=Right.READ,
        parameters=(PACKAGE_ID, WAIT_SEQUENCE, IF_MATCH, IF_NONE_MATCH),
        problems=(
            InvalidRequestError,
            PackageNotFoundError,
            IllegalPackageStateError,
            PackageParkedError,
            NotAcceptableError,
            PreconditionFailedError,
            UnavailableError,
            SequenceBeyondLogError,
            WaitTimeoutError,
        ),
        description="Canonical CBOR (RFC 8949 §4.2) unless `Accept` prefers JSON (JCS, RFC 8785). The `ETag` of the "
        "CBOR form is the manifest digest. If the client takes less than 1 KiB/s, the connection is cut before "
        "`Content-Length` is reached.",
        transfer="downloads",
    ),
)
