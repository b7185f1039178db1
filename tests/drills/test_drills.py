"""Each failure that an operator may meet raises its alert, is explained, and is mended by the runbook."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.drills.__main__ import run
from tests.drills.carry_out import carry_out
from tests.drills.drills import DRILLS
from tests.drills.scene import HASTENED, small_installation
from tests.faults.torture.stage import Stage

QUICK = ("a gateway away", "a projector away", "a foreign record", "MinIO away", "PostgreSQL away")
"""One for each part of an installation."""

pytestmark = [pytest.mark.services, pytest.mark.processes]


@pytest.mark.endurance
async def test_each_failure_is_seen_named_and_mended(tmp_path: Path) -> None:
    assert len(DRILLS) >= 25
    outcomes = await run(DRILLS, tmp_path)
    assert {outcome.name: outcome.wrong for outcome in outcomes if outcome.wrong} == {}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    """A small installation that all quick drills are made on, one after the other."""
    async with small_installation(tmp_path_factory.mktemp("drills")) as found:
        yield found


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.asyncio(loop_scope="module")
async def test_a_failure_of_each_part_is_seen_named_and_mended(stage: Stage, tmp_path: Path, name: str) -> None:
    (drill,) = [found for found in DRILLS if found.name == name]
    outcome = await carry_out(stage, drill, tmp_path / "prometheus", HASTENED)
    assert outcome.wrong == []
