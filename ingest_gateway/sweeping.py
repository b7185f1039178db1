"""Sweeping the blob store: uploads that stood still for a day are aborted, so that a killed process leaves nothing.

Every gateway sweeps, one sweep at a time, about once an hour; sweeps of several gateways do each other no harm, and the
pauses between them are drawn so that they do not keep step. Only what never became a blob is removed.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Protocol

from services.errors import ArtifactStoreError

SWEEP_SECONDS = 3600.0

_log = logging.getLogger(__name__)


class Sweepable(Protocol):
    """What there is to know of a blob store here."""

    async def now(self) -> datetime:
        """See `BlobStore`."""

    async def sweep(self, *, now: datetime) -> int:
        """See `BlobStore`."""


@asynccontextmanager
async def swept_regularly(
    blobs: Sweepable,
    *,
    seconds: float = SWEEP_SECONDS,
    draw: Callable[[float, float], float] = random.uniform,
) -> AsyncIterator[None]:
    """Sweep for the length of the block, after pauses of half to one and a half times `seconds`."""

    async def sweep() -> None:
        while True:
            await asyncio.sleep(draw(0.5 * seconds, 1.5 * seconds))
            try:
                swept = await blobs.sweep(now=await blobs.now())
            except ArtifactStoreError as error:
                _log.warning("uploads could not be swept and are left to the next time: %s", error.detail)
            except Exception:  # noqa: BLE001 - nobody waits for this task: it is logged, and the next sweep comes
                _log.exception("sweeping uploads failed")
            else:
                if swept:
                    _log.info("swept %d uploads that stood still", swept)

    sweeping = asyncio.create_task(sweep())
    try:
        yield
    finally:
        sweeping.cancel()
        with suppress(asyncio.CancelledError):
            await sweeping
