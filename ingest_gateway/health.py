"""Whether a gateway can take writes: each part is checked, and one check answers all who ask."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from artifact_store.errors import ArtifactStoreError

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
