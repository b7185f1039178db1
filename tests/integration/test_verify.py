"""The oracle finds every kind of damage that it knows, and nothing where there is none."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from schemas.codec import decode, encode
from schemas.events import Event, FileIngested, PackageCreated, PackageFinalized
from services.config import Settings
from services.registry import Registry, open_registry
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
        (2, lambda e: replace(e, sequence=7), "sequence"),
        (2, lambda e: replace(e, previous_digest=bytes(32)), "chain"),
        (2, lambda e: replace(e, actor="eve"), "chain"),
        (2, lambda e: replace(e, created_at=0), "created-at"),
        (2, lambda e: replace(e, event_id=uuid4()), "event-id"),
        (2, lambda e: replace(e, payload_digest=bytes(32)), "payload-digest"),
        (2, lambda e: replace(e, command_index=1), "command-order"),
        (2, lambda e: replace(e, command_count=2), "torn-command"),
        (2, lambda e: _file(e, size_bytes=6), "payload-digest"),
        (2, lambda e: _file(e, size_bytes=6), "receipt"),
        (2, lambda e: _file(e, relative_path="b"), "duplicate-path"),
        (2, lambda e: _file(e, relative_path="../a"), "path"),
        (2, lambda e: _file(e, file_id=uuid4()), "file-id"),
        (2, lambda e: _file(e, media_type="text/html"), "manifest-address"),
        (1, lambda e: _created(e, metadata="[]"), "metadata"),
        (1, lambda e: _created(e, name="other"), "manifest-address"),
        (4, lambda e: _finalized(e, manifest=b"\xa0"), "manifest"),
        (4, lambda e: _finalized(e, manifest_key="blobs/x"), "manifest"),
        (4, lambda e: _finalized(e, file_count=3), "manifest-totals"),
    ],
)
async def test_damage_to_an_event_is_named(whole: Settings, sequence: int, damage: Damage, kind: str) -> None:
    rewrite(whole, sequence, damage)
    report = await verify(whole)
    assert kind in kinds(report)


async def test_an_event_that_went_missing_is_named(whole: Settings) -> None:
    with closing(sqlite3.connect(log_file(whole))) as file, file:
        file.execute("DELETE FROM events WHERE offset = 1")
    assert {"sequence", "chain"} <= kinds(await verify(whole))


async def test_bytes_that_are_no_event_are_named(whole: Settings) -> None:
    with closing(sqlite3.connect(log_file(whole))) as file, file:
        file.execute("UPDATE events SET value = x'00' WHERE offset = 2")
    assert "undecodable" in kinds(await verify(whole))


async def test_a_missing_a_short_and_a_changed_blob_are_named(whole: Settings) -> None:
    folder = Path(whole.blobs_url.removeprefix("file:"))
    blobs = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size in (5, 6))
    assert len(blobs) == 2
    blobs[0].chmod(0o600)
    blobs[0].write_bytes(b"x" * blobs[0].stat().st_size)
    assert (await verify(whole)).clean, "without reading bytes, lengths are all that is seen"
    assert kinds(await verify(whole, check_bytes=True)) == {"blob-bytes"}
    blobs[0].write_bytes(b"x")
    assert kinds(await verify(whole)) == {"blob"}
    blobs[0].unlink()
    assert kinds(await verify(whole)) == {"blob"}


async def test_an_event_that_claims_other_digests_for_the_blob_of_another_is_named(whole: Settings) -> None:
    with closing(sqlite3.connect(log_file(whole))) as file:
        payloads = [decode(value).payload for (value,) in file.execute("SELECT value FROM events ORDER BY offset")]
    first = next(payload for payload in payloads if isinstance(payload, FileIngested))
    rewrite(whole, 3, lambda e: _file(e, receipt=first.receipt))
    assert "blob-bytes" in kinds(await verify(whole, check_bytes=True))


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
