"""The foundation of every command: flags and arguments, output, and the conversion of errors to exit codes.

A setting is a flag of the same name, before or after the command. A package is named by its id, or by the content
address of its manifest. Results go to standard output, as text or JSON; progress and errors go to standard error. `run`
is the one place where an error becomes a message and an exit code.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import click

from artifact_store.errors import ArtifactStoreError, InvalidRequestError
from services.cli.standard_streams import open_missing_streams
from services.config import Settings, declarations, switch
from services.runtime.logs import utc

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from artifact_store.manifest import ContentAddress
    from artifact_store.registry import Registry
    from artifact_store.rules import PathPair
    from artifact_store.transfers.parallel import TransferProgress
    from services.log.port import Log
    from services.views.database import Views
    from services.views.projections import Projection


Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_META = "artifact-store"


@dataclass(slots=True)
class Invocation:
    """The values of this command line's flags; the same object for the group and its command."""

    overrides: dict[str, Any]
    as_json: bool = False
    quiet: bool = False

    def settings(self) -> Settings:
        """The settings from the named file, the environment and the flags; the last wins. Raises ConfigurationError."""
        return Settings.from_env(**self.overrides)


def invocation() -> Invocation:
    """The invocation of the running command."""
    found: Invocation = click.get_current_context().meta.setdefault(_META, Invocation({}))
    return found


class SettingOption(click.Option):
    """A flag for a setting."""


def common_options(*, shown: tuple[str, ...] = ()) -> Callable[[Decorated], Decorated]:
    """Add `--json`, `--quiet` and every setting. The help shows only the settings in `shown`."""

    def decorate(command: Decorated) -> Decorated:
        for name in reversed(declarations()):
            command = _setting(name, hidden=name not in shown)(command)
        command = click.option(
            "--quiet",
            "-q",
            is_flag=True,
            expose_value=False,
            callback=_keep_quiet,
            help="Show neither progress nor remarks.",
        )(command)
        return click.option(
            "--json",
            is_flag=True,
            expose_value=False,
            callback=_keep_json,
            help="Print JSON: one object, or one per line.",
        )(command)

    return decorate


def _setting(name: str, *, hidden: bool) -> Callable[[Decorated], Decorated]:
    def keep(_context: click.Context, _parameter: click.Parameter, value: object) -> None:
        if value is not None and declared["secret"] is not None and declared["secret"](str(value)):
            raise click.UsageError(
                f"--{name.replace('_', '-')} holds a secret, and other users can see flags: "
                f"set ARTIFACT_STORE_{name.upper()} in the environment or in a file that --env-file names"
            )
        if value is not None:
            invocation().overrides[name] = value

    declared = declarations()[name].metadata
    kind: dict[str, Any] = {"metavar": "VALUE"}
    if declared["read"] is switch:
        kind = {"is_flag": True, "default": None, "flag_value": True}
    warning = "" if declared["secret"] is None else " Put a secret in the environment: others can see flags."
    return click.option(
        "--" + name.replace("_", "-"),
        f"setting_{name}",
        cls=SettingOption,
        expose_value=False,
        callback=keep,
        hidden=hidden,
        help=declared["description"] + warning,
        **kind,
    )


