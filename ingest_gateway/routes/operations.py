"""For operators: liveness, readiness to take writes, metrics, and the OpenAPI document."""

from __future__ import annotations

from aiohttp import web

from ingest_gateway.health import Health, Readiness
from ingest_gateway.http_metrics import CONTENT_TYPE
from ingest_gateway.protocol.declaration import Route, Success
from ingest_gateway.protocol.request import JSON, Call, bytes_answer, json_answer


async def get_health(call: Call) -> web.StreamResponse:
    """GET /healthz."""
    return json_answer(Health(status="ok"))


async def get_readiness(call: Call) -> web.StreamResponse:
    """GET /readyz."""
    found = await call.gateway.ready.now()
    if call.gateway.admission.draining:
        found = found.model_copy(update={"status": "unready"})
    return json_answer(found, status=503 if found.status == "unready" else 200)


async def get_metrics(call: Call) -> web.StreamResponse:
    """GET /metrics."""
    siblings = call.gateway.siblings
    shown = call.gateway.metrics.exposition() if siblings is None else await siblings.exposition()
    return bytes_answer(shown, CONTENT_TYPE)


async def get_openapi(call: Call) -> web.StreamResponse:
    """GET /openapi.json."""
    return bytes_answer(call.gateway.openapi, JSON)


ROUTES = (
    Route(
        "GET",
        "/healthz",
        get_health,
        "Whether the process is alive",
        (Success(200, "It is alive", {JSON: Health}),),
        access="open",
        tag="operation",
    ),
    Route(
        "GET",
        "/readyz",
        get_readiness,
        "Whether the gateway can take writes",
        (
            Success(200, "It can; `degraded` while the views are unavailable", {JSON: Readiness}),
            Success(503, "It cannot", {JSON: Readiness}),
        ),
        access="open",
        tag="operation",
    ),
    Route(
        "GET",
        "/metrics",
        get_metrics,
        "Metrics for Prometheus, of all processes behind this address",
        (Success(200, "Text exposition", {"text/plain": {"type": "string"}}),),
        access="open",
        tag="operation",
    ),
    Route(
        "GET",
        "/openapi.json",
        get_openapi,
        "This document",
        (Success(200, "OpenAPI 3.1", {JSON: {"type": "object"}}),),
        access="open",
        tag="operation",
    ),
)
