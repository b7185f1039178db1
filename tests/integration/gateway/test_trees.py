"""Trees of many small files through a gateway and back by the command line: in bundles, once, and resumable."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from services.config import Settings
from tests import trees
from tests.integration.processes import COMMAND, ProductProcess, command_environment, output_of, serving

pytestmark = pytest.mark.processes

ABOUT = ("--name", "n", "--producer", "p", "--subject", "s", "--retention-class", "scratch", "--json")
SMALL = 2_300


@pytest.fixture
def gateway(settings: Settings, tmp_path: Path) -> Iterator[ProductProcess]:
    """Gateway and projections in one process, on both sets of parts."""
    with serving(settings, tmp_path) as process:
        yield process


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    draw = Random(5)
    for number in range(SMALL):
        path = tmp_path / "tree" / f"{number % 23:02}" / f"{number:04}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw.randbytes(draw.randrange(3_000)))
    (tmp_path / "tree" / "large.bin").write_bytes(draw.randbytes(3 << 20))
    return tmp_path / "tree"


def push(gateway: ProductProcess, tree: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output_of(None, "push", tree, *ABOUT, url=gateway.endpoint))
    return found


def received(gateway: ProductProcess) -> int:
    """Bytes of request bodies that the gateway has taken."""
    with urllib.request.urlopen(f"{gateway.endpoint}/metrics") as answer:  # noqa: S310 - a loopback address of our own
        text = answer.read().decode()
    return int(
        sum(
            float(value)
            for value in re.findall(r"^artifact_store_\w*received_bytes_total\S* (\S+)$", text, re.MULTILINE)
        )
    )


def test_a_tree_goes_in_and_comes_back_and_moves_once(
    gateway: ProductProcess, settings: Settings, tree: Path, tmp_path: Path
) -> None:
    size = sum(map(len, trees.read(tree).values()))
    first = push(gateway, tree)
    assert (first["files"], first["bytes"], first["sequence"]) == (SMALL + 1, size, SMALL + 3)
    assert received(gateway) > size
    before = received(gateway)
    second = push(gateway, tree)
    assert second["package_id"] != first["package_id"]
    assert received(gateway) - before < SMALL * 400, "more than names went"
    for pushed in (first, second):
        output_of(None, "pull", pushed["package_id"], tmp_path / pushed["package_id"], url=gateway.endpoint)
        assert trees.read(tmp_path / pushed["package_id"]) == trees.read(tree)
    # What was lost of a pull is fetched again, and only that.
    lost = [path for path in (tmp_path / first["package_id"]).rglob("*.json") if path.stem < "1500"]
    for path in lost:
        path.unlink()
    again = output_of(None, "pull", first["package_id"], tmp_path / first["package_id"], "--json", url=gateway.endpoint)
    assert json.loads(again)["kept"] == SMALL + 1 - len(lost)
    assert trees.read(tmp_path / first["package_id"]) == trees.read(tree)
    report = json.loads(output_of(settings, "verify", "--bytes", "--json"))
    assert report["violations"] == []


def test_a_push_that_is_killed_goes_on(gateway: ProductProcess, settings: Settings, tree: Path, tmp_path: Path) -> None:
    environment = command_environment(None, gateway.endpoint, tmp_path / "state")
    command = [*COMMAND, "push", str(tree), *ABOUT, "--concurrency", "1"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/")
    deadline = time.monotonic() + 60
    while received(gateway) < 100_000 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    done = subprocess.run(command, env=environment, capture_output=True, cwd="/", timeout=120, check=True)
    pushed = json.loads(done.stdout)
    assert pushed["sequence"] == SMALL + 3
    output_of(None, "pull", pushed["package_id"], tmp_path / "out", url=gateway.endpoint)
    assert trees.read(tmp_path / "out") == trees.read(tree)
    report = json.loads(output_of(settings, "verify", "--json"))
    assert report["violations"] == []
