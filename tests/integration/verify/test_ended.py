"""A verification that is told to end leaves no temporary file behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.config import Settings
from tests.integration.processes import output_of

pytestmark = pytest.mark.processes

_VERIFY = """
import asyncio
import services.verify
from services.cli import main

async def stand_still(*given):
    print("folding", flush=True)
    await asyncio.Event().wait()

services.verify.check_view = stand_still
main(["verify", "--json"])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_is_interrupted_in_order_and_its_files_go(
    embedded_settings: Settings, tmp_path: Path, number: signal.Signals
) -> None:
    output_of(embedded_settings, "migrate")
    folder = tmp_path / "temporary"
    folder.mkdir()
    environment = {**os.environ, **embedded_settings.environment(), "TMPDIR": str(folder)}
    with subprocess.Popen(
        [sys.executable, "-c", _VERIFY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"folding\n"
            assert list(folder.iterdir()), "the fresh view lies there"
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1
    assert b"interrupted" in said
    assert list(folder.iterdir()) == []
