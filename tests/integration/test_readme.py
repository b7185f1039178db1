"""The README's commands work: each marked block is run exactly as printed, on separate parts."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from services.cli import main
from services.config import PREFIX, Settings
from tests.documents import ROOT, blocks
from tests.integration.processes import serving

pytestmark = pytest.mark.processes

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = blocks("README.md") | blocks("packaging/client/README.md")


@pytest.fixture
def environment(embedded_settings: Settings) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return clean | embedded_settings.environment()


def run(script: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_embedded_commands_work_one_after_the_other(environment: dict[str, str], tmp_path: Path) -> None:
    block = BLOCKS["embedded"]
    assert [line.split()[0] for line in block.splitlines()] == ["make", "."] + ["artifact-store"] * 4
    run(block, environment)
    (line,) = run(". .venv/bin/activate; artifact-store packages --json", environment).splitlines()
    package = json.loads(line)
    assert package["name"] == "handbook"
    lead = (
        BLOCKS["address"].replace("PACKAGE_ID", package["package_id"]).replace("blake3:…", package["manifest_digest"])
    )
    out = run(". .venv/bin/activate\n" + lead.replace("./copy", str(tmp_path / "copy")), environment)
    assert '"manifest_version":1' in out
    source = {
        path.relative_to(ROOT / "docs"): path.read_bytes() for path in (ROOT / "docs").rglob("*") if path.is_file()
    }
    copied = {
        path.relative_to(tmp_path / "copy"): path.read_bytes()
        for path in (tmp_path / "copy").rglob("*")
        if path.is_file()
    }
    assert copied == source


def test_the_python_example_prints_a_package_and_its_address(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [ROOT / ".venv/bin/python", "-W", "error", "-c", BLOCKS["python"]],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert re.fullmatch(r"[0-9a-f-]{36} blake3:[0-9a-f]{64}\n", done.stdout)


def test_the_http_examples_are_answered(
    embedded_settings: Settings, environment: dict[str, str], tmp_path: Path
) -> None:
    with serving(embedded_settings, tmp_path) as process:
        out = run(BLOCKS["http"].replace("localhost:8080", f"127.0.0.1:{process.port}"), environment)
    assert '"run 13"' in out
    assert "v1.package.created" in out


def test_the_client_examples_push_pull_and_stream(
    embedded_settings: Settings, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    with serving(embedded_settings, tmp_path) as process:

        def said(block: str) -> str:
            code = re.sub(r"(localhost|127\.0\.0\.1):8080", f"127.0.0.1:{process.port}", BLOCKS[block])
            command = [str(ROOT / ".venv/bin/python"), "-W", "error", "-c", code]
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=True
            )
            return str(done.stdout)

        pushed = said("client")
        assert re.fullmatch(r"blake3:[0-9a-f]{64}\n", said("stream"))
        assert re.fullmatch(r"frames/099\.csv\nblake3:[0-9a-f]{64}\n", said("spool"))
    copied = [path for path in (tmp_path / "copy").rglob("*") if path.is_file()]
    assert re.fullmatch(rf"blake3:[0-9a-f]{{64}} {len(copied)}\n", pushed)


def test_every_make_target_that_the_readme_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)\b", README)) - {"are"} <= targets


def test_every_command_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"(?:`|^)artifact-store ([a-z]+)", README, re.MULTILINE))
    assert named <= set(main.commands)


def test_every_file_that_the_readme_links_to_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
