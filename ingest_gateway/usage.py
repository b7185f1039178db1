"""What came in: packages, files and bytes per producer, retention class and day."""

from __future__ import annotations

from aiohttp import web

from artifact_store.documents.shapes import UsagePageAnswer
from ingest_gateway.answers import JSON, TEXT, json_answer
from ingest_gateway.call import Call
from ingest_gateway.operations import Route, Success
from ingest_gateway.packages import link_to_next
from ingest_gateway.parameters import CURSOR, LIMIT, PRODUCER, RETENTION_CLASS
from services.errors import InvalidRequestError, UnavailableError
from services.views.models import DEFAULT_PAGE


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
        "GET",
        "/v1/usage",
        list_usage,
        "List what came in, by producer, retention class and day",
        (Success(200, "A page", {JSON: UsagePageAnswer}, {"Link": TEXT}),),
        parameters=(PRODUCER, RETENTION_CLASS, LIMIT, CURSOR),
        problems=(InvalidRequestError, UnavailableError),
        description="As far as the usage view has come. A package counts on the day of its creation, a file on the day "
        "of its event; days begin at midnight UTC.",
        tag="usage",
    ),
)
