"""For each failure that an operator meets: what cries, what is said, and that the runbook mends it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.drills.__main__ import run
from tests.drills.drills import DRILLS


@pytest.mark.services
@pytest.mark.processes
@pytest.mark.endurance
async def test_each_failure_is_seen_named_and_mended(tmp_path: Path) -> None:
    assert len(DRILLS) >= 25
    outcomes = await run(DRILLS, tmp_path)
    assert {outcome.name: outcome.wrong for outcome in outcomes if outcome.wrong} == {}
