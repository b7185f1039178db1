"""The image's recipe is locked to hashes through its build. `make image` builds and tries it if there is an engine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.image import CONTAINERFILE, ROOT, project

RECIPE = CONTAINERFILE.read_text(encoding="utf-8").replace("\\\n", " ")
COPIED = [words for line in re.findall(r"^COPY (?!--from)(.*)$", RECIPE, re.MULTILINE) for words in line.split()[:-1]]


def _steps(stage: str) -> list[str]:
    """The commands of a stage, in order."""
    (body,) = re.findall(rf"^FROM [^\n]* AS {stage}\n(.*?)(?=^FROM )", RECIPE, re.MULTILINE | re.DOTALL)
    return re.findall(r"^RUN (.*)$", body, re.MULTILINE)


def test_nothing_is_installed_that_is_not_locked_to_hashes() -> None:
    installing = [
        step for step in re.split(r"&&|^RUN ", RECIPE, flags=re.MULTILINE) if re.search(r"pip (install|wheel)", step)
    ]
    assert len(installing) == 5
    for step in installing:
        assert "--require-hashes" in step or "--no-index" in step
    assert "PIP_ONLY_BINARY=:all:" in RECIPE
    named = set(re.findall(r"-r /src/(\S+)", RECIPE))
    assert named <= set(COPIED)
    for name in named:
        pinned = re.findall(
            r"^[\w.-]+(?:\[.*\])?==\S+.*?\n(    \S+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE
        )
        assert pinned
        assert all(line.startswith("    --hash=sha256:") for line in pinned), name


def test_the_image_says_what_it_is() -> None:
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', RECIPE))
    assert labels["description"] == project()["description"]
    assert labels["licenses"] == project()["license"]
    assert f"ARG VERSION={project()['version']}\n" in RECIPE
    assert (labels["version"], labels["revision"]) == ("${VERSION}", "${REVISION}")


def test_the_build_sees_what_it_copies_and_little_else() -> None:
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    let_through = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    assert "*" in patterns
    assert {name.partition("/")[0] for name in COPIED} == let_through


@pytest.mark.endurance
@pytest.mark.timeout(900)
def test_the_steps_build_the_product_and_its_bill_of_materials(tmp_path: Path) -> None:
    for name in COPIED:
        target = tmp_path / "src" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, target)
    for step in (*_steps("build"), *_steps("sbom")):
        command = re.sub(r"(?<=[\s=])/(opt|src|wheels|sbom\.cdx\.json)", rf"{tmp_path}/\1", " " + step)
        environment = {
            "PATH": f"{Path(shutil.which('python3') or '').parent}:/usr/bin:/bin",
            "PIP_ONLY_BINARY": ":all:",
        }
        command = re.sub(r"(?<=\s)python -m venv", "python3 -m venv", command)
        done = subprocess.run(["/bin/sh", "-ec", command], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    program = tmp_path / "opt" / "artifact-store" / "bin" / "artifact-store"
    shown = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert project()["version"] in shown.stdout
    bill = json.loads((tmp_path / "sbom.cdx.json").read_text(encoding="utf-8"))
    found = {component["name"].lower().replace("_", "-"): component for component in bill["components"]}
    locked = (ROOT / "requirements" / "traces.txt").read_text(encoding="utf-8")
    everywhere = dict(re.findall(r"^([\w.-]+)(?:\[.*\])?==(\S+) \\$", locked, re.MULTILINE))
    assert everywhere
    assert {name: found[name]["version"] for name in everywhere} == everywhere
    licensed = [name for name in everywhere if found[name].get("licenses")]
    assert len(licensed) > 0.9 * len(everywhere), "few distributions do not say under which licence they are"
    assert bill["metadata"]["component"]["name"] == project()["name"]
