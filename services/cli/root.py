"""The group of all commands: its help, and the one place where errors become messages and exit codes.

Exit codes: 0 done, 1 the operation failed, 2 wrong usage (settings included).
"""

from __future__ import annotations

import asyncio
import os
import sys
import traceback
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import click

from services.cli import output
from services.cli.settings import SettingOption
from services.cli.streams import open_missing_streams
from services.errors import ArtifactStoreError

Result = TypeVar("Result")

_FAILED = 1


class Root(click.Group):
    """`artifact-store`."""

    def main(  # type: ignore[override]  # click's own has overloads for its standalone mode, which we do ourselves
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> None:
        """Run a command and end the process. Raises SystemExit."""
        open_missing_streams()
        arguments = list(sys.argv[1:] if args is None else args)
        as_json = "--json" in arguments
        extra["standalone_mode"] = False
        try:
            code = super().main(arguments, prog_name or "artifact-store", **extra)
            sys.stdout.flush()
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = error.exit_code
        except click.UsageError as error:
            where = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
            output.complain_plainly("usage", error.format_message() + where, as_json=as_json)
            code = error.exit_code
        except click.ClickException as error:
            output.complain_plainly("failed", error.format_message(), as_json=as_json)
            code = error.exit_code
        except (click.Abort, KeyboardInterrupt):
            output.complain_plainly("interrupted", "interrupted", as_json=as_json)
            code = _FAILED
        except ArtifactStoreError as error:
            output.complain(error, as_json=as_json)
            code = error.exit_code
        except BrokenPipeError:
            # Whoever read our output has enough; what is still buffered must not fail once more at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = _FAILED
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            output.complain_plainly("system", f"{where}{error.strerror or error}", as_json=as_json)
            code = _FAILED
        except Exception as error:
            if not as_json:
                raise  # the traceback is what whoever mends this needs
            output.complain_plainly("internal", _unforeseen(error), as_json=True)
            code = _FAILED
        sys.exit(code if isinstance(code, int) else 0)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Options and settings apart, then the commands."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": [], "Settings (also after a command)": []}
        own, settings = sections.values()
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                (settings if isinstance(parameter, SettingOption) else own).append(record)
        self.format_commands(ctx, formatter)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _unforeseen(error: Exception) -> str:
    """What happened and where; the error's own text may hold a secret."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"an error that was not foreseen: {type(error).__name__} in {place.filename}, line {place.lineno}; without "
        "--json all of it is shown"
    )


def run(main: Coroutine[Any, Any, Result], *, many_bytes: bool = False) -> Result:
    """Run a command's coroutine to its end. Raises KeyboardInterrupt also when it was cancelled, as SIGTERM does.

    `many_bytes`: on uvloop's event loop, which spends less on sockets than asyncio's own; other commands do without.
    """
    try:
        if not many_bytes:
            return asyncio.run(main)
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main)
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
