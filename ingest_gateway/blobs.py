"""Blobs: which of many are stored already, so that nobody sends them again."""

from __future__ import annotations

from aiohttp import web

from artifact_store.documents.shapes import MAX_KNOWN, KnownBlobsAnswer, KnownBlobsRequest
from ingest_gateway.answers import JSON, json_answer
from ingest_gateway.call import Call
from ingest_gateway.operations import Body, Route, Success
from ingest_gateway.packages import READING
from ingest_gateway.parameters import DIGESTS
from services.core.content_address import ContentAddress
from services.errors import InvalidRequestError, UnavailableError


async def known_blobs(call: Call) -> web.StreamResponse:
    """POST /v1/blobs/known."""
    asked = await call.json(KnownBlobsRequest)
    known = await call.registry.known_blobs(asked.to_digests())
    return json_answer(KnownBlobsAnswer(known=sorted(map(ContentAddress.of_digest, known))))


ROUTES = (
    Route(
        "POST",
        "/v1/blobs/known",
        known_blobs,
        "Ask which blobs are stored",
        (Success(200, "Those that are", {JSON: KnownBlobsAnswer}),),
        parameters=DIGESTS,
        body=Body({JSON: KnownBlobsRequest}, example={"addresses": [f"blake3:{'0' * 64}"]}),
        problems=(InvalidRequestError, *READING, UnavailableError),
        description=f"At most {MAX_KNOWN:,} content addresses. What is known can be ingested by name "
        "(`POST /v1/packages/{package_id}/files` with `application/json`) instead of sent.",
        tag="files",
    ),
)
