"""What commands print: results on standard output, as text or JSON; progress and errors on standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from services.cli.settings import invocation

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from artifact_store.transfers.parallel import TransferProgress
    from services.core.paths import PathPair
    from services.errors import ArtifactStoreError

_SECONDS_ON_A_TERMINAL = 0.2
_SECONDS_ELSEWHERE = 10.0


def answer(result: Mapping[str, Any], text: str | None = None) -> None:
    """Print a result: one JSON object, or `text`, or else its entries one a line."""
    if invocation().as_json:
        say(json.dumps(result, ensure_ascii=False))
    elif text is not None:
        say(text)
    else:
        width = max(len(name) for name in result)
        lines = (f"{name.replace('_', ' '):<{width}}  {_plain(value)}" for name, value in result.items())
        say("\n".join(lines))


def raw(text: bytes) -> None:
    """Print bytes and a line end."""
    click.echo(text)


def say(text: str) -> None:
    """Print a line, or several. A path need not be UTF-8: what is not is shown by its code, as JSON shows it."""
    raw(text.encode(errors="backslashreplace"))


def remark(text: str) -> None:
    """Say something to people that is no result."""
    if not invocation().quiet:
        click.echo(text, err=True)


def unportable(count: int, pairs: Sequence[PathPair]) -> dict[str, Any]:
    """What a finalization says of paths that cannot be unpacked everywhere, for its result; people are warned."""
    if not count:
        return {}
    shown = ", ".join(f"{path!r} and {other!r}" for path, other in pairs)
    remark(
        f"warning: paths differ only by case or Unicode form, and can be unpacked together only where file systems "
        f"tell them apart: {shown}{f' and {count - len(pairs):,} more' if count > len(pairs) else ''}"
    )
    return {"unportable_count": count, "unportable_paths": [pair._asdict() for pair in pairs]}


class ProgressLine:
    """How far something has come that takes long: a line on standard error, written over on a terminal.

    Elsewhere, where it may go into a file, it is a line now and then. Nothing with `--quiet`.
    """

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._seconds = _SECONDS_ON_A_TERMINAL if self._terminal else _SECONDS_ELSEWHERE
        self._told_at = time.monotonic()
        self._drawn = False

    def tell(self, line: Callable[[], str], *, at_once: bool = False) -> None:
        """Say it, unless something was said a moment ago and this need not be said `at_once`."""
        now = time.monotonic()
        if invocation().quiet or not (at_once or now - self._told_at >= self._seconds):
            return
        self._told_at, self._drawn = now, True
        click.echo(f"\r\x1b[2K{line()}" if self._terminal else line(), err=True, nl=not self._terminal)

    def close(self) -> None:
        """Clear the terminal's line."""
        if self._terminal and self._drawn:
            click.echo("\r\x1b[2K", err=True, nl=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows for people: a table on a terminal, tabs between the values elsewhere."""
    if not sys.stdout.isatty():
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

        click.echo(problem_of(error).model_dump_json(exclude_none=True), err=True)
    else:
        click.echo(f"error: {error.detail}", err=True)


def complain_plainly(kind: str, detail: str, *, as_json: bool) -> None:
    """As `complain`, for what the command line itself or the operating system refuses."""
    if as_json:
        problem = {
            "type": f"urn:artifact-store:problem:{kind}",
            "title": kind.replace("-", " ").capitalize(),
            "detail": detail,
        }
        click.echo(json.dumps(problem, ensure_ascii=False), err=True)
    else:
        click.echo(f"error: {detail}", err=True)


@contextmanager
def transfer_progress(verb: str) -> Iterator[TransferProgress]:
    """Bars for a push or pull on standard error; nothing when that is no terminal, or with `--quiet`."""
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
    """A TransferProgress that draws."""

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
    return str(value).encode(errors="backslashreplace").decode()
