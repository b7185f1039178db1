"""Opening the registry: on the embedded parts, or through a gateway if `url` is set.

The interface and its errors are defined in `artifact_store`; this package also exports them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from artifact_store.consumer import EventSource
from artifact_store.errors import DuplicateRelativePathError, IllegalPackageStateError, PackageNotFoundError
from artifact_store.registry import Registry, find_frozen
from services.config import Settings

__all__ = [
    "DuplicateRelativePathError",
    "IllegalPackageStateError",
    "PackageNotFoundError",
    "Registry",
    "find_frozen",
    "open_events",
    "open_registry",
]


@asynccontextmanager
async def open_events(settings: Settings) -> AsyncIterator[EventSource]:
    """The events of the log in these settings, read without a gateway by a process that may read all of it.

    Raises ConfigurationError.
    """
    from services.registry.origins import LogEvents
    from services.wiring import open_log

    log = open_log(settings)
    try:
        yield LogEvents(log)
    finally:
        await log.close()


@asynccontextmanager
async def open_registry(settings: Settings) -> AsyncIterator[Registry]:
    """The registry of these settings: through a gateway if `url` is set, otherwise on the embedded parts.

    Raises ConfigurationError: a Kafka log without a gateway, or settings that cannot work.
    """
    if settings.url is not None:
        from artifact_store import Client

        async with Client(settings.url, token_file=settings.token_file, ca=settings.ca) as remote:
            yield remote
        return
    from services.wiring import registry  # here, because wiring imports this module

    async with registry(settings) as opened:
        yield opened
