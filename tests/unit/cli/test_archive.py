"""`log export`, `import`, `check` and `position` on embedded parts, with the bytes of files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from artifact_store.manifest import content_key
from services.cli import main
from services.config import Settings
from tests.unit.cli.conftest import Run

ABOUT = ("--name", "n", "--producer", "p", "--subject", "s", "--retention-class", "scratch")
LARGE = random.Random(1).randbytes(9 << 20)
"""More than a pack takes."""


def told(run: Run, *arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*arguments, "--json").stdout)
    return found


@pytest.fixture
def packages(run: Run, tmp_path: Path) -> list[str]:
    """Two packages: small files and a large one; small files alone, two of which are equal."""
    found = []
    for number, files in enumerate([{"a": b"first", "large": LARGE}, {"b": b"second", "c": b"second", "empty": b""}]):
        tree = tmp_path / f"tree {number}"
        tree.mkdir()
        for name, content in files.items():
            (tree / name).write_bytes(content)
        found.append(told(run, "push", tree, *ABOUT)["package_id"])
    return found


@pytest.fixture
def elsewhere_flags(tmp_path: Path) -> list[str]:
    """Flags that name other, empty parts."""
    folder = tmp_path / "elsewhere"
    return [
        *("--log-url", f"sqlite:///{folder}/log.db", "--blobs-url", f"file:{folder}/blobs"),
        *("--views-url", f"sqlite+aiosqlite:///{folder}/views.db"),
    ]


def test_a_registry_is_restored_from_one_file(
    run: Run, packages: list[str], tmp_path: Path, elsewhere_flags: list[str]
) -> None:
    archive = tmp_path / "all.archive"
    done = told(run, "log", "export", archive, "--blobs")
    assert (done["packages"], done["bytes"]) == (2, archive.stat().st_size)
    assert done["bytes"] > done["blob_bytes"] > len(LARGE)
    checked = told(run, "log", "check", archive)
    assert checked.items() <= done.items()
    restored = told(run, "log", "import", archive, "--blobs", *elsewhere_flags)
    assert restored["events"] == done["events"]
    assert (restored["blobs"], restored["digest"]) == (done["blobs"], done["digest"])
    run("migrate", *elsewhere_flags)
    assert told(run, "show", packages[0], *elsewhere_flags) == told(run, "show", packages[0])
    for projection in ("registry", "retention", "usage"):
        same = (told(run, "digest", projection)["digest"], told(run, "digest", projection, *elsewhere_flags)["digest"])
        assert same[0] == same[1]
    verified = told(run, "verify", "--bytes", *elsewhere_flags)
    assert (verified["violation_count"], verified["healed"], verified["files"]) == (0, 0, 5)
    run("pull", packages[0], tmp_path / "pulled", *elsewhere_flags)
    assert (tmp_path / "pulled" / "large").read_bytes() == LARGE
    assert told(run, "log", "position", archive, done["position"], *elsewhere_flags)["position"] == restored["position"]
    offsets = told(run, "log", "position", archive, "0:1", *elsewhere_flags)["offsets"]
    assert offsets == "0:1"


def test_an_archive_of_one_package_has_no_byte_of_another(
    run: Run, packages: list[str], tmp_path: Path, embedded_settings: Settings, elsewhere_flags: list[str]
) -> None:
    archive = tmp_path / "one.archive"
    done = told(run, "log", "export", archive, "--blobs", "--package", packages[1])
    assert done["only_packages"] == [packages[1]]
    assert (done["events"], done["blob_bytes"]) == (5, len(b"second"))
    told(run, "log", "import", archive, "--blobs", *elsewhere_flags)
    run("pull", packages[1], tmp_path / "pulled", *elsewhere_flags)
    assert {path.name: path.read_bytes() for path in (tmp_path / "pulled").iterdir()} == {
        "b": b"second",
        "c": b"second",
        "empty": b"",
    }
    assert told(run, "verify", "--bytes", *elsewhere_flags)["violation_count"] == 0


def test_bytes_that_are_lost_are_named_and_no_file_is_left(
    run: Run, packages: list[str], tmp_path: Path, embedded_settings: Settings
) -> None:
    key = content_key(blake3(LARGE).digest())
    (Path(embedded_settings.blobs_url.removeprefix("file:")) / key).unlink()
    failed = run("log", "export", tmp_path / "all.archive", "--blobs", code=1)
    assert "file 'large' cannot be exported" in failed.stderr
    assert not list(tmp_path.glob("all.archive*"))
    run("log", "export", tmp_path / "all.archive")
    without = run("log", "import", tmp_path / "all.archive", "--blobs", code=2)
    assert "has no blobs: leave --blobs out" in without.stderr


def test_what_is_not_there_or_no_archive_is_said(run: Run, packages: list[str], tmp_path: Path) -> None:
    assert "no.archive: No such file" in run("log", "check", tmp_path / "no.archive", code=1).stderr
    (tmp_path / "text").write_text("a text that is longer than what archives end with")
    assert "is no archive of a log" in run("log", "import", tmp_path / "text", code=1).stderr
    assert "is no package id" in run("log", "export", tmp_path / "x", "--package", "7", code=2).stderr
    assert "PARTITION:OFFSET" in run("log", "copy", "a", "b", "--skip", "7", code=2).stderr
    assert "topics are copied" in run("log", "copy", "a", "b", code=2).stderr


def test_the_log_has_these_commands() -> None:
    commands = main.commands["log"].commands  # type: ignore[attr-defined] # it is a group
    assert set(commands) == {"skip", "accept-loss", "export", "import", "check", "position", "copy", "compare"}
