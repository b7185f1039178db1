"""Operations of components are timed and their failures counted, in every registry of the process."""

from __future__ import annotations

import pytest

from services.runtime.metrics import OPERATION_FAILURES, OPERATION_SECONDS, new_registry

LABELS = {"component": "test", "operation": "answer"}


def test_operations_of_components_are_timed_and_their_failures_counted() -> None:
    registry = new_registry()
    seconds, failures = OPERATION_SECONDS.labels(**LABELS), OPERATION_FAILURES.labels(**LABELS)
    for _ in range(3):
        with seconds.time(), failures.count_exceptions():
            pass
    with pytest.raises(OSError, match="no broker"), seconds.time(), failures.count_exceptions():
        raise OSError("no broker")
    assert registry.get_sample_value("artifact_store_operation_failures_total", LABELS) == 1
    assert registry.get_sample_value("artifact_store_operation_seconds_count", LABELS) == 4
    assert registry.get_sample_value("artifact_store_operation_seconds_bucket", {**LABELS, "le": "30.0"}) == 4
    assert registry.get_sample_value("artifact_store_operation_seconds_created", LABELS) is None
    other = {**LABELS, "operation": "read"}
    assert registry.get_sample_value("artifact_store_operation_seconds_count", other) is None
