"""The parts of a body fit the limits of S3, whatever its size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifact_store.errors import TooLargeError
from services.blobs.intake import LARGEST_PART, MAX_PARTS, MIB, SMALLEST_PART, PartPlan

TIB = 1 << 40


def plan(total: int | None) -> PartPlan:
    return PartPlan(8 * MIB, 32 * MIB, total)


@given(total=st.one_of(st.integers(0, 5 * TIB), st.integers(0, 100 * MIB)))
def test_a_declared_size_is_covered_by_parts_that_s3_takes(total: int) -> None:
    size = plan(total).size(1)
    count = -(-total // size)
    assert count <= MAX_PARTS
    assert size <= LARGEST_PART
    if count > 1:
        assert size >= SMALLEST_PART
        assert plan(total).size(count) == total - (count - 1) * size


def test_five_tebibytes_are_possible_and_relayed_instead_of_held() -> None:
    assert plan(5 * TIB).relayed(1)
    assert not plan(300 << 30).relayed(1)


def test_an_undeclared_size_begins_small_grows_to_what_may_be_held_and_has_an_end() -> None:
    unknown = plan(None)
    sizes = [unknown.size(number) for number in range(1, MAX_PARTS + 1)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (8 * MIB, 32 * MIB)
    assert sum(sizes) == unknown.longest_unknown() > 250 << 30
    assert not any(unknown.relayed(number) for number in (1, 5000, MAX_PARTS))
    with pytest.raises(TooLargeError, match="declare its size"):
        unknown.size(MAX_PARTS + 1)


def test_a_part_that_does_not_fit_into_memory_is_no_plan() -> None:
    with pytest.raises(ValueError, match="memory"):
        PartPlan(8 * MIB, 4 * MIB)
