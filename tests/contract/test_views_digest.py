"""A digest is streamed, so its memory does not grow with the rows; and it is the same in every process and run."""

from __future__ import annotations

import json
import os
import subprocess
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, text

from services.config import Settings
from services.views.database import Views
from services.views.digest import digest_tables, digest_view, keep_tables
from services.views.engine.apply import catch_up
from services.views.projections import PROJECTIONS, Projection
from tests.contract.test_views_plans import fill
from tests.integration.processes import COMMAND
from tests.memory_log import MemoryLog
from tests.views_history import History

REGISTRY = PROJECTIONS["registry"]
ROWS = 10_000
"""In each of four tables; all of them at once would take 25 MiB and more."""

MOST_MIB = 6


@pytest.mark.slow
async def test_a_digest_holds_few_rows_at_a_time(views: Views) -> None:
    await fill(views, 0, ROWS)
    tracemalloc.start()
    try:
        found = await digest_view(views, REGISTRY)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.rows == 4 * ROWS
    assert most < MOST_MIB << 20, f"{most / (1 << 20):.1f} MiB"


@pytest.mark.services
async def test_a_digest_may_take_longer_than_other_statements(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.views.database._STATEMENT_SECONDS", 1)
    views = Views(postgres_url)
    slow = Table("slow", MetaData(), Column("id", Integer, primary_key=True))
    async with views.writing() as connection:  # its first row takes as long as a large sort
        await connection.execute(text("CREATE VIEW slow AS SELECT 7 AS id FROM pg_sleep(3)"))
    async with views.reading(snapshot=True, long=True) as connection:
        projection = cast("Projection", SimpleNamespace(name="slow", tables=(slow,)))
        await keep_tables(connection, {"slow": slow})
        found = await digest_tables(connection, projection, {"slow": slow}, None)
    assert found.rows == 1
    await views.close()


@pytest.mark.slow
async def test_another_process_finds_the_same_digest_run_after_run(
    views: Views, views_url: str, embedded_settings: Settings, tmp_path: Path
) -> None:
    log = MemoryLog()
    log.append(*History().fill(packages=9, files=5).events)
    settings = replace(embedded_settings, views_url=views_url)
    await catch_up(views, log, REGISTRY)
    here = await digest_view(views, REGISTRY)
    for seed in ("1", "2"):  # sets and maps come in another order with another seed
        environment = {**os.environ, **settings.environment(), "PYTHONHASHSEED": seed}
        command = [*COMMAND, "digest", "registry", "--json"]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, cwd=tmp_path)
        answer = json.loads(done.stdout)
        assert (answer["digest"], answer["rows"]) == (str(here.digest), here.rows)
