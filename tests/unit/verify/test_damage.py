"""The oracle finds every kind of damage in its list by the check that is meant for it, and nothing else.

A check without a damage fails here, and so does one that is not in docs/verify.md.
"""

from __future__ import annotations

import ast
import inspect
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from schemas.codec import encode
from services.log.sqlite import SqliteLog
from services.log.sqlite.file import create_file
from services.verify import KINDS
from tests.memory_log import MemoryLog
from tests.unit.verify.damages import DAMAGES, Act, damage
from tests.verify_scene import CONTENT, Scene, whole_scene

ROOT = Path(__file__).resolve().parents[3]

NAMING = frozenset({"add", "_complain"})
"""What the oracle's code names a violation with."""


def embedded(scene: Scene) -> Path:
    """Put the events into the file of an embedded log, and let the oracle read that."""
    path = scene.folder / "log.db"
    create_file(path)
    with closing(sqlite3.connect(path)) as file, file:
        for offset, event in enumerate(scene.events):
            row = offset, event.package_id.bytes, event.sequence, event.command_id.bytes, encode(event)
            file.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?)", row)
    scene.file, scene.events = SqliteLog(path), []
    return path


def in_the_file(scene: Scene, change: str) -> None:
    with closing(sqlite3.connect(embedded(scene))) as file, file:
        assert file.execute(change).rowcount == 1


@damage("undecodable")
def a_value_in_the_file_is_a_number(scene: Scene) -> None:
    in_the_file(scene, "UPDATE events SET value = 7 WHERE offset = 4")


@damage("key")
def a_package_id_in_the_file_is_none(scene: Scene) -> None:
    in_the_file(scene, "UPDATE events SET package_id = x'00' WHERE offset = 2")


@damage("listed")
def an_event_is_listed_under_another_number(scene: Scene) -> None:
    in_the_file(scene, "UPDATE events SET sequence = 30 WHERE offset = 2")


@damage("log-file")
def an_event_is_missing_from_the_index(scene: Scene) -> None:
    path = embedded(scene)
    with closing(sqlite3.connect(path)) as file:
        file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page,) = file.execute("SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_events_1'").fetchone()
        (size,) = file.execute("PRAGMA page_size").fetchone()
    with path.open("r+b") as damaged:
        damaged.seek((page - 1) * size + 3)  # how many entries the page has, 2 bytes (SQLite, "B-tree Pages")
        damaged.write(bytes([0, len(CONTENT) + 1]))


async def folded(scene: Scene) -> Path:
    scene.append()
    await scene.fold()
    scene.events = []
    return scene.folder / "views.db"


@damage("view")
async def a_row_of_a_view_is_another(scene: Scene) -> None:
    with closing(sqlite3.connect(await folded(scene))) as file, file:
        assert file.execute("UPDATE artifact_files SET media_type = 'text/html'").rowcount > 0


@damage("view")
async def a_row_of_a_view_has_an_id_that_is_none(scene: Scene) -> None:
    with closing(sqlite3.connect(await folded(scene))) as file, file:
        file.execute("UPDATE artifact_packages SET id = 'no id'")


@damage("view")
async def a_text_of_a_view_is_no_text(scene: Scene) -> None:
    with closing(sqlite3.connect(await folded(scene))) as file, file:
        file.execute("UPDATE artifact_packages SET name = CAST(x'ff' AS TEXT)")


@damage("view")
async def a_digest_in_a_view_is_a_text(scene: Scene) -> None:
    with closing(sqlite3.connect(await folded(scene))) as file, file:
        file.execute("UPDATE artifact_files SET blake3 = 'no digest'")


@damage("view")
async def an_id_in_a_view_is_a_number(scene: Scene) -> None:
    with closing(sqlite3.connect(await folded(scene))) as file, file:
        file.execute("UPDATE projection_generations SET log = 1.5 WHERE projection = 'registry'")


@damage("view")
async def a_view_with_rows_says_that_it_was_folded_from_no_log(scene: Scene) -> None:
    with closing(sqlite3.connect(await folded(scene))) as file, file:
        file.execute("UPDATE projection_generations SET log = NULL WHERE projection = 'registry'")


@damage("view-position")
async def a_page_of_a_view_is_damaged(scene: Scene) -> None:
    with closing(sqlite3.connect(await folded(scene))) as file:
        file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page,) = file.execute("SELECT rootpage FROM sqlite_master WHERE name = 'artifact_files'").fetchone()
        (size,) = file.execute("PRAGMA page_size").fetchone()
    with (scene.folder / "views.db").open("r+b") as damaged:
        damaged.seek((page - 1) * size)
        damaged.write(b"\xff" * size)


@damage("view-position")
async def a_view_was_folded_from_another_log(scene: Scene) -> None:
    events = scene.events
    await folded(scene)
    scene.log, scene.events = MemoryLog(), events


@damage("parked")
async def a_view_stopped_following_a_package(scene: Scene) -> None:
    with closing(sqlite3.connect(await folded(scene))) as file, file:
        file.execute(
            "INSERT INTO parked_packages SELECT generation, 0, 'a', projection, NULL, 0, 1, 'why'"
            " FROM projection_generations WHERE projection = 'registry'"
        )


@pytest.fixture
async def scene(tmp_path: Path) -> Scene:
    return await whole_scene(tmp_path)


@pytest.mark.parametrize("check_bytes", [False, True])
async def test_a_whole_registry_is_clean(scene: Scene, check_bytes: bool) -> None:
    scene.append()
    await scene.fold()
    report = await scene.verify(check_bytes=check_bytes)
    assert report.violations == []
    assert (report.events, report.packages, report.files, report.manifests, report.blobs) == (5, 1, 3, 1, 3)
    assert report.bytes == (sum(map(len, CONTENT.values())) if check_bytes else None)
    assert report.views.keys() >= {"registry", "retention"}


@pytest.mark.parametrize(
    ("kind", "act", "check_bytes"),
    [pytest.param(kind, act, check_bytes, id=f"{kind}: {name}") for kind, name, act, check_bytes in DAMAGES],
)
async def test_damage_is_caught_by_the_check_that_is_meant_for_it(
    scene: Scene, kind: str, act: Act, check_bytes: bool
) -> None:
    done = act(scene)
    if inspect.isawaitable(done):
        await done
    scene.append()
    report = await scene.verify(check_bytes=check_bytes)
    assert {violation.kind for violation in report.violations} == {kind}
    assert report.violation_count == len(report.violations)


def test_every_check_has_a_damage() -> None:
    assert {kind for kind, _, _, _ in DAMAGES} == set(KINDS)


def test_every_kind_is_found_by_one_check_of_the_code() -> None:
    """So that a second check under a known name cannot go without a damage of its own."""
    found: Counter[str] = Counter()
    for path in (ROOT / "services" / "verify").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in NAMING:
                texts = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
                found.update(text for text in texts if isinstance(text, str) and text in KINDS)
    several = {"blob-damaged": 5, "view": 3, "view-position": 2}  # see test_blobs.py too
    assert found == {**dict.fromkeys(KINDS, 1), **several}


def test_the_documentation_names_every_kind() -> None:
    guide = (ROOT / "docs" / "verify.md").read_text(encoding="utf-8")
    assert [kind for kind in KINDS if f"`{kind}`" not in guide] == []
