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
"""More than a pack takes: it is exported and imported in pieces."""


def told(run: Run, *arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*arguments, "--json").stdout)
    return found


def pushed(run: Run, tree: Path, files: dict[str, bytes]) -> str:
    """The id of a package of these files."""
    tree.mkdir()
    for name, content in files.items():
        (tree / name).write_bytes(content)
    return str(told(run, "push", tree, *ABOUT)["package_id"])


@pytest.fixture
def elsewhere_flags(tmp_path: Path) -> list[str]:
    """Flags that name other, empty parts."""
    folder = tmp_path / "elsewhere"
    return [
        *("--log-url", f"sqlite:///{folder}/log.db", "--blobs-url", f"file:{folder}/blobs"),
        *("--views-url", f"sqlite+aiosqlite:///{folder}/views.db"),
    ]


def test_a_registry_is_restored_from_one_file(run: Run, tmp_path: Path, elsewhere_flags: list[str]) -> None:
    package = pushed(run, tmp_path / "tree", {"a": b"first", "b": b"second", "large": LARGE, "empty": b""})
    archive = tmp_path / "all.archive"
    done = told(run, "log", "export", archive, "--blobs")
    assert (done["packages"], done["bytes"]) == (1, archive.stat().st_size)
    assert done["bytes"] > done["blob_bytes"] > len(LARGE)
    checked = told(run, "log", "check", archive)
    assert checked.items() <= done.items()
    restored = told(run, "log", "import", archive, "--blobs", *elsewhere_flags)
    assert restored["events"] == done["events"]
    assert (restored["blobs"], restored["digest"]) == (done["blobs"], done["digest"])
    run("migrate", *elsewhere_flags)
    assert told(run, "show", package, *elsewhere_flags) == told(run, "show", package)
    for projection in ("registry", "retention", "usage"):
        same = (told(run, "digest", projection)["digest"], told(run, "digest", projection, *elsewhere_flags)["digest"])
        assert same[0] == same[1]
    verified = told(run, "verify", "--bytes", *elsewhere_flags)
    assert (verified["violation_count"], verified["healed"], verified["files"]) == (0, 0, 4)
    run("pull", package, tmp_path / "pulled", *elsewhere_flags)
    assert (tmp_path / "pulled" / "large").read_bytes() == LARGE
    assert told(run, "log", "position", archive, done["position"], *elsewhere_flags)["position"] == restored["position"]
    offsets = told(run, "log", "position", archive, "0:1", *elsewhere_flags)["offsets"]
    assert offsets == "0:1"


def test_an_archive_of_one_package_has_no_byte_of_another_and_none_that_is_lost(
    run: Run, tmp_path: Path, embedded_settings: Settings, elsewhere_flags: list[str]
) -> None:
    lost = random.Random(2).randbytes(300_000)  # too large for a pack
    pushed(run, tmp_path / "other", {"a": b"first", "lost": lost})
    package = pushed(run, tmp_path / "tree", {"b": b"second", "c": b"second", "empty": b""})
    (Path(embedded_settings.blobs_url.removeprefix("file:")) / content_key(blake3(lost).digest())).unlink()
    failed = run("log", "export", tmp_path / "all.archive", "--blobs", code=1)
    assert "file 'lost' cannot be exported" in failed.stderr
    assert not list(tmp_path.glob("all.archive*"))
    archive = tmp_path / "one.archive"
    done = told(run, "log", "export", archive, "--blobs", "--package", package)
    assert done["only_packages"] == [package]
    assert (done["events"], done["blob_bytes"]) == (5, len(b"second"))
    told(run, "log", "import", archive, "--blobs", *elsewhere_flags)
    run("pull", package, tmp_path / "pulled", *elsewhere_flags)
    pulled = {path.name: path.read_bytes() for path in (tmp_path / "pulled").iterdir()}
    assert pulled == {"b": b"second", "c": b"second", "empty": b""}
    assert told(run, "verify", "--bytes", *elsewhere_flags)["violation_count"] == 0


def test_what_is_not_there_or_no_archive_is_said(run: Run, tmp_path: Path) -> None:
    run("migrate")
    run("log", "export", tmp_path / "empty.archive")
    without = run("log", "import", tmp_path / "empty.archive", "--blobs", code=2)
    assert "has no blobs: leave --blobs out" in without.stderr
    assert "no.archive: No such file" in run("log", "check", tmp_path / "no.archive", code=1).stderr
    (tmp_path / "text").write_text("a text that is longer than what archives end with")
    assert "is no archive of a log" in run("log", "import", tmp_path / "text", code=1).stderr
    assert "is not a package id" in run("log", "export", tmp_path / "x", "--package", "7", code=2).stderr
    assert "PARTITION:OFFSET" in run("log", "copy", "a", "b", "--skip", "7", code=2).stderr
    assert "topics are copied" in run("log", "copy", "a", "b", code=2).stderr


def test_the_log_has_these_commands() -> None:
    commands = main.commands["log"].commands  # type: ignore[attr-defined] # it is a group
    assert set(commands) == {"skip", "accept-loss", "export", "import", "check", "position", "copy", "compare"}
