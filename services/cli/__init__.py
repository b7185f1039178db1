"""The command line `artifact-store`: one file a command group; each command imports what is heavy itself."""

from __future__ import annotations

import click

from services.cli.archive import log
from services.cli.command import Root, common_options
from services.cli.doctor import doctor
from services.cli.login import login, logout, whoami
from services.cli.read import manifest, packages, show, tail, usage
from services.cli.repair import parked
from services.cli.replay import digest, replay
from services.cli.run import gateway, migrate, projector, serve, webhooks
from services.cli.status import status
from services.cli.subscribe import subscriptions
from services.cli.tokens import policy, tokens
from services.cli.transfer import add, finalize, pull, push
from services.cli.verify import verify
from services.config import declarations

__all__ = ["main"]


def _version(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"artifact-store {version('artifact-store')}")
        context.exit()


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit."
)
@common_options(shown=tuple(declarations()))
def main() -> None:
    """A registry of artifact packages whose log of record is a Kafka topic.

    Every setting is a flag and an environment variable: --log-url is ARTIFACT_STORE_LOG_URL. A file of settings is read
    when --env-file names it.
    """


for _command in (
    *(push, add, finalize, pull, packages, show, manifest, usage, tail),
    *(serve, gateway, projector, webhooks, migrate),
    subscriptions,
    *(login, logout, whoami, tokens, policy),
    *(replay, digest, verify, parked, log, status, doctor),
):
    main.add_command(_command)
