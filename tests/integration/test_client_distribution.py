"""The distribution `artifact-store-client`: its wheel, alone and outside the checkout, works with a gateway."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest

from services.config import PREFIX, Settings
from tests import trees
from tests.integration.http_gateway import running_gateway

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "packaging" / "client"

PROGRAM = """
import asyncio
import sys
from importlib.util import find_spec
from pathlib import Path

import artifact_store
from artifact_store import Client, PackageNotFoundError, pull, push

url, tree, copy = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
assert Path(artifact_store.__file__).is_relative_to(sys.prefix), artifact_store.__file__
assert [name for name in ("schemas", "services", "sqlalchemy", "fastavro") if find_spec(name)] == []


async def main():
    async with Client(url) as registry:
        pushed = await push(registry, tree, name="n", producer="p", subject="s", retention_class="scratch")
        await pull(registry, pushed.package_id, copy)
        events = [event async for event in registry.read_events(package_id=pushed.package_id)]
        try:
            await registry.get_package(events[0].event_id)
        except PackageNotFoundError:
            print(pushed.manifest_digest, [event.event_type for event in events])


asyncio.run(main())
"""


def project(path: Path) -> dict[str, Any]:
    """The `project` table of a pyproject.toml."""
    found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    return found


def required(found: Distribution) -> set[str]:
    """The names of what a distribution needs without extras, as far as it is installed here."""
    names = {
        re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] for line in found.requires or () if "extra ==" not in line
    }
    return {name for name in names if installed(name) is not None}


def installed(name: str) -> Distribution | None:
    """The distribution of this name in the environment of the tests."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None  # for another Python or platform


def copy_with_dependencies(wheel: Distribution, site: Path) -> None:
    """Put what the wheel declares, and what that needs in turn, into another environment's `site`."""
    waiting, done = required(wheel), set[str]()
    while waiting:
        name = waiting.pop()
        done.add(name)
        found = distribution(name)
        waiting |= required(found) - done
        for file in found.files or ():
            if ".." not in file.parts:
                target = site / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(str(found.locate_file(file)), target)


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of a new environment that has the wheel and its dependencies only."""
    source, built, environment = tmp_path / "source", tmp_path / "built", tmp_path / "environment"
    shutil.copytree(PROJECT, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps"]
    build = [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", str(built), str(source)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = built.glob("artifact_store_client-*.whl")
    venv.create(environment, with_pip=False, symlinks=True)
    (site,) = environment.glob("lib/python*/site-packages")
    install = [*pip, "install", *offline, "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, cwd=tmp_path)
    (metadata,) = site.glob("artifact_store_client-*.dist-info")
    assert (site / "artifact_store" / "py.typed").is_file()
    assert {path.name for path in site.iterdir()} == {"artifact_store", metadata.name}
    copy_with_dependencies(Distribution.at(metadata), site)
    return environment / "bin" / "python"


async def test_the_wheel_alone_pushes_and_pulls_a_tree(
    embedded_settings: Settings, tmp_path: Path, python: Path
) -> None:
    tree, copy = tmp_path / "tree", tmp_path / "copy"
    (tree / "b").mkdir(parents=True)
    (tree / "large").write_bytes(os.urandom(3 << 20))
    for number in range(20):
        (tree / "b" / f"{number}.txt").write_text(f"{number}\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith((PREFIX, "PYTHON"))}
    async with running_gateway(embedded_settings) as gateway:
        process = await asyncio.create_subprocess_exec(
            *(python, "-W", "error", "-c", PROGRAM, gateway.url, tree, copy),
            cwd=tmp_path,
            env=clean,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, err.decode()
    assert out.startswith(b"blake3:")
    assert out.count(b"v1.file.ingested") == 21
    assert trees.read(copy) == trees.read(tree)


def test_the_client_asks_for_the_same_versions_as_the_server() -> None:
    ours, client = project(ROOT / "pyproject.toml"), project(PROJECT / "pyproject.toml")
    assert set(client["dependencies"]) < set(ours["dependencies"])
    assert [client[name] for name in ("version", "requires-python", "license")] == [
        ours[name] for name in ("version", "requires-python", "license")
    ]
