"""Log and views never share a SQLite file, because the views would write to the log without its lock."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from artifact_store.errors import ConfigurationError
from services.cli import main
from services.config import Settings
from services.log.sqlite import file
from services.views.database import Views
from services.wiring import open_views


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """A log whose events are still in its WAL, in the current folder."""
    path = tmp_path / "log.db"
    file.create_file(path)
    with closing(file.open_file(path)):
        yield path


@pytest.mark.parametrize("views", ["./var/one.db", "var/../var/one.db", "link/one.db", "{cwd}/var/one.db"])
def test_settings_that_name_one_file_for_log_and_views_are_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, views: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "var").mkdir()
    (tmp_path / "link").symlink_to("var")
    views_url = f"sqlite+aiosqlite:///{views.format(cwd=tmp_path)}"
    with pytest.raises(ConfigurationError, match="VIEWS_URL"):
        open_views(Settings(log_url="sqlite:///./var/one.db", views_url=views_url))

    monkeypatch.setenv("ARTIFACT_STORE_LOG_URL", "sqlite:///./var/one.db")
    monkeypatch.setenv("ARTIFACT_STORE_VIEWS_URL", views_url)
    done = CliRunner().invoke(main, ["migrate"])
    assert (done.exit_code, "ARTIFACT_STORE_VIEWS_URL" in done.stderr) == (2, True), done.output
    assert list((tmp_path / "var").iterdir()) == []


async def test_views_in_the_log_s_folder_are_taken(embedded_settings: Settings) -> None:
    views = open_views(embedded_settings)
    await views.migrate()
    await views.check()
    await views.close()


async def test_views_refuse_the_file_of_a_log_and_leave_it_alone(log: Path) -> None:
    before = hashlib.sha256(log.read_bytes()).digest()
    views = Views(f"sqlite+aiosqlite:///{log}")
    for use in (views.migrate, views.create_missing, views.check):
        with pytest.raises(ConfigurationError, match="ARTIFACT_STORE_VIEWS_URL"):
            await use()
    with pytest.raises(ConfigurationError):
        async with views.writing():
            pass
    await views.close()
    assert hashlib.sha256(log.read_bytes()).digest() == before
    for thread in [thread for thread in threading.enumerate() if thread.daemon]:  # each connection has one
        thread.join(10)
        assert not thread.is_alive()


def test_a_command_whose_views_url_names_another_log_ends_with_exit_code_2(
    log: Path, embedded_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARTIFACT_STORE_LOG_URL", f"sqlite:///{log.parent}/other.db")
    monkeypatch.setenv("ARTIFACT_STORE_BLOBS_URL", embedded_settings.blobs_url)
    monkeypatch.setenv("ARTIFACT_STORE_VIEWS_URL", f"sqlite+aiosqlite:///{log}")
    for command in (["migrate"], ["digest", "registry"]):
        done = CliRunner().invoke(main, command)
        assert (done.exit_code, "ARTIFACT_STORE_VIEWS_URL" in done.stderr) == (2, True), done.output
