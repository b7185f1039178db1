"""A file of 2 GiB is uploaded and downloaded, and gateway and client only hold a small part of it."""

from __future__ import annotations

import json
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from services.config import Settings
from tests.integration.processes import COMMAND, ProductProcess, command_environment, deployed

MIB = 1 << 20
LARGE_BYTES = 2048 * MIB
ALLOWED_BYTES = 150 * MIB
TRANSFER_SECONDS = 100.0
_SAMPLE_SECONDS = 0.02


def blocks(size: int) -> Iterator[bytes]:
    """A stream without a pattern that a store could save space by, cheaply: no two of its blocks are equal."""
    block = random.Random(2).randbytes(MIB)
    for number in range(size // MIB):
        yield number.to_bytes(8) + block[8:]


def resident(pid: int) -> int:
    """Bytes of memory that the process holds now; 0 when it is gone."""
    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.NoSuchProcess:
        return 0


class Client:
    """Runs client commands, each in a separate process, and keeps the peaks of memory: theirs and the gateway's."""

    def __init__(self, gateway: ProductProcess, home: Path) -> None:
        self._gateway = gateway
        self._home = home
        self.gateway_peak = 0

    def run(self, *arguments: str | Path) -> tuple[dict[str, object], int]:
        """What the command says in JSON, and its highest resident memory in bytes. Blocks."""
        environment = command_environment(None, self._gateway.endpoint, self._home)
        command = [*COMMAND, *map(str, arguments), "--json"]
        deadline = time.monotonic() + TRANSFER_SECONDS
        peak = 0
        with (
            tempfile.TemporaryFile() as output,
            subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL, env=environment, cwd="/") as child,
        ):
            while child.poll() is None:
                peak = max(peak, resident(child.pid))
                self.gateway_peak = max(self.gateway_peak, resident(self._gateway.pid))
                if time.monotonic() > deadline:
                    child.kill()
                time.sleep(_SAMPLE_SECONDS)  # between two samples
            output.seek(0)
            said = output.read()
        assert child.returncode == 0, f"{arguments[0]} ended with {child.returncode}: {said!r}"
        answer: dict[str, object] = json.loads(said)
        return answer, peak

    def push(self, path: Path) -> tuple[str, int]:
        about = ("--name", path.name, "--producer", "lab", "--subject", "s", "--retention-class", "scratch")
        answer, peak = self.run("push", path, *about)
        assert answer["bytes"] == path.stat().st_size
        return str(answer["package_id"]), peak


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that is gone after the test, whatever came of it: what lies here is too large to be kept."""
    with tempfile.TemporaryDirectory(prefix="artifact-store-large-") as name:
        yield Path(name)


@pytest.mark.endurance
@pytest.mark.services
def test_two_gibibytes_go_in_and_out_in_little_memory(real_settings: Settings, tmp_path: Path, folder: Path) -> None:
    small, large = folder / "small.bin", folder / "large.bin"
    small.write_bytes(b"some bytes")
    with large.open("wb") as file:
        file.writelines(blocks(LARGE_BYTES))
    with deployed(real_settings, tmp_path) as processes:
        gateway = processes["gateway"]
        idle = resident(gateway.pid)
        client = Client(gateway, tmp_path)
        small_id, idle_push = client.push(small)
        _, idle_pull = client.run("pull", small_id, folder / "small-again")

        large_id, push_peak = client.push(large)
        large.unlink()
        _, pull_peak = client.run("pull", large_id, folder)

        with large.open("rb") as file:
            assert all(file.read(MIB) == block for block in blocks(LARGE_BYTES))
            assert file.read(1) == b""
        grown = {
            "gateway": client.gateway_peak - idle,
            "push": push_peak - idle_push,
            "pull": pull_peak - idle_pull,
        }
        print({name: f"{size / MIB:.0f} MiB" for name, size in grown.items()})  # noqa: T201  shown when the test fails
        assert {name: size for name, size in grown.items() if size >= ALLOWED_BYTES} == {}
