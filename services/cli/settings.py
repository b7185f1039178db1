"""The settings as flags, and what every command takes besides: `--json` and `--quiet`, before or after its name.

The names stand here once more, because reading them from `services.config` would cost every `--help` its imports; a
test holds the two lists together.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from services.config import Settings

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

SETTINGS: dict[str, str] = {
    "log_url": "The log: sqlite:///PATH or kafka://host:port[,host:port]/PREFIX.",
    "kafka_partitions": "Partitions of the topic that `migrate` creates.",
    "kafka_replication_factor": "Replicas that the topic must have.",
    "kafka_min_insync_replicas": "Replicas that must have an event before it counts.",
    "kafka_options": "Further librdkafka client settings, as a JSON object.",
    "blobs_url": "The blob store: file:FOLDER, s3://host:port/BUCKET or s3+http://… without TLS.",
    "s3_access_key": "Access key of the blob store.",
    "s3_secret_key": "Secret key of the blob store; other users can see flags, so better in the environment.",
    "s3_region": "Region of the blob store.",
    "views_url": "The views: sqlite+aiosqlite:///PATH or postgresql+asyncpg://….",
    "schema_registry_url": "A schema registry for the event schemas; not used yet.",
    "url": "A gateway that client commands talk to instead of opening the parts themselves.",
    "listen": "HOST:PORT to listen on.",
    "insecure": "Allow listening on an interface that others reach.",
    "internal_listen": "HOST:PORT for commands that other gateways forward.",
    "internal_url": "The address that other gateways reach this one by.",
    "internal_secret": "The secret that guards forwarded commands; better in the environment.",
    "state_dir": "Folder of the writers' disposable state.",
    "max_file_bytes": "The largest file that is taken.",
    "max_files_per_package": "The most files that a package takes.",
    "max_metadata_bytes": "The most metadata that a package takes.",
    "max_connections": "Connections to one gateway process; half of them from one address.",
    "max_uploads": "Uploads at a time to one gateway process; half of them from one address.",
}

_SWITCHES = frozenset({"insecure"})
_META = "artifact-store"


@dataclass(slots=True)
class Invocation:
    """What the flags of this command line say; the same object for the group and its command."""

    overrides: dict[str, Any]
    as_json: bool = False
    quiet: bool = False

    def settings(self) -> Settings:
        """The settings: `.env`, environment, then the flags. Raises ConfigurationError."""
        from services.config import Settings

        return Settings.from_env(**self.overrides)


def invocation() -> Invocation:
    """That of the command that runs now."""
    found: Invocation = click.get_current_context().meta.setdefault(_META, Invocation({}))
    return found


class SettingOption(click.Option):
    """A flag that is a setting."""


def common_options(*, shown: tuple[str, ...] = ()) -> Callable[[Decorated], Decorated]:
    """Add `--json`, `--quiet` and every setting; of the settings only those in `shown` are in the help."""

    def decorate(command: Decorated) -> Decorated:
        for name in reversed(SETTINGS):
            command = _setting(name, hidden=name not in shown)(command)
        command = click.option(
            "--quiet", "-q", is_flag=True, expose_value=False, callback=_keep_quiet, help="No progress, no remarks."
        )(command)
        return click.option(
            "--json", is_flag=True, expose_value=False, callback=_keep_json, help="One JSON object, or one a line."
        )(command)

    return decorate


def _setting(name: str, *, hidden: bool) -> Callable[[Decorated], Decorated]:
    def keep(_context: click.Context, _parameter: click.Parameter, value: object) -> None:
        if value is not None:
            invocation().overrides[name] = value

    switch: dict[str, Any] = {"is_flag": True, "default": None, "flag_value": True} if name in _SWITCHES else {}
    return click.option(
        "--" + name.replace("_", "-"),
        f"setting_{name}",
        cls=SettingOption,
        expose_value=False,
        callback=keep,
        hidden=hidden,
        help=SETTINGS[name],
        metavar=None if switch else "VALUE",
        **switch,
    )


def _keep_json(_context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    invocation().as_json |= value


def _keep_quiet(_context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    invocation().quiet |= value


def metadata_of(pairs: tuple[str, ...], document: str | None) -> dict[str, Any]:
    """Metadata from `--metadata K=V` (values are text) over `--metadata-json` (a JSON object, or the file of one).

    Raises click.BadParameter: no `=`, a key twice, no JSON object.
    """
    found: dict[str, Any] = {}
    if document is not None:
        found = _json_object(document)
    given: set[str] = set()
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise click.BadParameter(f"{pair!r} is not of the form KEY=VALUE", param_hint="--metadata")
        if key in given:
            raise click.BadParameter(f"the key {key!r} comes twice", param_hint="--metadata")
        given.add(key)
        found[key] = value
    return found


def _json_object(document: str) -> dict[str, Any]:
    hint = "--metadata-json"
    try:
        text = document
        if not document.lstrip().startswith(
            ("{", "[", '"')
        ):  # all three are JSON; that it must be an object comes below
            with click.open_file(document, encoding="utf-8") as file:
                text = file.read()
        value = json.loads(text)
    except OSError as error:
        raise click.BadParameter(f"{document}: {error.strerror}", param_hint=hint) from None
    except ValueError as error:
        raise click.BadParameter(f"no JSON: {error}", param_hint=hint) from None
    except RecursionError:
        raise click.BadParameter("no JSON that can be read: it is nested too deeply", param_hint=hint) from None
    if not isinstance(value, dict):
        raise click.BadParameter("it must be a JSON object", param_hint=hint)
    return value
