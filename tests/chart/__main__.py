"""`python -m tests.chart`: builds Helm if it is missing, then runs the quick tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.chart.helm import helm_binary
from tests.services.process import ServiceError


def main() -> int:
    """Returns pytest's exit code, or 1 with a message when Helm cannot be had. Further arguments go to pytest."""
    try:
        helm_binary()  # minutes at first; inside a test it would count against the test's own time-out
    except ServiceError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return int(pytest.main([str(Path(__file__).parent), "-m", "not endurance", *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())
