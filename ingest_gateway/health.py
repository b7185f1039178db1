"""Liveness, readiness to take writes, metrics, and the contract."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from aiohttp import web
from pydantic import BaseModel

from ingest_gateway.answers import JSON, bytes_answer, json_answer
from ingest_gateway.call import Call
from ingest_gateway.metrics import CONTENT_TYPE
from ingest_gateway.operations import Route, Success
from services.errors import ArtifactStoreError

Check = Callable[[], Awaitable[str | None]]
"""Looks at one part: None when it is well, else what is wrong. An error of the tree that it raises is a cause too."""

CHECK_SECONDS = 3.0
"""How long one part may take to answer before it counts as away."""


FRESH_SECONDS = 1.0
"""How long all who ask get the answer that one check gave."""


@dataclass(frozen=True)
class Checks:
    """How each part is looked at. Without log, blobs or writer there are no writes; without views reads only suffer."""

    log: Check
    blobs: Check
    writer: Check
    views: Check


class PartHealth(BaseModel):
    """One part."""

    state: Literal["ok", "degraded", "missing"]
    cause: str | None


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"]


class Readiness(BaseModel):
    """Whether writes can be taken, and how each part is."""

    status: Literal["ready", "degraded", "unready"]
    parts: Mapping[str, PartHealth]


async def readiness(checks: Checks) -> Readiness:
    """Look at all parts at once. Blocks for CHECK_SECONDS at most."""
    names = ("log", "blobs", "writer", "views")
    causes = await asyncio.gather(*(_cause(getattr(checks, name)) for name in names))
    parts = {
        name: PartHealth(state="ok" if cause is None else "degraded" if name == "views" else "missing", cause=cause)
        for name, cause in zip(names, causes, strict=True)
    }
    states = {part.state for part in parts.values()}
    return Readiness(
        status="unready" if "missing" in states else "degraded" if "degraded" in states else "ready", parts=parts
    )


class ReadyAnswers:
    """The answers of `/readyz`, from one check at a time that all who ask share. Belongs to one event loop."""

    def __init__(self, checks: Checks) -> None:
        self._checks = checks
        self._checking = asyncio.Lock()
        self._found: Readiness | None = None
        self._until = 0.0

    async def now(self) -> Readiness:
        """What was found within FRESH_SECONDS, or is found now. Blocks for CHECK_SECONDS at most."""
        loop = asyncio.get_running_loop()
        async with self._checking:
            if self._found is None or loop.time() >= self._until:
                self._found = await readiness(self._checks)
                self._until = loop.time() + FRESH_SECONDS
            return self._found


async def _cause(check: Check) -> str | None:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            return await check()
    except TimeoutError:
        return f"no answer within {CHECK_SECONDS:g} s"
    except ArtifactStoreError as error:
        return error.detail


async def get_health(call: Call) -> web.StreamResponse:
    """GET /healthz."""
    return json_answer(Health(status="ok"))


async def get_readiness(call: Call) -> web.StreamResponse:
    """GET /readyz."""
    found = await call.gateway.ready.now()
    if call.gateway.draining:
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
        "Whether the process lives",
        (Success(200, "It does", {JSON: Health}),),
        tag="operation",
    ),
    Route(
        "GET",
        "/readyz",
        get_readiness,
        "Whether writes can be taken",
        (
            Success(200, "They can; `degraded` when the views are away", {JSON: Readiness}),
            Success(503, "They cannot", {JSON: Readiness}),
        ),
        tag="operation",
    ),
    Route(
        "GET",
        "/metrics",
        get_metrics,
        "Metrics for Prometheus, of all processes behind this address",
        (Success(200, "Text exposition", {"text/plain": {"type": "string"}}),),
        tag="operation",
    ),
    Route(
        "GET",
        "/openapi.json",
        get_openapi,
        "This document",
        (Success(200, "OpenAPI 3.1", {JSON: {"type": "object"}}),),
        tag="operation",
    ),
)
