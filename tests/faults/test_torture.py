"""Rounds of torture: the invariants (docs/architecture.md) hold while brokers, stores, networks and processes fail.

Each test prints its seed; `FAULT_SEED` in the environment repeats it.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.faults.torture.__main__ import report, torture

pytestmark = pytest.mark.services

LONG_SECONDS = 1800


@pytest.mark.parametrize(
    ("seconds", "producers", "at_once"),
    [
        pytest.param(20, 60, 20, id="short"),
        pytest.param(LONG_SECONDS, 400, 120, id="long", marks=pytest.mark.endurance),
    ],
)
async def test_what_was_acknowledged_is_recorded_once_whatever_fails(
    tmp_path: Path, seconds: float, producers: int, at_once: int
) -> None:
    seed = int(os.environ.get("FAULT_SEED") or random.randrange(2**32))
    result = await torture(tmp_path, seconds, seed, producers, at_once)
    report(result, seed)
    assert result.verdict.clean, result.verdict.said
    assert len(result.windows) >= 3
    if seconds >= LONG_SECONDS:  # in a short round it is a matter of luck
        assert len({window.kind for window in result.windows}) >= 10
    assert result.verdict.acknowledged > seconds
