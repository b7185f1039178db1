"""The command line `artifact-store`: one file for each group of commands.

A command's file is loaded when the command is called, and each command imports heavy modules itself.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from importlib import import_module

import click

from services.cli.command import Root, common_options
from services.config import declarations

__all__ = ["main"]

_FILES = {
    "transfer": ("push", "add", "finalize", "pull"),
    "read": ("packages", "show", "manifest", "usage", "tail"),
    "run": ("serve", "gateway", "projector", "webhooks", "migrate"),
    "subscribe": ("subscriptions",),
    "login": ("login", "logout", "whoami"),
    "tokens": ("tokens", "policy"),
    "replay": ("replay", "digest"),
    "verify": ("verify",),
    "repair": ("parked",),
    "archive": ("log",),
    "status": ("status",),
    "doctor": ("doctor",),
}


class _Commands(MutableMapping[str, click.Command]):
    """The commands by name. A command's file is imported when the command is looked up."""

    def __init__(self) -> None:
        self._files = {name: file for file, names in _FILES.items() for name in names}
        self._found: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name not in self._found:
            self._found[name] = getattr(import_module(f"{__name__}.{self._files[name]}"), name)
        return self._found[name]

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._found[name] = command

    def __delitem__(self, name: str) -> None:
        del self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _version(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"artifact-store {version('artifact-store')}")
        context.exit()


@click.group(
    cls=Root, commands=_Commands(), context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit."
)
@common_options(shown=tuple(declarations()))
def main() -> None:
    """A registry of artifact packages whose log of record is a Kafka topic.

    Every setting is a flag and an environment variable: --log-url is ARTIFACT_STORE_LOG_URL. A file of settings is read
    when --env-file names it.
    """
