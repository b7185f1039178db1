"""The command line's arguments, how quickly it starts, and its answers to wrong usage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from services.cli import main
from services.cli.command import Invocation, SettingOption, metadata_of, table
from services.config import PREFIX, Settings, declarations

pytestmark = pytest.mark.usefixtures("elsewhere")

COMMANDS = {
    *("push", "add", "finalize", "pull", "packages", "show", "manifest", "usage", "tail"),
    *("serve", "gateway", "projector", "webhooks", "migrate"),
    "subscriptions",
    *("login", "logout", "whoami", "tokens", "policy"),
    *("replay", "digest", "verify", "parked", "log", "status", "doctor"),
}


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(main, list(arguments), env=environment)


def test_every_command_of_the_contract_is_there_and_takes_json_and_the_settings() -> None:
    assert set(main.commands) == COMMANDS
    for command in main.commands.values():
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"--json", "--quiet", *(f"--{name.replace('_', '-')}" for name in declarations())} <= options
        assert command.help


def test_every_setting_is_a_flag_and_no_other() -> None:
    flags = [option.name for option in main.params if isinstance(option, SettingOption)]
    assert flags == [f"setting_{name}" for name in declarations()]
    help_text = run("--help").output
    assert all(f"--{name.replace('_', '-')}" in help_text for name in declarations())


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; from services.cli import main\n"
        "try: main(['push', '--help'])\n"
        "finally: sys.stderr.write(' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"aiohttp", "aiosqlite", "asyncpg", "blake3", "cbor2", "confluent_kafka", "fastavro", "minio", "pydantic"}
    heavy |= {"opentelemetry", "prometheus_client"}
    assert heavy & set(done.stderr.split()) == set()
    assert "rich" not in done.stderr.split()
    assert "--retention-class" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["packages", "--no-such-flag"],
        ["packages", "--limit", "0"],
        ["push", "."],
        ["push", ".", "--name", "n"],
        ["show"],
        ["show", "no-id"],
        ["show", "blake3:00"],
        ["tail", "--since", "no-position"],
        ["manifest", "--format", "xml", "x"],
        ["replay", "no-such-projection"],
        ["digest", "no-such-projection"],
        ["projector", "no-such-projection"],
        ["packages", "--kafka-partitions", "many"],
        ["packages", "--log-url", "ftp://x"],
        ["packages", "--log-url", "kafka://localhost:1/x"],
        ["packages", "--url", "not a url"],
        ["packages", "--url", "http://[::1"],
        ["packages", "--url", "http://127.0.0.1:99999"],
        ["status", "--log-url", "kafka://[::1:9092/x"],
        ["packages", "--blobs-url", "file://[x"],
        ["packages", "--views-url", "sqlite+aiosqlite:///views.db?timeout=abc"],
        ["gateway", "--insecure", "--listen", "a..b:1"],
        ["gateway", "--insecure", "--listen", "a..b:1", "--processes", "2", "--log-url", "kafka://localhost:1/x"],
        ["gateway", "--insecure", "--listen", f"{'a' * 300}:1"],
    ],
)
def test_wrong_usage_is_exit_code_2_and_says_what_is_wrong(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    as_json = run(*arguments, "--json")
    assert as_json.exit_code == 2
    assert as_json.stdout == ""
    problem = json.loads(as_json.stderr)
    assert {"type", "title", "detail"} <= set(problem)
    assert problem["type"].startswith("urn:artifact-store:problem:")


def test_an_unknown_setting_in_the_environment_is_exit_code_2() -> None:
    done = run("packages", **{f"{PREFIX}LOGURL": "x"})
    assert done.exit_code == 2
    assert f"unknown setting {PREFIX}LOGURL" in done.stderr


def test_brokers_may_be_named_by_ipv6_addresses_in_any_place() -> None:
    done = run("packages", "--log-url", "kafka://localhost:1,[::1]:1/x")
    assert "a Kafka log is written through a gateway" in done.stderr


@pytest.mark.parametrize(
    ("flag", "value", "part"),
    [
        ("--log-url", "kafka://[::1:9092/x", "log"),
        ("--blobs-url", "file://[x", "blobs"),
        ("--views-url", "postgresql+asyncpg://ada@localhost:1/x?sslmode=require", "views"),
        ("--url", "http://127.0.0.1:99999", "gateway"),
    ],
)
def test_an_address_that_cannot_be_read_is_a_finding_of_doctor(flag: str, value: str, part: str) -> None:
    done = run("doctor", flag, value, "--json")
    assert done.exit_code == 1
    assert "hunter2" not in done.output
    wrong = [finding for finding in json.loads(done.stdout)["findings"] if not finding["ok"]]
    assert [finding["part"] for finding in wrong] == [part]
    assert PREFIX in wrong[0]["cause"]


def test_a_path_that_is_not_utf_8_is_shown_by_the_codes_of_what_is_not(tmp_path: Path) -> None:
    name = os.fsdecode(b"a \xff")
    (tmp_path / name).mkdir()  # which is no file
    where = ("--log-url", f"sqlite:///{tmp_path}/{name}")
    as_text, as_json = run("doctor", *where), run("doctor", *where, "--json")
    assert (as_text.exit_code, as_json.exit_code) == (1, 1)
    assert "/a \\udcff: " in as_text.stdout
    causes = [finding["cause"] or "" for finding in json.loads(as_json.stdout)["findings"]]
    assert any(f"/{name}: " in cause for cause in causes)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_table_shows_what_is_not_utf_8_by_its_code(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    written = BytesIO()
    stream = TextIOWrapper(written, encoding="utf-8")
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stdout", stream)
    table(["path"], [[os.fsdecode(b"a \xff")]])
    stream.flush()
    assert b"a \\udcff" in written.getvalue()


def test_an_error_that_nobody_foresaw_is_a_problem_document_too_and_shows_no_text_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: Invocation) -> Settings:
        raise RuntimeError("hunter2")

    monkeypatch.setattr(Invocation, "settings", fail)
    done = run("packages", "--json")
    assert (done.exit_code, done.stdout) == (1, "")
    problem = json.loads(done.stderr)
    assert problem["type"] == "urn:artifact-store:problem:internal"
    assert f"RuntimeError in {__file__}" in problem["detail"]
    assert "hunter2" not in done.stderr
    assert isinstance(run("packages").exception, RuntimeError)  # people get the traceback


def test_a_flag_overrides_the_environment_and_the_command_the_group(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    run(
        "--blobs-url",
        f"file:{tmp_path}/two/blobs",
        "migrate",
        "--blobs-url",
        f"file:{tmp_path}/three/blobs",
        **{f"{PREFIX}BLOBS_URL": f"file:{tmp_path}/one/blobs"},
    )
    assert [name for name in ("one", "two", "three") if (tmp_path / name / "blobs").exists()] == ["three"]


def test_a_secret_never_reaches_a_message() -> None:
    done = run("packages", "--log-url", "kafka://h:1/x", "--kafka-options", '{"sasl.password": [1, "hunter2"]}')
    assert done.exit_code == 2
    assert "hunter2" not in done.output


def test_the_version_is_said() -> None:
    assert run("--version").output.startswith("artifact-store 0.")


def test_without_a_command_it_shows_what_there_is() -> None:
    done = run()
    assert done.exit_code == 2
    assert "push" in done.output


@pytest.mark.parametrize(
    ("pairs", "document", "expected"),
    [
        (("a=b", "c=d=e", "f="), None, {"a": "b", "c": "d=e", "f": ""}),
        (("n=1",), '{"n": 2, "m": [true]}', {"n": "1", "m": [True]}),
        ((), None, {}),
    ],
)
def test_metadata_comes_from_pairs_over_a_document(
    pairs: tuple[str, ...], document: str | None, expected: dict[str, Any]
) -> None:
    assert metadata_of(pairs, document) == expected


def test_a_metadata_document_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "about.json").write_text('{"k": 1.5}', encoding="utf-8")
    assert metadata_of((), str(tmp_path / "about.json")) == {"k": 1.5}


@pytest.mark.parametrize(
    ("pairs", "document"),
    [(("a",), None), (("=b",), None), (("a=1", "a=2"), None), ((), "{"), ((), "missing.json"), ((), "[1]")],
)
def test_metadata_that_cannot_be_read_is_wrong_usage(pairs: tuple[str, ...], document: str | None) -> None:
    with pytest.raises(click.BadParameter):
        metadata_of(pairs, document)


def test_metadata_that_is_nested_without_end_is_wrong_usage() -> None:
    with pytest.raises(click.BadParameter, match="nested too deeply"):
        metadata_of((), '{"a":' + "[" * 100_000)
