"""Settings: their sources, refusals, and that no secret is ever shown."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pydantic
import pytest

from artifact_store.errors import ConfigurationError
from services.config import PREFIX, SecretStr, Settings, table

SECRET = "w0rd-that-nobody-sees"

ANOTHER = 65_534
"""A user that this process does not run as."""


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without a `.env` file, and no setting in the environment."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_keyword_arguments_read_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + "LISTEN", "127.0.0.1:1")
    assert Settings().listen == "127.0.0.1:8080"
    assert Settings.from_env().listen == "127.0.0.1:1"


def test_the_environment_wins_over_the_file_and_arguments_win_over_both(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (nowhere / "settings").write_text(f"{PREFIX}LISTEN=127.0.0.1:1\n{PREFIX}S3_REGION=file\n")
    monkeypatch.setenv(PREFIX + "ENV_FILE", "settings")
    monkeypatch.setenv(PREFIX + "LISTEN", "127.0.0.1:2")
    found = Settings.from_env()
    assert (found.listen, found.s3_region) == ("127.0.0.1:2", "file")
    assert Settings.from_env(listen="127.0.0.1:3").listen == "127.0.0.1:3"


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_file_that_nobody_named_is_refused_when_it_has_settings(nowhere: Path, mode: int) -> None:
    """A pulled package may bring it, and belongs to the user who pulled it."""
    (nowhere / ".env").write_text(f"{PREFIX}KAFKA_OPTIONS={SECRET}\n")
    (nowhere / ".env").chmod(mode)
    with pytest.raises(ConfigurationError, match=rf"\.env sets {PREFIX}KAFKA_OPTIONS.*--env-file") as caught:
        Settings.from_env()
    assert SECRET not in caught.value.detail
    assert Settings.from_env(env_file="/dev/null").kafka_options == {}


def test_a_file_of_another_program_is_nothing_to_us(nowhere: Path) -> None:
    (nowhere / ".env").write_bytes(b"OTHERS=1\n\xff broken '\n")
    assert Settings.from_env().listen == "127.0.0.1:8080"


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_named_file_that_others_may_write_is_refused(nowhere: Path, mode: int) -> None:
    (nowhere / "settings").write_text(f"{PREFIX}LISTEN=127.0.0.1:1\n")
    (nowhere / "settings").chmod(mode)
    with pytest.raises(ConfigurationError, match=r"others may write it.*chmod go-w"):
        Settings.from_env(env_file="settings")


def test_a_named_file_of_another_user_is_refused(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (nowhere / "settings").write_text(f"{PREFIX}LISTEN=127.0.0.1:1\n")
    if os.geteuid() == 0:
        os.chown("settings", ANOTHER, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: ANOTHER)
    with pytest.raises(ConfigurationError, match="settings is not read, because it belongs to another user"):
        Settings.from_env(env_file="settings")


def test_a_named_file_must_be_there(nowhere: Path) -> None:
    with pytest.raises(ConfigurationError, match="settings cannot be read: No such file"):
        Settings.from_env(env_file="settings")


def test_a_process_of_our_own_needs_no_file_again(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (nowhere / ".env").write_text(f"{PREFIX}LISTEN=127.0.0.1:1\n")
    for name, value in Settings.from_env(env_file=".env").environment().items():
        monkeypatch.setenv(name, value)
    (nowhere / ".env").unlink()  # as a pipe is gone once it was read
    assert Settings.from_env().listen == "127.0.0.1:1"


def test_a_file_cannot_name_another(nowhere: Path) -> None:
    (nowhere / "settings").write_text(f"{PREFIX}ENV_FILE=more\n")
    with pytest.raises(ConfigurationError, match="ENV_FILE"):
        Settings.from_env(env_file="settings")


def test_a_file_that_is_no_text_is_refused_by_its_name(nowhere: Path) -> None:
    (nowhere / ".env").write_bytes(f"{PREFIX}S3_SECRET_KEY={SECRET}\xff\n".encode("latin-1"))
    with pytest.raises(ConfigurationError, match=r"\.env") as caught:
        Settings.from_env(env_file=".env")
    assert SECRET not in caught.value.detail


@pytest.mark.parametrize(
    "line", [f"{PREFIX}URL {SECRET}", f"{PREFIX}BOGUS", f"export {PREFIX}S3_REGION", f"{PREFIX}URL='{SECRET}"]
)
def test_a_line_of_the_file_that_cannot_be_read_is_named_and_not_shown(nowhere: Path, line: str) -> None:
    (nowhere / ".env").write_text(f"OTHERS\n# {PREFIX}OLD\n\n\n{line}\nMORE=1\n")
    with pytest.raises(ConfigurationError, match=r"line 5 of the file \.env") as caught:
        Settings.from_env(env_file=".env")
    assert SECRET not in caught.value.detail


def test_a_value_in_the_file_is_taken_as_it_stands(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = f'{PREFIX}S3_REGION="a${{HOME}}b"  # kept\r\nexport {PREFIX}LISTEN=127.0.0.1:1\r\n'
    (nowhere / ".env").write_bytes(b"\xef\xbb\xbf" + text.encode())  # as some editors save it
    found = Settings.from_env(env_file=".env")
    assert (found.s3_region, found.listen) == ("a${HOME}b", "127.0.0.1:1")


@pytest.mark.parametrize("name", ["LISTEM", "listen", "URL_"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + name, "x")
    with pytest.raises(ConfigurationError, match=PREFIX + name) as caught:
        Settings.from_env()
    assert PREFIX + "LISTEN" in caught.value.detail


def test_an_unknown_keyword_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="LISTEM"):
        Settings(listem="x")


@pytest.mark.parametrize(
    ("name", "value"),
    [("KAFKA_PARTITIONS", SECRET), ("KAFKA_OPTIONS", f'{{"sasl.password": "{SECRET}"'), ("INSECURE", SECRET)],
)
def test_a_value_that_breaks_its_rule_is_named_and_not_shown(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(ConfigurationError, match=PREFIX + name) as caught:
        Settings.from_env()
    assert SECRET not in caught.value.detail


def test_no_secret_is_in_the_text_of_settings() -> None:
    found = Settings(
        views_url=f"postgresql+asyncpg://ada:{SECRET}@localhost/views",
        kafka_options={"sasl.password": SECRET},
        s3_secret_key=SECRET,
        internal_secret=SECRET,
    )
    assert SECRET not in repr(found) + str(found)


def test_a_secret_may_come_as_that_of_pydantic() -> None:
    settings = Settings(internal_secret=pydantic.SecretStr(SECRET))
    assert settings.internal_secret == SecretStr(SECRET)
    assert SECRET not in repr(settings)


def test_the_newline_that_a_file_of_a_secret_ends_in_is_no_part_of_it() -> None:
    settings = Settings(internal_secret="correct horse\n", s3_secret_key="battery staple \r\n")
    assert settings.internal_secret is not None
    assert settings.internal_secret.get_secret_value() == "correct horse"
    assert settings.s3_secret_key.get_secret_value() == "battery staple"
    with pytest.raises(ConfigurationError, match=r"INTERNAL_SECRET: .*cannot be sent") as caught:
        Settings(internal_secret="correct\nhorse")
    assert "horse" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"kafka_partitions": "0"}, "KAFKA_PARTITIONS: it must be 1 or more, at most 1024"),
        ({"kafka_partitions": "six"}, "KAFKA_PARTITIONS: it must be a whole number"),
        ({"max_uploads": 1.5}, "MAX_UPLOADS: it must be a whole number"),
        ({"kafka_options": "[]"}, "KAFKA_OPTIONS: it must be a JSON object"),
        ({"kafka_options": {"a": None}}, "KAFKA_OPTIONS: it must be a JSON object"),
        ({"insecure": "perhaps"}, "INSECURE: it must be 1 or 0"),
        ({"listen": None}, "LISTEN: it must be text"),
        ({"state_dir": None}, "STATE_DIR: "),
    ],
)
def test_a_value_that_breaks_its_rule_is_refused_by_the_rule(values: dict[str, object], rule: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Settings(**values)
    assert rule in caught.value.detail


def test_every_wrong_value_is_named_at_once() -> None:
    with pytest.raises(ConfigurationError, match="MAX_UPLOADS") as caught:
        Settings(max_uploads=0, kafka_partitions=0)
    assert "KAFKA_PARTITIONS" in caught.value.detail


def test_values_are_read_by_their_types(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"INSECURE": "1", "MAX_UPLOADS": "7", "KAFKA_OPTIONS": '{"linger.ms": 5}', "STATE_DIR": "/state", "URL": ""}
    for name, value in given.items():
        monkeypatch.setenv(PREFIX + name, value)
    found = Settings.from_env()
    assert (found.insecure, found.max_uploads, found.kafka_options) == (True, 7, {"linger.ms": 5})
    assert (found.state_dir, found.url) == (Path("/state"), None)


def test_a_changed_copy_keeps_the_rest_and_the_rules() -> None:
    found = replace(Settings(s3_secret_key=SECRET, max_uploads=7), listen="127.0.0.1:1")
    assert (found.listen, found.max_uploads, found.s3_secret_key.get_secret_value()) == ("127.0.0.1:1", 7, SECRET)
    with pytest.raises(ConfigurationError, match="MAX_UPLOADS"):
        replace(found, max_uploads=0)


def test_the_environment_of_settings_gives_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(insecure=True, kafka_options={"a": 1.5}, internal_secret=SECRET, state_dir=Path("/state"))
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings.from_env() == settings


def test_the_page_of_settings_is_current() -> None:
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == table(), "run `make docs`"
