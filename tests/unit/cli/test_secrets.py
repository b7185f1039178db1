"""No secret of the settings is shown by failing commands, in logs, in texts of objects, or in the process list."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from ingest_gateway import siblings
from services.cli import main
from services.config import PREFIX, Settings
from services.log.kafka.connection import KafkaSettings
from services.runtime.processes import Command

SECRETS = {name: f"{name}-nobody-sees" for name in ("sasl", "key", "s3", "access", "views", "internal", "state")}
OPTIONS = {"security.protocol": "ssl", "sasl.password": SECRETS["sasl"], "ssl.key.pem": SECRETS["key"]}
ENVIRONMENT = {
    "LOG_URL": "kafka://127.0.0.1:1/x",
    "KAFKA_OPTIONS": json.dumps(OPTIONS),
    "BLOBS_URL": "s3+http://127.0.0.1:1/bucket",
    "S3_ACCESS_KEY": SECRETS["access"],
    "S3_SECRET_KEY": SECRETS["s3"],
    "VIEWS_URL": f"postgresql+asyncpg://ada:{SECRETS['views']}@127.0.0.1:1/views",
    "INTERNAL_SECRET": SECRETS["internal"],
    "STATE_KEY": SECRETS["state"],
    "LISTEN": "127.0.0.1:0",
}


def no_secret(text: str) -> bool:
    """Whether none is in the text."""
    return not any(secret in text for secret in SECRETS.values())


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(PREFIX + name, value)


@pytest.mark.parametrize("more", [(), ("--json",)])
@pytest.mark.parametrize(
    "command", ["doctor", "migrate", "gateway", "serve", "projector", "status", "packages", "verify"]
)
def test_a_command_that_fails_shows_none(command: str, more: tuple[str, ...], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    # The client refuses the key, which is no PEM, so that no command waits for a broker.
    done = CliRunner().invoke(main, [command, *more])
    assert done.exit_code in (1, 2)
    assert done.output != ""
    assert no_secret(done.output + caplog.text + repr(done.exception))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--s3-secret-key", SECRETS["s3"]),
        ("--s3-access-key", SECRETS["access"]),
        ("--internal-secret", SECRETS["internal"]),
        ("--state-key", SECRETS["state"]),
        ("--views-url", ENVIRONMENT["VIEWS_URL"]),
        ("--views-url", f"postgresql+asyncpg://127.0.0.1/views?password={SECRETS['views']}"),
        ("--kafka-options", ENVIRONMENT["KAFKA_OPTIONS"]),
        ("--kafka-options", SECRETS["sasl"]),
    ],
)
def test_a_flag_that_holds_one_is_refused(flag: str, value: str) -> None:
    done = CliRunner().invoke(main, ["doctor", flag, value])
    assert done.exit_code == 2
    assert f"{flag} holds a secret, and other users can see flags" in done.output
    assert no_secret(done.output)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--views-url", "postgresql+asyncpg://ada@[::1]:1/views"),
        ("--kafka-options", '{"security.protocol": "ssl", "ssl.ca.location": "ca.pem"}'),
    ],
)
def test_a_flag_that_holds_none_is_taken(flag: str, value: str) -> None:
    assert "holds a secret" not in CliRunner().invoke(main, ["packages", flag, value]).output


@pytest.mark.parametrize("command", ["gateway", "serve", "projector"])
def test_a_process_that_runs_long_writes_none_into_a_core_dump(command: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))
    try:
        assert CliRunner().invoke(main, [command]).exit_code in (1, 2)
        assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 0
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)


def test_no_object_shows_one() -> None:
    settings = Settings.from_env()
    assert no_secret(repr(settings) + str(settings) + repr(KafkaSettings.of(settings)))


async def test_no_process_gets_one_in_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Command] = []

    async def keep(commands: list[Command], *_: object, **__: object) -> int:
        seen.extend(commands)
        return 0

    monkeypatch.setattr(siblings, "run_all", keep)
    with socket.socket() as listener:
        await siblings.run_processes(Settings.from_env(), "gateway", 2, listener, asyncio.Event())
    assert len(seen) == 2
    assert no_secret(str([command.arguments for command in seen]))