def _keep_json(_context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    invocation().as_json |= value


def _keep_quiet(_context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    invocation().quiet |= value


ACTOR = click.option(
    "--actor", help="Act in this name instead of your own. Through a gateway, this takes the right to delegate."
)
"""For every command that records an event."""


metrics_file_option = click.option(
    "--metrics-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write metrics of this run to FILE.prom, for the textfile collector of Prometheus's node exporter.",
    metavar="FILE.prom",
)
"""For long-running commands that end by themselves."""


def metadata_of(pairs: tuple[str, ...], document: str | None) -> dict[str, Any]:
    """Metadata from `--metadata K=V` (values are text) over `--metadata-json` (a JSON object, or the file of one).

    Raises click.BadParameter: a pair without `=`, a repeated key, or something other than a JSON object.
    """
    found: dict[str, Any] = {}
    if document is not None:
        found = json_object(document, "--metadata-json")
    given: set[str] = set()
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise click.BadParameter(f"{pair!r} is not of the form KEY=VALUE", param_hint="--metadata")
        if key in given:
            raise click.BadParameter(f"the key {key!r} is given twice", param_hint="--metadata")
        given.add(key)
        found[key] = value
    return found


def json_object(document: str, hint: str) -> dict[str, Any]:
    """A JSON object, given as JSON or as the name of its file. Raises click.BadParameter for the option `hint`."""
    try:
        text = document
        if not document.lstrip().startswith(
            ("{", "[", '"')
        ):  # an object, array or string in JSON is no file name; that it must be an object is checked below
            with click.open_file(document, encoding="utf-8") as file:
                text = file.read()
        value = json.loads(text)
    except OSError as error:
        raise click.BadParameter(f"{document}: {error.strerror}", param_hint=hint) from None
    except ValueError as error:
        raise click.BadParameter(f"not JSON: {error}", param_hint=hint) from None
    except RecursionError:
        raise click.BadParameter("it is nested too deeply to be read as JSON", param_hint=hint) from None
    if not isinstance(value, dict):
        raise click.BadParameter("it must be a JSON object", param_hint=hint)
    return value


@contextmanager
def as_usage() -> Iterator[None]:
    """Treat an invalid argument as wrong usage: raise click.BadParameter instead of InvalidRequestError."""
    try:
        yield
    except InvalidRequestError as error:
        raise click.BadParameter(error.detail) from None


def package_or_address(text: str) -> UUID | ContentAddress:
    """Parse a package id or a content address. Raises click.BadParameter."""
    from artifact_store.manifest import ContentAddress

    if text.startswith("blake3:"):
        with as_usage():
            return ContentAddress.parse(text)
    return package_id(text)


def package_id(text: str) -> UUID:
    """Parse a package id. Raises click.BadParameter."""
    try:
        return UUID(text)
    except ValueError:
        raise click.BadParameter(f"{text[:80]!r} is not a package id; `artifact-store packages` lists them") from None


async def find_package(registry: Registry, text: str) -> UUID:
    """The id of the package that `text` names. Raises PackageNotFoundError, click.BadParameter."""
    from artifact_store.registry import find_frozen

    which = package_or_address(text)
    if isinstance(which, UUID):
        return which
    return await find_frozen(registry, which)


def known_projection(name: str) -> Projection:
    """The projection with this name. Raises click.BadParameter, which lists the known ones."""
    from services.views.projections import projection_named  # loads SQLAlchemy, which a gateway's clients do not need

    with as_usage():
        return projection_named(name)


_SECONDS_ON_A_TERMINAL = 0.2
_SECONDS_ELSEWHERE = 10.0


def answer(result: Mapping[str, Any], text: str | None = None) -> None:
    """Print a result: as one JSON object, as `text`, or else with one entry per line."""
    if invocation().as_json:
        say(json.dumps(result, ensure_ascii=False))
    elif text is not None:
        say(text)
    else:
        width = max(len(name) for name in result)
        lines = (f"{name.replace('_', ' '):<{width}}  {_plain(value)}" for name, value in result.items())
        say("\n".join(lines))


_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Characters that a terminal interprets: control characters except tab and newline, and bidirectional controls."""


def visible(text: str) -> str:
    """The text with characters that a terminal would interpret as `\\uXXXX`, which keeps JSON equivalent.

    Bytes of a path that are not UTF-8 are shown by their codes too.
    """
    if text.isascii() and text.isprintable():
        return text
    shown = _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return shown.encode(errors="backslashreplace").decode()


class VisibleLines(logging.Formatter):
    """Log lines, with times in UTC. Names in them can neither hide text nor begin a new line."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - as below
        """See `logging.Formatter`."""
        return utc(record.created)

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        return visible(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the base class's name
        """See `logging.Formatter`. Formats the line without the traceback: only tracebacks may have several lines."""
        return super().formatMessage(record).replace("\n", "\\n")


def say(text: str) -> None:
    """Print one or more lines of text or JSON, through `visible`."""
    click.echo(visible(text))


def remark(text: str) -> None:
    """Tell people something that is not a result, on standard error."""
    if not invocation().quiet:
        click.echo(visible(text), err=True)


def unportable(count: int, pairs: Sequence[PathPair]) -> dict[str, Any]:
    """The part of a finalization's result about paths that cannot be unpacked everywhere. Also warns people."""
    if not count:
        return {}
    shown = ", ".join(f"{path!r} and {other!r}" for path, other in pairs)
    remark(
        f"warning: some paths differ only by case or Unicode form, and can be unpacked together only on file systems "
        f"that tell them apart: {shown}{f' and {count - len(pairs):,} more' if count > len(pairs) else ''}"
    )
    return {"unportable_count": count, "unportable_paths": [pair._asdict() for pair in pairs]}


class ProgressLine:
    """The progress of something that takes long: a line on standard error, which is overwritten on a terminal.

    Elsewhere, where it may go into a file, a new line is written from time to time. Writes nothing with `--quiet`.
    """

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._seconds = _SECONDS_ON_A_TERMINAL if self._terminal else _SECONDS_ELSEWHERE
        self._told_at = time.monotonic()
        self._drawn = False

    def tell(self, line: Callable[[], str], *, at_once: bool = False) -> None:
        """Write the line, unless one was written a moment ago. With `at_once`, write it in any case."""
        now = time.monotonic()
        if invocation().quiet or not (at_once or now - self._told_at >= self._seconds):
            return
        self._told_at, self._drawn = now, True
        shown = visible(line())
        click.echo(f"\r\x1b[2K{shown}" if self._terminal else shown, err=True, nl=not self._terminal)

    def close(self) -> None:
        """Clear the terminal's line."""
        if self._terminal and self._drawn:
            click.echo("\r\x1b[2K", err=True, nl=False)


_WIDTH = 80
_WORD = re.compile(r"[^\s`]*`[^`]*`\S*|\S+")
"""A word. A command in backquotes is one word, so that it can be copied whole."""


def say_wrapped(text: str, *, first: str = "", indent: int = 0) -> None:
    """Print text after `first` on one line. On a terminal, wrap it at 80 columns and indent the further lines.

    A longer word gets a separate line.
    """
    if not sys.stdout.isatty():
        say(first + text)
        return
    lines, line = [], first
    for word in _WORD.findall(text):
        if len(line) + len(word) > _WIDTH and line.strip() and line != first:
            lines.append(line.rstrip())
            line = " " * indent
        line += f"{word} "
    say("\n".join([*lines, line.rstrip()]))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, headed: bool = False) -> None:
    """Print rows for people: as a table on a terminal, and with tabs between the values elsewhere.

    A table has the names of the columns above it; the other form only if it is `headed`.
    """
    if not sys.stdout.isatty():
        if headed:
            say("\t".join(columns))
        for row in rows:
            say("\t".join(_plain(value) for value in row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        drawn.add_row(*(Text(_plain(value), overflow="fold") for value in row))
    Console().print(drawn)


def complain(error: ArtifactStoreError, *, as_json: bool) -> None:
    """Print an error to standard error: for people, or as a problem document (RFC 9457)."""
    if as_json:
        from artifact_store.documents.problem_details import problem_of

        click.echo(visible(problem_of(error).model_dump_json(exclude_none=True)), err=True)
    else:
        click.echo(visible(f"error: {error.detail}"), err=True)


def complain_plainly(kind: str, detail: str, *, as_json: bool) -> None:
    """As `complain`, for errors of the command line itself or the operating system."""
    if as_json:
        problem = {
            "type": f"urn:artifact-store:problem:{kind}",
            "title": kind.replace("-", " ").capitalize(),
            "detail": detail,
        }
        click.echo(visible(json.dumps(problem, ensure_ascii=False)), err=True)
    else:
        click.echo(visible(f"error: {detail}"), err=True)


@contextmanager
def transfer_progress(verb: str) -> Iterator[TransferProgress]:
    """Progress bars for a push or pull on standard error; none if that is not a terminal, or with `--quiet`."""
    from artifact_store.transfers.parallel import NoProgress

    if invocation().quiet or not sys.stderr.isatty():
        yield NoProgress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[done]} of {task.fields[files]} files"),
        console=Console(stderr=True),
        transient=True,
    )
    with bars:
        yield _Bars(bars, bars.add_task(verb, total=None, done=0, files=0))


class _Bars:
    """A TransferProgress that draws bars."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars = bars
        self._task = task
        self._done = 0

    def expect(self, files: int, size_bytes: int) -> None:
        self._bars.update(self._task, total=size_bytes, files=files)

    def advance(self, size_bytes: int) -> None:
        self._bars.advance(self._task, size_bytes)

    def finish_file(self) -> None:
        self._done += 1
        self._bars.update(self._task, done=self._done)


def _plain(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict | list):
        value = json.dumps(value, ensure_ascii=False)
    return visible(str(value))


Result = TypeVar("Result")

_FAILED = 1


class Root(click.Group):
    """`artifact-store`."""

    def main(  # type: ignore[override]  # click's own has overloads for its standalone mode, which we do ourselves
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> None:
        """Run a command and end the process. Raises SystemExit."""
        open_missing_streams()
        if logging.lastResort is not None:
            logging.lastResort.setFormatter(VisibleLines())
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
            complain_plainly("usage", error.format_message() + where, as_json=as_json)
            code = error.exit_code
        except click.ClickException as error:
            complain_plainly("failed", error.format_message(), as_json=as_json)
            code = error.exit_code
        except (click.Abort, KeyboardInterrupt):
            complain_plainly("interrupted", "interrupted", as_json=as_json)
            code = _FAILED
        except ArtifactStoreError as error:
            complain(error, as_json=as_json)
            code = error.exit_code
        except BrokenPipeError:
            # The reader of our output has closed it. Text that is still buffered must not fail once more at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = _FAILED
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            complain_plainly("system", f"{where}{error.strerror or error}", as_json=as_json)
            code = _FAILED
        except Exception as error:
            if not as_json:
                raise  # the traceback helps to fix the bug
            complain_plainly("internal", _unforeseen(error), as_json=True)
            code = _FAILED
        gc.freeze()  # the process ends, so do not spend time on collecting garbage
        sys.exit(code if isinstance(code, int) else 0)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show options and settings in separate sections, then the commands."""
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
    """The type and place of the error. Its own text is left out, because it may hold a secret."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"an error that was not foreseen: {type(error).__name__} in {place.filename}, line {place.lineno}; without "
        "--json all of it is shown"
    )


def run(main: Coroutine[Any, Any, Result], *, many_bytes: bool = False) -> Result:
    """Run a command's coroutine to its end. Raises KeyboardInterrupt, also if it was cancelled, as by SIGTERM.

    With `many_bytes`, run it on uvloop's event loop, which spends less time on sockets than asyncio's.
    """
    try:
        if not many_bytes:
            return asyncio.run(main)
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main)
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


LOG_AND_VIEWS = ("log_url", "views_url")
"""The settings that the help of such a command shows."""


@asynccontextmanager
async def log_and_views() -> AsyncIterator[tuple[Log, Views]]:
    """Log and views of this command line's settings."""
    from services.wiring import open_log, open_views

    settings = invocation().settings()
    log, views = open_log(settings), open_views(settings)
    try:
        yield log, views
    finally:
        await views.close()
        await log.close()
