"""The oracle finds every kind of damage in its list, and nothing in undamaged data."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from blake3 import blake3

from artifact_store.events import Event, FileIngested, PackageCreated, PackageFinalized
from artifact_store.registry import Registry
from schemas.codec import decode, encode
from services.config import Settings
from services.core import decide
from services.registry import open_registry
from services.verify import Progress, Report
from services.verify import verify as verify_parts
from services.views.projections import PROJECTIONS
from services.wiring import open_blobs, open_log, open_views

Damage = Callable[[Event], Event]


async def fill(registry: Registry) -> UUID:
    package = await registry.create_package("run", "lab", "sample", "report", metadata={"k": 1})
    await registry.ingest_file(package, "a", "text/plain", b"first")
    await registry.ingest_file(package, "b", "text/plain", b"second")
    await registry.finalize_package(package)
    return package


async def test_a_package_that_holds_a_path_as_file_and_folder_is_whole(
    embedded_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_registry(embedded_settings) as registry:
        package = await registry.create_package("run", "lab", "sample", "report")
        with monkeypatch.context() as before_the_rule:
            before_the_rule.setattr(decide, "_check_tree", lambda *_: None)
            for path in ("a", "a/b"):
                await registry.ingest_file(package, path, "text/plain", b"content")
        await registry.finalize_package(package)
        await registry.get_package(package)
    assert not (await verify(embedded_settings)).violations


@pytest.fixture
async def whole(embedded_settings: Settings) -> Settings:
    async with open_registry(embedded_settings) as registry:
        package = await fill(registry)
        await registry.get_package(package)
        await registry.create_package("open", "lab", "sample", "scratch")
    return embedded_settings


async def verify(settings: Settings, *, check_bytes: bool = False, progress: Progress | None = None) -> Report:
    log, blobs, views = open_log(settings), open_blobs(settings), open_views(settings)
    try:
        return await verify_parts(log, blobs, views, check_bytes=check_bytes, progress=progress)
    finally:
        await views.close()
        await blobs.close()
        await log.close()


def log_file(settings: Settings) -> Path:
    return Path(settings.log_url.removeprefix("sqlite:///"))


def rewrite(settings: Settings, sequence: int, damage: Damage) -> None:
    """Change the event of this number of the finalized package behind the log's back."""
    with closing(sqlite3.connect(log_file(settings))) as file, file:
        rows = file.execute("SELECT offset, value FROM events").fetchall()
        finalized = {decode(v).package_id for _, v in rows if isinstance(decode(v).payload, PackageFinalized)}
        for offset, value in rows:
            event = decode(value)
            if event.package_id in finalized and event.sequence == sequence:
                file.execute("UPDATE events SET value = ? WHERE offset = ?", (encode(damage(event)), offset))


def kinds(report: Report) -> set[str]:
    return {violation.kind for violation in report.violations}


async def test_a_whole_registry_is_clean(whole: Settings) -> None:
    seen: list[int] = []
    report = await verify(whole, check_bytes=True, progress=lambda r: seen.append(r.events))
    assert report.clean, report.violations
    assert (report.events, report.packages, report.files, report.manifests) == (5, 2, 2, 1)
    assert report.bytes == len(b"first") + len(b"second")
    assert set(report.views) == set(PROJECTIONS)
    assert seen[-1] == 5


def _created(event: Event, **changes: object) -> Event:
    assert isinstance(event.payload, PackageCreated)
    return replace(event, payload=replace(event.payload, **changes))  # type: ignore[arg-type] # any field


def _file(event: Event, **changes: object) -> Event:
    assert isinstance(event.payload, FileIngested)
    return replace(event, payload=replace(event.payload, **changes))  # type: ignore[arg-type] # any field


def _finalized(event: Event, **changes: object) -> Event:
    assert isinstance(event.payload, PackageFinalized)
    return replace(event, payload=replace(event.payload, **changes))  # type: ignore[arg-type] # any field


@pytest.mark.parametrize(
    ("sequence", "damage", "kind"),
    [
        (2, lambda e: replace(e, actor="eve"), "chain"),
        (2, lambda e: _file(e, media_type="text/html"), "manifest-address"),
        (1, lambda e: _created(e, name="other"), "manifest-address"),
        (4, lambda e: _finalized(e, manifest=b"\xa0"), "manifest"),
    ],
)
async def test_damage_to_an_event_is_named(whole: Settings, sequence: int, damage: Damage, kind: str) -> None:
    """Every kind of damage has its own test in tests/unit/verify/test_damage.py."""
    rewrite(whole, sequence, damage)
    report = await verify(whole)
    assert kind in kinds(report)


@pytest.mark.parametrize("offset", [0, 1])
async def test_an_event_that_went_missing_is_named(whole: Settings, offset: int) -> None:
    with closing(sqlite3.connect(log_file(whole))) as file, file:
        file.execute("DELETE FROM events WHERE offset = ?", (offset,))
    report = await verify(whole)
    assert "gone" in kinds(report)
    assert any(f"at offset {offset} is gone" in violation.detail for violation in report.violations)


async def test_a_whole_package_that_went_missing_is_named(whole: Settings) -> None:
    async with open_registry(whole) as registry:
        await registry.create_package("last", "lab", "sample", "scratch")
    with closing(sqlite3.connect(log_file(whole))) as file, file:
        (package,) = file.execute("SELECT package_id FROM events WHERE offset = 4").fetchone()
        assert file.execute("DELETE FROM events WHERE package_id = ?", (package,)).rowcount == 1
    assert kinds(await verify(whole)) == {"gone", "view-position"}


async def test_bytes_that_are_no_event_are_named(whole: Settings) -> None:
    with closing(sqlite3.connect(log_file(whole))) as file, file:
        file.execute("UPDATE events SET value = x'00' WHERE offset = 2")
    assert "undecodable" in kinds(await verify(whole))


async def test_a_missing_a_short_and_a_changed_blob_are_named(whole: Settings) -> None:
    folder = Path(whole.blobs_url.removeprefix("file:"))
    blobs = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size in (5, 6))
    assert len(blobs) == 2
    blobs[0].chmod(0o600)
    blobs[0].write_bytes(b"x")
    assert kinds(await verify(whole)) == {"blob-damaged"}
    blobs[0].write_bytes(b"x" * (5 if blobs[0].name == blake3(b"first").hexdigest() else 6))
    assert (await verify(whole)).clean, "without reading bytes, lengths are all that is seen"
    assert kinds(await verify(whole, check_bytes=True)) == {"blob-damaged"}
    assert kinds(await verify(whole)) == {"blob-missing"}, "it was set aside"


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE artifact_files SET media_type = 'text/html' WHERE relative_path = 'a'",
        "DELETE FROM storage_locations",
        "UPDATE artifact_packages SET metadata = '{}'",
    ],
)
async def test_a_view_that_is_not_what_the_log_says_is_named(whole: Settings, damage: str) -> None:
    with closing(sqlite3.connect(whole.views_url.removeprefix("sqlite+aiosqlite:///"))) as file, file:
        assert file.execute(damage).rowcount > 0
    assert kinds(await verify(whole)) == {"view"}
