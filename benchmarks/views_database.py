"""A database of a benchmark's own on the views' server, with the tables of this version."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from uuid import uuid4

import asyncpg

from services.config import Settings
from services.views.database import Views

_SECONDS = 60.0
_DURABILITY = ("fsync", "synchronous_commit", "full_page_writes", "shared_buffers", "max_wal_size")


@asynccontextmanager
async def fresh_views(settings: Settings) -> AsyncIterator[Settings]:
    """Settings whose views are empty, on a server that has just written everything down; dropped at the end."""
    database = f"bench_{uuid4().hex[:12]}"
    server, _, _ = settings.views_url.rpartition("/")
    await _execute(settings.views_url, f"create database {database}")
    try:
        fresh = replace(settings, views_url=f"{server}/{database}")
        views = Views(fresh.views_url)
        await views.migrate()
        await views.close()
        await _execute(settings.views_url, "checkpoint")
        yield fresh
    finally:
        await _execute(settings.views_url, f"drop database {database} with (force)")


async def connect(settings: Settings) -> asyncpg.Connection:
    """A bare connection to the settings' views."""
    return await asyncpg.connect(settings.views_url.replace("+asyncpg", ""), timeout=_SECONDS)


async def durability(settings: Settings) -> Mapping[str, str]:
    """What the server is set to that the figures depend on."""
    connection = await connect(settings)
    try:
        return {name: await connection.fetchval(f"show {name}") for name in _DURABILITY}
    finally:
        await connection.close()


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url.replace("+asyncpg", ""), timeout=_SECONDS)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
