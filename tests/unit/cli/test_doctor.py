"""The view of `doctor` and `status` on an installation, and the report of `migrate` on views of another log."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from services.cli import main
from services.cli.command import say_wrapped
from services.cli.doctor import buckets_differ
from services.cli.status import endpoint, troubles_of
from services.config import Settings
from services.runtime.file_system import FileLock
from services.runtime.tls import ends
from services.views.database import Views
from services.views.engine.checkpoints import read_position
from services.views.engine.generations import begin_build
from services.views.projections import PROJECTIONS
from tests.certificates import Authority
from tests.integration.processes import command_environment, run_command
from tests.unit.cli.conftest import Run
from tests.unit.cli.test_embedded import ABOUT


def doctor(run: Run, code: int = 0) -> dict[str, Any]:
    """The findings, by part."""
    found = json.loads(run("doctor", "--json", code=code).stdout)["findings"]
    return {finding["part"]: finding for finding in found}


def test_the_views_are_found_whatever_their_url_says_behind_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(main, ["migrate"]).exit_code == 0
    done = CliRunner().invoke(main, ["doctor", "--views-url", "sqlite+aiosqlite:///./var/views.db?timeout=5", "--json"])
    causes = {finding["part"]: finding["cause"] for finding in json.loads(done.stdout)["findings"]}
    assert causes["views"] == "sqlite+aiosqlite:///./var/views.db"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("kafka://one:9092,two:9092/artifacts", "kafka://one:9092,two:9092/artifacts"),
        ("postgresql+asyncpg://ada:hunter2@db/artifacts?ssl=require", "postgresql+asyncpg://db/artifacts"),
        ("postgresql+asyncpg://ada:hun/ter?2@db/artifacts", "postgresql+asyncpg://db/artifacts"),
    ],
)
def test_an_endpoint_is_shown_without_what_is_secret_in_its_url(url: str, shown: str) -> None:
    assert endpoint(url) == shown


def test_doctor_imports_what_is_heavy_before_the_time_of_its_looks_runs(
    embedded_settings: Settings, tmp_path: Path
) -> None:
    """On a machine that has too much to do that takes longer than a part may take to answer."""
    code = """
import sys
from services.cli import doctor, main
looked, at_first = doctor._looked, []
def look(*given):
    at_first.append(set(sys.modules))
    return looked(*given)
doctor._looked = look
try:
    main(["doctor"])
finally:
    print(sorted({name for name in set(sys.modules) - at_first[0]}))
"""
    environment = command_environment(embedded_settings, None, tmp_path)
    assert run_command(embedded_settings, "migrate").returncode == 0
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    *_, later = done.stdout.splitlines()
    assert "ok     views" in done.stdout, done.stderr
    assert later == "[]"


def test_text_on_a_terminal_is_80_columns_wide_and_a_command_stays_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    command = f"`kafka-configs.sh --bootstrap-server {'broker:9092,' * 5} --alter`"
    say_wrapped(f"{'something is wrong ' * 6}: {command} mends it", first="WRONG  log: ", indent=7)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("WRONG  log: something is wrong")
    assert f"       {command}" in lines
    assert max(len(line) for line in lines if command not in line) <= 80


@pytest.fixture
def filled(run: Run, tmp_path: Path, embedded_settings: Settings) -> Settings:
    """Embedded parts with a package in them."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a.txt").write_bytes(b"a file")
    run("push", tree, *ABOUT)
    run("packages")
    return embedded_settings


def test_views_of_another_log_are_named_by_doctor_status_and_migrate(run: Run, filled: Settings) -> None:
    assert json.loads(run("migrate", "--json").stdout)["replay"] == []
    Path(filled.log_url.removeprefix("sqlite:///")).unlink()
    migrated = run("migrate", "--json")
    assert json.loads(migrated.stdout)["replay"] == list(PROJECTIONS)
    assert "registry was folded from log" in migrated.stderr
    assert "registry was folded from log" in doctor(run, code=1)["projections"]["cause"]
    assert "registry was folded from log" in run("status").stdout
    for name in PROJECTIONS:
        run("replay", name)
    assert doctor(run)["projections"]["ok"]
    assert json.loads(run("migrate", "--json").stdout)["replay"] == []


