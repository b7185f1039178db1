"""Readiness: whether a gateway can take writes; and whether a process delivers to subscriptions.

Probes and metrics share the results of one check.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from artifact_store.errors import ArtifactStoreError
from services.runtime.processes import wait_for_stop
from services.webhooks.subscriptions import Heartbeat, Subscriptions

_log = logging.getLogger(__name__)

Check = Callable[[], Awaitable[str | None]]
"""Checks one part: returns None if it works, else the cause. An ArtifactStoreError counts as a cause."""

CHECK_SECONDS = 3.0
"""A part that does not answer within this time counts as down."""


FRESH_SECONDS = 1.0
"""Seconds for which the result of a check is reused."""

WATCH_SECONDS = 5.0
"""Seconds between the checks that metrics show."""

COMPONENTS = ("log", "blobs", "writer", "views")


@dataclass(frozen=True)
class Checks:
    """A check for each part. Writes need log, blobs and writer; without views only reads suffer."""

    log: Check
    blobs: Check
    writer: Check
    views: Check


class PartHealth(BaseModel):
    """The state of one part."""

    state: Literal["ok", "degraded", "failed"]
    cause: str | None


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"]


class Readiness(BaseModel):
    """Whether the gateway can take writes, and the state of each part."""

    status: Literal["ready", "degraded", "unready"]
    parts: Mapping[str, PartHealth]


async def readiness(checks: Checks) -> Readiness:
    """Check all parts concurrently. Waits CHECK_SECONDS at most."""
    causes = await asyncio.gather(*(_cause(getattr(checks, name)) for name in COMPONENTS))
    parts = {
        name: PartHealth(state="ok" if cause is None else "degraded" if name == "views" else "failed", cause=cause)
        for name, cause in zip(COMPONENTS, causes, strict=True)
    }
    states = {part.state for part in parts.values()}
    return Readiness(
        status="unready" if "failed" in states else "degraded" if "degraded" in states else "ready", parts=parts
    )


class ReadyAnswers:
    """The result behind `/readyz`: one check runs at a time, and all who wait share it. Belongs to one event loop."""

    def __init__(self, checks: Checks) -> None:
        self._checks = checks
        self._checking = asyncio.Lock()
        self._found: Readiness | None = None
        self._until = 0.0
        self._failing: dict[str, float] = {}
        """Since when components have failed in every check."""
        self._told: set[str] = set()
        """The components whose failure was logged."""

    async def now(self) -> Readiness:
        """The last result if it is younger than FRESH_SECONDS, else a new one. Waits at most CHECK_SECONDS."""
        loop = asyncio.get_running_loop()
        async with self._checking:
            if self._found is None or loop.time() >= self._until:
                self._found = await readiness(self._checks)
                self._until = loop.time() + FRESH_SECONDS
            return self._found

    async def watch(self, show: Callable[[str, bool], None], stop: asyncio.Event) -> None:
        """Check every WATCH_SECONDS and call `show` with each component and whether it works, until `stop` is set.

        Logs a component that fails in two checks, because a starting process is not ready at once, and logs when it
        works again. When `stop` is set, the running check is finished, which takes at most CHECK_SECONDS: cancelled, it
        would leak a database connection.
        """
        while not stop.is_set():
            try:
                for name, part in (await self.now()).parts.items():
                    show(name, part.state == "ok")
                    self._note(name, part.cause)
            except Exception:  # noqa: BLE001 - nobody waits for this task: a mistake is logged, and the next check comes
                _log.exception("a readiness check failed")
                for name in COMPONENTS:
                    show(name, False)
            await wait_for_stop(stop, WATCH_SECONDS)

    def _note(self, name: str, cause: str | None) -> None:
        now = asyncio.get_running_loop().time()
        if cause is None:
            since = self._failing.pop(name, now)
            if name in self._told:
                self._told.remove(name)
                _log.info("component %s works again after %.0f s", name, now - since)
        elif name not in self._failing:
            self._failing[name] = now
        elif name not in self._told:
            self._told.add(name)
            _log.warning("component %s fails: %s", name, cause)


class Deliveries:
    """Whether a process delivers to the active subscriptions. Belongs to one event loop."""

    def __init__(self, store: Subscriptions, heartbeat: Heartbeat | None = None) -> None:
        self._store = store
        self._heartbeat = heartbeat or Heartbeat()

    async def unserved(self) -> int | None:
        """The number of active subscriptions if nobody delivers to them, else 0; None if the database did not answer.

        Waits at most CHECK_SECONDS. It takes several calls, LAPSE_SECONDS apart, to notice that a process has vanished.
        """
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                lapsed = self._heartbeat.has_lapsed(await self._store.beat())
                return await self._store.active() if lapsed else 0
        except (ArtifactStoreError, TimeoutError):
            return None

    async def watch(self, show: Callable[[int | None], None], stop: asyncio.Event) -> None:
        """Call `show` with the result of `unserved` every WATCH_SECONDS, until `stop` is set."""
        while not stop.is_set():
            try:
                show(await self.unserved())
            except Exception:  # noqa: BLE001 - as above
                _log.exception("a look at the deliveries of webhooks failed")
                show(None)
            await wait_for_stop(stop, WATCH_SECONDS)


async def _cause(check: Check) -> str | None:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            return await check()
    except TimeoutError:
        return f"no answer within {CHECK_SECONDS:g} s"
    except ArtifactStoreError as error:
        return error.detail
