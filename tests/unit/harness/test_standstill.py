"""The measure of the time that a machine takes from a product counts late ticks after the start, and nothing else."""

from __future__ import annotations

import signal
import time

import pytest

from tests.standstill import Standstill


@pytest.mark.slow
def test_a_standstill_is_measured_and_one_before_the_moment_is_not() -> None:
    with Standstill() as machine:
        began = time.monotonic()
        machine.process.send_signal(signal.SIGSTOP)
        time.sleep(1.0)
        machine.process.send_signal(signal.SIGCONT)
        time.sleep(0.2)
        moment = time.monotonic()
        time.sleep(0.2)
    assert 0.9 < machine.longest(began) < moment - began
    assert machine.longest(moment) < machine.longest(began)