async def begun(settings: Settings) -> None:
    """What a replay leaves that ends as soon as it has begun."""
    views = Views(settings.views_url)
    try:
        async with views.reading() as connection:
            position = await read_position(connection, PROJECTIONS["registry"])
        assert position is not None
        await begin_build(views, PROJECTIONS["registry"], position.log)
    finally:
        await views.close()


def test_a_replay_that_ended_early_is_told_from_one_that_runs(run: Run, filled: Settings) -> None:
    asyncio.run(begun(filled))
    left = json.loads(run("status", "--json").stdout)["projections"][0]["building"]
    assert not left["running"]
    assert "`artifact-store replay registry` continues it" in doctor(run, code=1)["projections"]["cause"]
    lock = FileLock(Path(f"{filled.views_url.partition(':///')[2]}.registry.building.lock"))
    assert lock.take()
    try:
        assert json.loads(run("status", "--json").stdout)["projections"][0]["building"]["running"]
        assert "is running" in run("status").stdout
        assert doctor(run)["projections"]["ok"]
    finally:
        lock.release()


def test_status_names_endpoints_and_columns_also_in_a_pipe(run: Run, filled: Settings) -> None:
    lines = run("status").stdout.splitlines()
    assert lines[0] == f"log    {filled.log_url}"
    assert "projection\tevents behind\tpackages parked\tprojectors" in lines
    assert "registry\t0\t0\t-" in lines


@pytest.mark.parametrize(("days", "said"), [(400, None), (3, "ends in 3 days"), (-1, "ended at ")])
def test_doctor_names_certificates_that_end_soon(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int, said: str | None
) -> None:
    until = datetime.now(UTC) + timedelta(days=days, hours=1)
    certificate, key = Authority(tmp_path / "here", ends=until).issue("gateway", "127.0.0.1")
    monkeypatch.setenv("ARTIFACT_STORE_TLS_CERT", str(certificate))
    monkeypatch.setenv("ARTIFACT_STORE_TLS_KEY", str(key))
    found = doctor(run, code=0 if said is None else 1)["certificates"]
    assert found["ok"] is (said is None)
    assert (said or "1 files") in found["cause"]
    assert "ARTIFACT_STORE_TLS_CERT" in found["cause"] or said is None


def test_a_file_of_authorities_ends_with_the_last_of_them(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    old = Authority(tmp_path, "old", ends=now + timedelta(days=1)).certificate
    new = Authority(tmp_path, "new", ends=now + timedelta(days=30)).certificate
    both = tmp_path / "both.pem"
    both.write_bytes(old.read_bytes() + new.read_bytes())
    assert ends(both) == ends(new) > ends(old)


def test_all_that_a_gateway_says_is_wrong_with_it_is_named() -> None:
    well = {
        "trouble": None,
        "components": {"log": None, "views": None},
        "clock_skew_seconds": 0.4,
        "state_free_bytes": 5 << 30,
        "certificates": {"ARTIFACT_STORE_PEER_CERT": time.time() + 90 * 86_400},
    }
    assert troubles_of(well) == []
    ill = {
        "components": {"log": None, "views": "no answer within 3 s"},
        "clock_skew_seconds": -30.0,
        "state_free_bytes": 5 << 20,
        "certificates": {"ARTIFACT_STORE_PEER_CERT": 0.0},
    }
    found = troubles_of(well | ill)
    for part in ("views: no answer within 3 s", "30 s behind", "5 MiB free", "ARTIFACT_STORE_PEER_CERT cannot be read"):
        assert any(part in trouble for trouble in found), part


def test_gateways_that_keep_blobs_in_other_buckets_than_the_rest_are_named() -> None:
    alike = [{"url": "http://a", "bucket": "artifacts"}, {"url": "http://b", "bucket": "artifacts"}]
    silent = {"url": "http://old", "bucket": None}  # its release does not say
    assert buckets_differ([*alike, silent]) is None
    said = buckets_differ([*alike, silent, {"url": "http://c", "bucket": "staging"}])
    assert said is not None
    assert "artifacts: http://a, http://b; staging: http://c" in said
    assert "ARTIFACT_STORE_BLOBS_URL" in said
