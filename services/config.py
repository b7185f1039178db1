"""Settings: environment, `.env` file or keyword arguments; an unknown `ARTIFACT_STORE_*` name is an error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Self

from dotenv.parser import Binding, parse_stream
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from artifact_store.errors import ConfigurationError

PREFIX = "ARTIFACT_STORE_"
_TIB = 1 << 40
_KIB = 1 << 10


class Settings(BaseModel):
    """Everything that can be set. Each field is `ARTIFACT_STORE_` plus its name in upper case in the environment.

    Keyword arguments take the names without the prefix and read no environment; `from_env` reads it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True)

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
        """Read `.env` in the current folder, then the environment, then `overrides` (None is skipped); last one wins.

        Raises:
            ConfigurationError: an unknown `ARTIFACT_STORE_*` name, a value that breaks its rule, or `.env` is no text
                or holds a line that cannot be read.
        """
        found = {**_of_file(Path(".env")), **os.environ}
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
        """The environment variables that stand for these settings, secrets included: for a process of our own."""
        found = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, SecretStr):
                value = value.get_secret_value()
            if value is not None and value != "":
                found[PREFIX + name.upper()] = json.dumps(value) if isinstance(value, dict | bool) else str(value)
        return found


def _of_file(path: Path) -> dict[str, str]:
    """The names and values of a `.env` file, as they stand there; none when there is no such file."""
    found: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in parse_stream(file):
                name, value = line.key, line.value
                if line.error or (value is None and name is not None and name.startswith(PREFIX)):
                    raise ConfigurationError(f"line {_number(line)} of the file .env in this folder is not NAME=VALUE")
                if name is not None and value is not None:
                    found[name] = value
    except (FileNotFoundError, IsADirectoryError):
        return {}
    except UnicodeDecodeError:
        raise ConfigurationError("the file .env in this folder is not UTF-8: save it in that encoding") from None
    return found


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
