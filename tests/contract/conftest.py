"""The stage of the log's contract. Tests that are slow only on SeaweedFS run there only in `make endurance`."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from services.config import Settings
from tests.contract.log_stage import Stage, staged


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark it so, before the marks select."""
    for item in items:
        if item.get_closest_marker("moves_much") and "seaweed" in item.name:
            item.add_marker(pytest.mark.endurance)


@pytest.fixture
async def stage(settings: Settings) -> AsyncIterator[Stage]:
    """A log of the test's own, on both sets of parts."""
    async with staged(settings) as found:
        yield found
