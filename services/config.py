"""Settings: environment, a named file, or keyword arguments; an unknown `ARTIFACT_STORE_*` name is an error.

Settings decide where secrets go and whom a server trusts. So a file `.env` that merely lies in the current folder is
never read: a package that was pulled, or an archive that was unpacked, may have brought it.
"""

from __future__ import annotations

import json
import os
import stat
from io import StringIO
from pathlib import Path
from typing import Any, Self

from dotenv.parser import Binding, parse_stream
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from artifact_store.errors import ConfigurationError

PREFIX = "ARTIFACT_STORE_"
_ENV_FILE = PREFIX + "ENV_FILE"
_TIB = 1 << 40
_KIB = 1 << 10


class Settings(BaseModel):
    """Everything that can be set. Each field is `ARTIFACT_STORE_` plus its name in upper case in the environment.

    Keyword arguments take the names without the prefix and read no environment; `from_env` reads it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True)

    env_file: Path | None = None

    log_url: str = "sqlite:///./var/log.db"
    kafka_partitions: int = Field(6, ge=1, le=1024)
    kafka_replication_factor: int = Field(3, ge=1)
    kafka_min_insync_replicas: int = Field(2, ge=1)
    kafka_options: dict[str, str | int | float | bool] = Field(default_factory=dict, repr=False)

    blobs_url: str = "file:./var/blobs"
    s3_access_key: str = ""
    s3_secret_key: SecretStr = SecretStr("")
    s3_region: str = "us-east-1"

    views_url: str = Field("sqlite+aiosqlite:///./var/views.db", repr=False)
    schema_registry_url: str | None = None

    url: str | None = None
    listen: str = "127.0.0.1:8080"
    allowed_hosts: tuple[str, ...] = ()
    insecure: bool = False
    internal_listen: str = "127.0.0.1:0"
    internal_url: str | None = None
    internal_secret: SecretStr | None = None
    state_dir: Path = Path("./var/state")

    max_file_bytes: int = Field(5 * _TIB, ge=0)
    max_files_per_package: int = Field(100_000, ge=1)
    max_metadata_bytes: int = Field(64 * _KIB, ge=2)
    max_connections: int = Field(2048, ge=1)
    max_uploads: int = Field(256, ge=1)

    @field_validator("kafka_options", mode="before")
    @classmethod
    def _options_from_json(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _hosts_of_a_list(cls, value: Any) -> Any:
        return [host.strip() for host in value.split(",") if host.strip()] if isinstance(value, str) else value

    @field_validator("allowed_hosts")
    @classmethod
    def _hosts_alone(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any("/" in host or "*" in host or "@" in host for host in value):
            raise ValueError("it must be a list of HOST or HOST:PORT, separated by commas")
        return value

    @field_validator("internal_secret", "s3_access_key", "s3_secret_key", mode="before")
    @classmethod
    def _secret_of_a_file(cls, value: Any) -> Any:
        """Without the newline that a file of a secret mostly ends in: it can be in no header."""
        if not isinstance(value, str):
            return value
        value = value.strip()
        if not value.isprintable():
            raise ValueError("it holds a character that cannot be sent")
        return value

    def __init__(self, **values: Any) -> None:
        """Raises ConfigurationError naming every value that is missing, unknown or out of range; never the value."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigurationError(_explain(error)) from None

    @classmethod
    def from_env(cls, **overrides: Any) -> Self:
        """Read the file that `env_file` names, then the environment, then `overrides` (None is skipped); last one wins.

        Raises:
            ConfigurationError: an unknown `ARTIFACT_STORE_*` name, or a value that breaks its rule. The named file
                cannot be read, others may write it, or it is not lines of NAME=VALUE. No file is named, and `.env` in
                the current folder has settings.
        """
        named = overrides.get("env_file") or os.environ.get(_ENV_FILE)
        if not named:
            _refuse_unnamed(Path(".env"))
        found = {**(_of_file(Path(named)) if named else {}), **os.environ}
        values: dict[str, Any] = {}
        unknown: list[str] = []
        for name, value in found.items():
            if not name.startswith(PREFIX):
                continue
            field = name.removeprefix(PREFIX).lower()
            if field not in cls.model_fields or name != name.upper():
                unknown.append(name)
            elif value != "":
                values[field] = value
        if unknown:
            raise ConfigurationError(f"unknown setting {', '.join(sorted(unknown))}: known names are {_known(cls)}")
        values.update({k: v for k, v in overrides.items() if v is not None})
        return cls(**values)

    def environment(self) -> dict[str, str]:
        """The environment variables that stand for these settings, secrets included: for a process of our own.

        That process reads no file: these are all settings, and a pipe can be read only once.
        """
        found = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, SecretStr):
                value = value.get_secret_value()
            if isinstance(value, tuple):
                value = ",".join(value)
            if value is not None and value != "":
                found[PREFIX + name.upper()] = json.dumps(value) if isinstance(value, dict | bool) else str(value)
        if self.env_file is not None:
            found[_ENV_FILE] = os.devnull
        return found


def _of_file(path: Path) -> dict[str, str]:
    """The names and values of the file, as they stand there."""
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            if stat.S_ISREG(about.st_mode) and about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise ConfigurationError(f"the file {path} is not read, because others may write it: chmod go-w {path}")
            if stat.S_ISREG(about.st_mode) and about.st_uid not in (0, os.geteuid()):
                raise ConfigurationError(f"the file {path} is not read, because it belongs to another user")
            text = file.read().decode("utf-8-sig")
    except OSError as error:
        raise ConfigurationError(f"the file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"the file {path} is not UTF-8: save it in that encoding") from None
    found: dict[str, str] = {}
    for line in parse_stream(StringIO(text, newline="")):
        name, value = line.key, line.value
        if line.error or (value is None and name is not None and name.startswith(PREFIX)):
            raise ConfigurationError(f"line {_number(line)} of the file {path} is not NAME=VALUE")
        if name == _ENV_FILE:
            raise ConfigurationError(f"line {_number(line)} of the file {path} sets {name}: a file cannot name another")
        if name is not None and value is not None:
            found[name] = value
    return found


def _refuse_unnamed(path: Path) -> None:
    """Raises ConfigurationError when a file that nobody named has settings: its owner may think that they hold."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
    except OSError:
        return
    names = {line.key for line in parse_stream(StringIO(text)) if line.key is not None and line.key.startswith(PREFIX)}
    if names:
        raise ConfigurationError(
            f"the file {path} sets {', '.join(sorted(names))} and is not read: it may have come with a package. "
            f"If it is yours, name it by --env-file {path} or {_ENV_FILE}; --env-file {os.devnull} goes on without it"
        )


def _number(line: Binding) -> int:
    """That of the line in its file, from 1; blank ones before it belong to it for the parser."""
    text = line.original.string
    return line.original.line + text[: len(text) - len(text.lstrip())].count("\n")


def _known(cls: type[Settings]) -> str:
    return ", ".join(PREFIX + name.upper() for name in cls.model_fields)


def _explain(error: ValidationError) -> str:
    lines = [
        f"{PREFIX}{'.'.join(str(part) for part in e['loc']).upper()}: {e['msg']}"
        for e in error.errors(include_input=False)
    ]
    return "; ".join(lines)
