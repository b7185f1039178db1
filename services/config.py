"""Settings: environment, a named file, or keyword arguments; an unknown `ARTIFACT_STORE_*` name is an error.

Settings decide where secrets go and whom a server trusts. So a file `.env` in the current folder is never read unless
it is named: it may have come with a package that was pulled or an archive that was unpacked.

A setting is declared once, as a field of `Settings`: its type, default, limits and description. The environment
variable, the flag of the command line and the row in docs/settings.md (`make docs`) all come from there.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from io import StringIO
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from artifact_store.errors import ConfigurationError

if TYPE_CHECKING:
    from dotenv.parser import Binding

    from services.runtime.addresses import ListenAddress

PREFIX = "ARTIFACT_STORE_"
_ENV_FILE = PREFIX + "ENV_FILE"
_TIB = 1 << 40
_KIB = 1 << 10

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class SecretStr:
    """Secret text, which neither `str` nor `repr` shows. Empty text is false."""

    text: str = field(repr=False)

    def get_secret_value(self) -> str:
        """The text."""
        return self.text

    def __len__(self) -> int:
        return len(self.text)


def setting(
    default: Any, read: Callable[[Any], Value], description: str, *, secret: Callable[[str], bool] | None = None
) -> Value:
    """Declare a setting.

    Args:
        default: the value if nobody sets it, or a text for `read`.
        read: converts a text to the value, and returns a value unchanged; raises ValueError without the text in it.
        description: one or more sentences for users.
        secret: whether a given text is secret or contains a secret; None for a setting that never does. `repr` leaves
            such a setting out, and a flag with such a text is refused, because other users can see it.
    """
    about = {"read": read, "description": description, "secret": secret}
    declared: Value = field(default=default, repr=secret is None, metadata=about)
    return declared


def text(value: Any) -> str:
    """Read text."""
    if not isinstance(value, str):
        raise ValueError("it must be text")
    return value


def switch(value: Any) -> bool:
    """Read true or false."""
    word = str(value).lower()
    if word not in (*_ON, *_OFF):
        raise ValueError("it must be 1 or 0, true or false, yes or no, on or off")
    return word in _ON


_ON = ("1", "true", "t", "yes", "y", "on")
_OFF = ("0", "false", "f", "no", "n", "off")


def one_of(*words: str) -> Callable[[Any], str]:
    """Read one of these words."""

    def read(value: Any) -> str:
        if (word := text(value).lower()) not in words:
            raise ValueError(f"it must be one of {', '.join(words)}")
        return word

    return read


def whole(least: int, most: int = sys.maxsize) -> Callable[[Any], int]:
    """Read a whole number from `least` to `most`."""

    def read(value: Any) -> int:
        try:
            number = int(value) if isinstance(value, str) else index(value)
        except (TypeError, ValueError):
            raise ValueError("it must be a whole number") from None
        if not least <= number <= most:
            raise ValueError(f"it must be {least} or more" + (f", at most {most}" if most < sys.maxsize else ""))
        return number

    return read


def header_text(value: Any) -> str:
    """Read text that is sent in a header. Removes the newline at the end that files with secrets usually have."""
    stripped = text(value).strip()
    if not stripped.isprintable():
        raise ValueError("it holds a character that cannot be sent")
    return stripped


def secret_text(value: Any) -> SecretStr:
    """Read text that is sent in a header and never shown. Takes pydantic's `SecretStr` as well."""
    given = getattr(value, "get_secret_value", None)
    return SecretStr(header_text(value if given is None else given()))


