"""Opening the parts that an operator's command works on, and closing them again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from services.cli.settings import invocation

if TYPE_CHECKING:
    from services.log.port import Log
    from services.views.engine import Views

LOG_AND_VIEWS = ("log_url", "views_url")
"""The settings that such a command shows."""


@asynccontextmanager
async def log_and_views() -> AsyncIterator[tuple[Log, Views]]:
    """Log and views of this command line's settings."""
    from services.wiring import open_log, open_views

    settings = invocation().settings()
    log, views = open_log(settings), open_views(settings)
    try:
        yield log, views
    finally:
        await views.close()
        await log.close()
