"""Wiring: the only place where adapters are chosen, from the URLs in the settings."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.config import Settings
from services.registry import Registry


@asynccontextmanager
async def registry(settings: Settings) -> AsyncIterator[Registry]:
    """The registry of these settings, as `services.registry.open_registry` gives it."""
    raise NotImplementedError
    yield  # pragma: no cover