def options(value: Any) -> dict[str, str | int | float | bool]:
    """Read a JSON object of texts, numbers and booleans."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(found, dict) or not all(isinstance(value, str | int | float) for value in found.values()):
        raise ValueError("it must be a JSON object whose values are text, numbers or booleans")
    return dict(found)


def networks(value: Any) -> tuple[str, ...]:
    """Read networks in CIDR notation, separated by commas."""
    from ipaddress import ip_network

    found = tuple(text.strip() for text in value.split(",") if text.strip()) if isinstance(value, str) else tuple(value)
    try:
        return tuple(str(ip_network(text)) for text in found)
    except ValueError:
        raise ValueError("it must be a list of networks like 10.1.0.0/16, separated by commas") from None


def hosts(value: Any) -> tuple[str, ...]:
    """Read HOST or HOST:PORT, separated by commas."""
    found = tuple(host.strip() for host in value.split(",") if host.strip()) if isinstance(value, str) else tuple(value)
    if any("/" in host or "*" in host or "@" in host for host in found):
        raise ValueError("it must be a list of HOST or HOST:PORT, separated by commas")
    return found


def _always(_: str) -> bool:
    return True


def _in_url(url: str) -> bool:
    """Whether a URL may hold a password."""
    return ("@" in url and ":" in url.partition("://")[2].rpartition("@")[0]) or "passw" in url.lower()


_SECRET_OPTIONS = re.compile(r"passw|passphrase|secret|\.pem$|oauthbearer\.config$|jaas", re.IGNORECASE)


def _in_options(value: str) -> bool:
    """Whether client settings in JSON hold a secret."""
    try:
        return any(_SECRET_OPTIONS.search(name) for name in json.loads(value))
    except (ValueError, TypeError):
        return True


def address(value: Any) -> ListenAddress:
    """Read HOST:PORT."""
    from services.runtime.addresses import ListenAddress

    return value if isinstance(value, ListenAddress) else ListenAddress.parse(text(value))


PLAINTEXT = frozenset({"kafka", "s3", "postgresql", "schema-registry"})
"""The services that may be reached on other machines without TLS."""


def services_of(value: Any) -> tuple[str, ...]:
    """Read names of PLAINTEXT, separated by commas."""
    found = tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else tuple(value)
    if not PLAINTEXT.issuperset(found):
        raise ValueError(f"it must be a list of {', '.join(sorted(PLAINTEXT))}, separated by commas")
    return found


@dataclass(frozen=True, init=False)
class Settings:
    """All settings. The environment variable of a field is `ARTIFACT_STORE_` and its name in upper case.

    The constructor takes the fields as keyword arguments and ignores the environment; `from_env` reads it.
    `dataclasses.replace` makes a changed copy.
    """

    env_file: Path | None = setting(
        None,
        Path,
        "A file of settings, one `ARTIFACT_STORE_NAME=VALUE` per line. `.env` is read only when it is named here.",
    )

    log_url: str = setting(
        "sqlite:///./var/log.db", text, "The log: sqlite:///PATH or kafka://host:port[,host:port]/PREFIX."
    )
    kafka_partitions: int = setting(6, whole(1, 1024), "Partitions of the topic that `migrate` creates.")
    kafka_replication_factor: int = setting(3, whole(1), "Replicas that the topic must have.")
    kafka_min_insync_replicas: int = setting(2, whole(1), "Replicas that must have an event before it is acknowledged.")
    kafka_options: dict[str, str | int | float | bool] = setting(
        "{}", options, "More librdkafka client settings, as a JSON object.", secret=_in_options
    )

    blobs_url: str = setting(
        "file:./var/blobs", text, "The blob store: file:FOLDER, s3://host:port/BUCKET or s3+http://… without TLS."
    )
    s3_access_key: str = setting("", header_text, "Access key of the blob store.", secret=_always)
    s3_secret_key: SecretStr = setting("", secret_text, "Secret key of the blob store.", secret=_always)
    s3_region: str = setting("us-east-1", text, "Region of the blob store.")
    s3_public_url: str | None = setting(
        None,
        text,
        "https://HOST[:PORT] at which clients reach the bucket's store, to send large files straight to it.",
    )
    s3_public_access_key: str = setting(
        "",
        header_text,
        "Access key that signs clients' requests to that address. It needs no other right than to write below "
        "`uploads/`. Without it, gateways sign with their own key.",
        secret=_always,
    )
    s3_public_secret_key: SecretStr = setting(
        "", secret_text, "The secret key of ARTIFACT_STORE_S3_PUBLIC_ACCESS_KEY.", secret=_always
    )

    views_url: str = setting(
        "sqlite+aiosqlite:///./var/views.db",
        text,
        "The views: sqlite+aiosqlite:///PATH or postgresql+asyncpg://….",
        secret=_in_url,
    )
    schema_registry_url: str | None = setting(
        None,
        text,
        "A schema registry with Confluent's interface, http(s)://host:port. `migrate` registers the event schemas "
        "there. A topic that it creates then has Confluent's framing for good.",
        secret=_in_url,
    )

    plaintext: tuple[str, ...] = setting(
        "",
        services_of,
        "Which of `kafka`, `s3`, `postgresql` and `schema-registry` may be reached on other machines without TLS, "
        "separated by commas. Everyone on the way can then read and change what is sent.",
    )

    url: str | None = setting(
        None, text, "A gateway that client commands talk to instead of opening log, blobs and views themselves."
    )
    listen: str = setting("127.0.0.1:8080", text, "HOST:PORT to listen on.")
    tls_cert: Path | None = setting(None, Path, "The gateway's certificate (PEM). With it, the gateway speaks TLS.")
    tls_key: Path | None = setting(None, Path, "The key of that certificate (PEM).")
    tls_client_ca: Path | None = setting(
        None, Path, "Authorities (PEM). Every client of the gateway must then have a certificate from one of them."
    )
    metrics_listen: ListenAddress | None = setting(
        None,
        address,
        "HOST:PORT for /metrics, without TLS and tokens. A gateway then serves /metrics only there, and /healthz and "
        "/readyz there too. Several projectors take consecutive ports.",
    )
    allowed_hosts: tuple[str, ...] = setting(
        "",
        hosts,
        "Names by which clients reach a gateway: HOST or HOST:PORT, separated by commas. `localhost` always works on "
        "loopback.",
    )
    insecure: bool = setting(
        False,
        switch,
        "Listen beyond loopback without a policy or tokens: everyone who reaches the gateway may then do everything.",
    )
    internal_listen: str = setting("127.0.0.1:0", text, "HOST:PORT for commands that other gateways forward.")
    internal_url: str | None = setting(None, text, "The address at which other gateways reach this one.")
    internal_secret: SecretStr | None = setting(
        None,
        secret_text,
        "The secret that protects forwarded commands while gateways have no certificates.",
        secret=_always,
    )
    peer_cert: Path | None = setting(
        None, Path, "This gateway's certificate for other gateways, with the DNS name `artifact-store-gateway` (PEM)."
    )
    peer_key: Path | None = setting(None, Path, "The key of that certificate (PEM).")
    peer_ca: Path | None = setting(None, Path, "The authorities of the gateways' certificates (PEM).")
    state_dir: Path = setting("./var/state", Path, "Folder of the writers' disposable state.")
    state_key: SecretStr | None = setting(
        None,
        secret_text,
        "The secret that signs copies of that state in a bucket, the same for all gateways. Without it, "
        "ARTIFACT_STORE_INTERNAL_SECRET signs them. Without both, a bucket on another machine gets no copies, and none "
        "are read from it. It also signs the states of resumable uploads.",
        secret=_always,
    )

    log_level: str = setting(
        "info",
        one_of("debug", "info", "warning", "error"),
        "The lowest level of log lines that are written: debug, info, warning or error.",
    )
    log_format: str = setting(
        "text", one_of("text", "json"), "The form of log lines: `text`, or `json` for one JSON object per line."
    )

    policy: Path | None = setting(None, Path, "The policy file: who may do what (TOML).")
    tokens: Path | None = setting(None, Path, "The file of static tokens, which holds only their hashes.")
    audit_file: Path | None = setting(
        None, Path, "The file in which a gateway records who did what, one JSON object per line."
    )
    token_file: Path | None = setting(None, Path, "The file with the token that client commands send to the gateway.")
    ca: Path | None = setting(None, Path, "A PEM file of authorities that clients trust in addition to the system's.")

    webhook_allow: tuple[str, ...] = setting(
        "",
        networks,
        "Networks other than public ones to which webhooks may be sent, over http as well: CIDR, separated by commas.",
    )

    max_file_bytes: int = setting(5 * _TIB, whole(0), "The most bytes that a file may have.")
    max_files_per_package: int = setting(100_000, whole(1), "The most files that a package may have.")
    max_metadata_bytes: int = setting(64 * _KIB, whole(2), "The most bytes that a package's metadata may have.")
    quota_packages: int | None = setting(
        None,
        whole(1),
        "Packages that one principal may create in an hour through one gateway process.",
    )
    quota_bytes: int | None = setting(
        None, whole(1), "Bytes of request bodies that one principal may send in an hour through one gateway process."
    )
    quota_metadata_bytes: int | None = setting(
        None, whole(1), "Bytes of metadata that one principal may add in an hour through one gateway process."
    )
    quota_resumable_uploads: int | None = setting(
        None, whole(1), "Resumable uploads that one principal may begin in an hour through one gateway process."
    )
    quota_open_uploads: int | None = setting(
        None, whole(1), "Resumable uploads that one principal may hold open at a time at one gateway process."
    )
    max_connections: int = setting(
        2048, whole(1), "Connections that one gateway process takes, at most half of them from one address."
    )
    max_uploads: int = setting(
        256, whole(1), "Uploads that one gateway process takes at a time, at most half of them from one address."
    )

    def __init__(self, **values: Any) -> None:
        """Raises ConfigurationError, which names every unknown setting and every invalid one, without its value."""
        wrong = [f"{PREFIX}{name.upper()}: there is no such setting" for name in values.keys() - declarations().keys()]
        for name, declared in declarations().items():
            value = values.get(name, declared.default)
            try:
                if value is not None or declared.default is not None:
                    value = declared.metadata["read"](value)
            except (TypeError, ValueError) as error:
                wrong.append(f"{PREFIX}{name.upper()}: {error}")
            object.__setattr__(self, name, value)
        if wrong:
            raise ConfigurationError("; ".join(wrong))

    @classmethod
    def from_env(cls, **overrides: Any) -> Self:
        """Read the file that `env_file` names, then the environment, then `overrides` (None is skipped); last one wins.

        Raises:
            ConfigurationError: an unknown `ARTIFACT_STORE_*` name, or an invalid value. The named file cannot be read,
                others may write it, or it has lines other than NAME=VALUE. No file is named, but `.env` in the current
                folder has settings.
        """
        named = overrides.get("env_file") or os.environ.get(_ENV_FILE)
        if not named:
            _refuse_unnamed(Path(".env"))
        found = {**(_of_file(Path(named)) if named else {}), **os.environ}
        known = {PREFIX + name.upper(): name for name in declarations()}
        given = {name: value for name, value in found.items() if name.startswith(PREFIX)}
        if unknown := sorted(given.keys() - known.keys()):
            raise ConfigurationError(f"unknown setting {', '.join(unknown)}: known names are {', '.join(known)}")
        values: dict[str, Any] = {known[name]: value for name, value in given.items() if value != ""}
        values.update({name: value for name, value in overrides.items() if value is not None})
        return cls(**values)

    def certificates(self) -> dict[str, Path]:
        """The files of certificates and of authorities that are set, by the name of the setting."""
        names = ("tls_cert", "tls_client_ca", "peer_cert", "peer_ca", "ca")
        found = {f"{PREFIX}{name.upper()}": path for name in names if (path := getattr(self, name)) is not None}
        for name in ("ssl.certificate.location", "ssl.ca.location"):
            if Path(str(self.kafka_options.get(name, ""))).is_file():
                found[f"{PREFIX}KAFKA_OPTIONS {name}"] = Path(str(self.kafka_options[name]))
        return found

    def environment(self) -> dict[str, str]:
        """These settings as environment variables, including secrets, for a child process.

        The child reads no settings file: the variables contain everything, and a file that is a pipe can be read only
        once.
        """
        found = {}
        for name in declarations():
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


def declarations() -> dict[str, Field[Any]]:
    """The declarations of all settings, by name; `metadata` has `read`, `description` and `secret`."""
    return {declared.name: declared for declared in fields(Settings)}


def _of_file(path: Path) -> dict[str, str]:
    """The names and values in the file, as texts. Raises ConfigurationError."""
    from dotenv.parser import parse_stream

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
    """Raise ConfigurationError if a file that nobody named has settings: its owner may think that they are used."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
    except OSError:
        return
    if not text:
        return
    from dotenv.parser import parse_stream

    names = {line.key for line in parse_stream(StringIO(text)) if line.key is not None and line.key.startswith(PREFIX)}
    if names:
        raise ConfigurationError(
            f"the file {path} sets {', '.join(sorted(names))} and is not read: it may have come with a package. "
            f"If it is yours, name it by --env-file {path} or {_ENV_FILE}; --env-file {os.devnull} goes on without it"
        )


