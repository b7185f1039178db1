"""What takes long on SeaweedFS alone is left to the endurance run there."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark it so, before the marks select."""
    for item in items:
        if item.get_closest_marker("moves_much") and "seaweed" in item.name:
            item.add_marker(pytest.mark.endurance)
