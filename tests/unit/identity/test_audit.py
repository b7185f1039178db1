"""The audit stream: its contents, and that it neither slows nor stops anything."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from artifact_store.errors import ConfigurationError
from services.identity.audit import MAX_TEXT, Audit


def lost(metrics: CollectorRegistry) -> float | None:
    return metrics.get_sample_value("artifact_store_audit_lost_total")


def ask(audit: Audit, **changes: Any) -> None:
    audit.record(**{"principal": "ci:job-7", "action": "GET /x", "allowed": True, "client": "10.1.2.3", **changes})


async def test_records_are_lines_that_the_owner_alone_reads(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for _ in range(2):  # a second process appends
        async with Audit(path, clock=lambda: 1) as audit:
            ask(audit, status=200, target="/x\n\u202e" + "y" * 5_000, package_id=None)
            ask(audit, principal=None, allowed=False)
    assert path.stat().st_mode & 0o777 == 0o600
    first, second, *_ = lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 4
    assert first["target"] == ("/x\n\u202e" + "y" * 5_000)[:MAX_TEXT]
    assert (first["time"], first["status"], "package_id" in first) == ("1970-01-01T00:00:00.000001Z", 200, False)
    assert (second["principal"], second["allowed"], second["client"]) == (None, False, "10.1.2.3")


async def test_a_file_that_was_renamed_away_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.jsonl"
    written = threading.Semaphore(0)
    write = os.write

    def tell(descriptor: int, data: bytes) -> int:
        done = write(descriptor, data)
        written.release()
        return done

    monkeypatch.setattr(os, "write", tell)
    async with Audit(path) as audit:
        ask(audit, action="before")
        assert written.acquire(timeout=5)
        path.rename(tmp_path / "audit.1")
        ask(audit, action="after")
    assert "before" in (tmp_path / "audit.1").read_text()
    assert json.loads(path.read_text())["action"] == "after"


async def test_a_disk_that_stands_still_loses_records_and_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, stuck, proceed = CollectorRegistry(), threading.Event(), threading.Event()
    write = os.write

    def stand_still(descriptor: int, data: bytes) -> int:
        stuck.set()
        assert proceed.wait(30)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", stand_still)
    async with Audit(tmp_path / "audit.jsonl", metrics, max_waiting=10) as audit:
        ask(audit)
        assert stuck.wait(5)
        for _ in range(25):
            ask(audit)
        assert lost(metrics) == 15
        proceed.set()
    assert len((tmp_path / "audit.jsonl").read_text().splitlines()) == 11


async def test_a_full_disk_loses_records_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, metrics, write, tries = tmp_path / "audit.jsonl", CollectorRegistry(), os.write, threading.Semaphore(0)
    left = [5]

    def fill_up(descriptor: int, data: bytes) -> int:
        try:
            if left:
                return write(descriptor, data[: left.pop()])
            return write(descriptor, data)
        finally:
            tries.release()

    monkeypatch.setattr(os, "write", fill_up)
    async with Audit(path, metrics) as audit:
        ask(audit, action="torn")
        assert tries.acquire(timeout=5)
        ask(audit, action="whole")
    assert lost(metrics) == 1
    torn, whole = path.read_text().splitlines()
    assert torn == '{"tim'
    assert json.loads(whole)["action"] == "whole"
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


async def test_without_a_file_nothing_happens() -> None:
    metrics = CollectorRegistry()
    async with Audit(None, metrics, max_waiting=1) as audit:
        for _ in range(3):
            ask(audit)
    assert lost(metrics) == 0


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="ARTIFACT_STORE_AUDIT_FILE"):
        Audit(tmp_path / "none" / "audit.jsonl")
