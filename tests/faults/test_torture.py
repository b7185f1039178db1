"""A short round of torture: every promise of DESIGN §4 while processes, brokers, stores and networks fail at random."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.faults.torture.__main__ import report, torture

pytestmark = [pytest.mark.services, pytest.mark.endurance]  # until both have run many times on a quiet machine

SECONDS = 20.0
PRODUCERS, AT_ONCE = 60, 20


async def test_what_was_acknowledged_is_recorded_once_whatever_fails(tmp_path: Path) -> None:
    seed = int(os.environ.get("FAULT_SEED") or random.randrange(2**32))
    result = await torture(tmp_path, SECONDS, seed, PRODUCERS, AT_ONCE)
    report(result, seed)
    assert result.verdict.clean, result.verdict.said
    assert len({window.kind for window in result.windows}) >= 4
    assert result.verdict.acknowledged > 100
