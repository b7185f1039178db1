"""The command line in the test's process, in a separate folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from services.cli import main
from services.config import Settings

Run = Callable[..., Result]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file `.env`, no embedded parts and no interrupted pushes of the folder and user that the tests run as."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state home"))


@pytest.fixture
def run(embedded_settings: Settings, elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command on embedded parts of the test's own, and holds it to its exit code (`code`)."""
    for name, value in embedded_settings.environment().items():
        monkeypatch.setenv(name, value)

    def invoke(*arguments: str | Path, code: int = 0) -> Result:
        done = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert done.exit_code == code, done.output
        return done

    return invoke
