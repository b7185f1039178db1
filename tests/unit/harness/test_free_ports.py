"""The ports that tests give out: no process of a test run can get a port of another."""

from __future__ import annotations

import pytest

from tests.services.process import free_ports


def test_processes_of_a_test_run_draw_from_ports_that_the_others_never_draw_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "3")
    given = []
    for worker in ("gw0", "gw1", "gw2"):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        given.append({port % 3 for port in free_ports(20)})
    assert [len(rests) for rests in given] == [1, 1, 1]
    assert len(set.union(*given)) == 3
