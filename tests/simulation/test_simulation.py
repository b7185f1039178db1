"""The promises hold through random faults, a run repeats itself, and known mistakes are found."""

from __future__ import annotations

import pytest

from tests.simulation.mutations import MUTATIONS
from tests.simulation.simulation import run

STEPS = 20_000
RUNS = 6
"""Together more than 100,000 steps."""

SEARCH = 60
"""In so many runs, at most, a mistake must be found."""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, RUNS + 1))
def test_promises_hold_through_faults(seed: int) -> None:
    result = run(seed, STEPS)
    assert result.violation is None, result
    assert result.steps >= STEPS
    assert result.acknowledged > 0


@pytest.mark.slow
def test_a_seed_repeats_its_run() -> None:
    assert run(7, 5_000) == run(7, 5_000)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mistake_is_found(mutation: str) -> None:
    for seed in range(1, SEARCH + 1):
        if run(seed, STEPS, mutation).violation is not None:
            result = run(seed, STEPS, focus=MUTATIONS[mutation].focus)
            assert result.violation is None, result  # it is the mistake that was found
            return
    pytest.fail(f"{SEARCH} runs of {STEPS} steps do not find {mutation}")


@pytest.mark.endurance
@pytest.mark.parametrize("hundred", range(5))
def test_promises_hold_through_many_faults(hundred: int) -> None:
    """10,000,000 steps in all."""
    for seed in range(1_000 + 100 * hundred, 1_100 + 100 * hundred):
        result = run(seed, STEPS)
        assert result.violation is None, result