def _number(line: Binding) -> int:
    """The line's number in its file, from 1. The parser counts blank lines before it as part of it."""
    text = line.original.string
    return line.original.line + text[: len(text) - len(text.lstrip())].count("\n")


def table() -> str:
    """The text of docs/settings.md."""
    rows, secret = "", []
    for name, declared in declarations().items():
        rows += f"| `{PREFIX}{name.upper()}` | {_shown(declared.default)} | {declared.metadata['description']} |\n"
        if declared.metadata["secret"]:
            secret.append(f"`…_{name.upper()}`")
    return f"""# Settings

Generated from `services/config.py` by `make docs`; do not edit.

Set an environment variable, or write `NAME=VALUE` into a file and name that by `{_ENV_FILE}`. A flag of the
same name overrides both: `--log-url` is `ARTIFACT_STORE_LOG_URL`. Python takes the name in lower case without the
prefix: `Settings(log_url=…)`. An empty variable counts as not set, and a variable `{PREFIX}*` that is not in this
table is an error.

Other users of the machine can see flags. So a flag is refused when it holds a secret, which may be in
{", ".join(secret)}.

| setting | default | meaning |
| --- | --- | --- |
{rows}"""


def _shown(default: Any) -> str:
    return "" if default in (None, "") else f"`{json.dumps(default) if isinstance(default, bool) else default}`"


if __name__ == "__main__":
    sys.stdout.write(table())
