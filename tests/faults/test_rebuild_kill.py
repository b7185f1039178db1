"""A replay is killed at any moment: the live view is still read, and the next replay finishes the build."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import inspect

from artifact_store.position import Position
from projector.rebuild import RebuildOptions, replay_view
from schemas.codec import encode
from services.config import Settings
from services.log.sqlite.file import create_file
from services.views.database import Views
from services.views.digest import digest_view
from services.views.engine.apply import catch_up
from services.views.engine.checkpoints import SUFFIX
from services.views.engine.generations import read_build
from services.views.projections import PROJECTIONS
from services.wiring import open_log
from tests.integration.processes import COMMAND
from tests.integration.projector_stage import WAIT_SECONDS
from tests.views_history import History

REGISTRY = PROJECTIONS["registry"]
KILLS = 20
RATE = 2000
"""Events a second: ten batches of a tenth of that."""


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def settings(request: pytest.FixtureRequest, embedded_settings: Settings) -> Settings:
    if request.param == "sqlite":
        return embedded_settings
    return replace(embedded_settings, views_url=request.getfixturevalue("postgres_url"))


@pytest.fixture
async def views(settings: Settings) -> AsyncIterator[Views]:
    opened = Views(settings.views_url)
    await opened.migrate()
    yield opened
    await opened.close()


def fill(settings: Settings, history: History) -> None:
    """A log file with these events, past every writer."""
    path = Path(settings.log_url.removeprefix("sqlite:///"))
    create_file(path)
    rows = [(n, e.package_id.bytes, e.sequence, e.command_id.bytes, encode(e)) for n, e in enumerate(history.events)]
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?)", rows)


async def kill_at(settings: Settings, views: Views, folded: int, then: float) -> bool:
    """Start a replay and kill it `then` seconds after so many events are in the build; whether it was still running."""
    command = [*COMMAND, "replay", "registry", "--quiet", "--max-rate", str(RATE)]
    environment = {**os.environ, **settings.environment()}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        async with asyncio.timeout(WAIT_SECONDS):
            while process.poll() is None:
                async with views.reading(snapshot=True) as connection:
                    build = await read_build(connection, REGISTRY)
                if build is not None and sum(build.position.offsets.values()) >= folded:
                    break
        await asyncio.sleep(then)  # a moment that is drawn, not one that is waited for
        killed = process.poll() is None
        process.send_signal(signal.SIGKILL)
    return killed


async def test_a_replay_killed_at_random_moments_is_ended_by_the_next(settings: Settings, views: Views) -> None:
    history = History().fill(packages=40, files=12)
    fill(settings, history)
    log, draw = open_log(settings), random.Random(5)
    await catch_up(views, log, REGISTRY)
    live = await digest_view(views, REGISTRY)
    killed = 0
    for turn in range(KILLS):
        # Every other one while it loads, the others around indexes and switch.
        folded = draw.randrange(len(history.events)) if turn % 2 else len(history.events)
        killed += await kill_at(settings, views, folded, draw.uniform(0, 0.1))
        found = await digest_view(views, REGISTRY)
        assert (found.digest, found.rows) == (live.digest, live.rows), "readers see the whole view at any moment"
    assert killed >= KILLS / 2, "replays ended before they were to be killed"
    done = await replay_view(views, log, REGISTRY, options=RebuildOptions(verify=True))
    assert (done.matches, done.digest, done.position) == (
        True,
        live.digest,
        Position(done.position.log, {0: len(history.events)}),
    )
    async with views.reading(snapshot=True) as connection:
        names = await connection.run_sync(lambda plain: inspect(plain).get_table_names())
        assert await read_build(connection, REGISTRY) is None
    assert not [name for name in names if name.endswith(SUFFIX)]
    await log.close()
