"""The promises hold through random faults, a run repeats itself, and known mistakes are found."""

from __future__ import annotations

import pytest

from tests.simulation.faults import Focus
from tests.simulation.mutations import MUTATIONS
from tests.simulation.simulation import run

STEPS = 20_000
RUNS = 6
"""Together more than 100,000 steps."""

SEARCH = 40
SEARCH_STEPS = 12_000
"""In so many runs of so many steps, at most, a mistake must be found."""


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
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mistake_is_found(mutation: str) -> None:
    for seed in range(1, SEARCH + 1):
        found = run(seed, SEARCH_STEPS, mutation)
        if found.violation is not None:
            sound = run(seed, found.steps, focus=MUTATIONS[mutation].focus)
            assert sound.violation is None, sound  # it is the mistake that was found
            return
    pytest.fail(f"{SEARCH} runs of {SEARCH_STEPS} steps do not find {mutation}")


@pytest.mark.endurance
@pytest.mark.parametrize("hundred", range(5))
def test_promises_hold_through_many_faults(hundred: int) -> None:
    """10,000,000 steps in all."""
    for seed in range(1_000 + 100 * hundred, 1_100 + 100 * hundred):
        result = run(seed, STEPS)
        assert result.violation is None, result


@pytest.mark.endurance
@pytest.mark.parametrize("further", [(), ("expel a member",), ("cut a process off from brokers", "freeze a projector")])
def test_promises_hold_although_the_log_loses_its_tail_again_and_again(further: tuple[str, ...]) -> None:
    for seed in range(3_000, 3_200):
        result = run(seed, SEARCH_STEPS, focus=Focus(("the log loses its tail", *further)))
        assert result.violation is None, result
