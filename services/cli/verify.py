"""`verify`: runs the oracle, with progress on standard error, and exit code 1 if any invariant is broken."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack, closing
from typing import TYPE_CHECKING

import click

from services.cli.command import ProgressLine, answer, common_options, invocation, metrics_file_option, run, say
from services.cli.standard_streams import end_as_interrupted

if TYPE_CHECKING:
    from pathlib import Path

    from services.runtime.metrics import RunMetrics
    from services.verify import Report

_MIB = 1 << 20


@click.command()
@click.option(
    "--bytes", "check_bytes", is_flag=True, help="Read and hash every blob as well, and set damaged ones aside."
)
@click.option(
    "--remove-orphans", is_flag=True, help="Remove large bodies that no event names, if they are more than a day old."
)
@metrics_file_option
@common_options(shown=("log_url", "blobs_url", "views_url"))
def verify(*, check_bytes: bool, remove_orphans: bool, metrics_file: Path | None) -> None:
    """Check log, blobs and views, and name every broken invariant. Exit code 1 if there is one.

    With --bytes, damaged blobs are moved below `damaged/` in the blob store. Sending the same bytes again repairs them.
    """
    from services.runtime.metrics import RunMetrics

    with RunMetrics(metrics_file, "verify --bytes" if check_bytes else "verify") as metrics:
        report = run(_verify(metrics, check_bytes=check_bytes, remove_orphans=remove_orphans))
        metrics.found(report.violation_count)
    found = report.as_json()
    if invocation().as_json:
        answer(found)
    else:
        violations = found.pop("violations")
        answer(found)
        for violation in violations:
            say(f"{violation['kind']}  {violation['place']}: {violation['detail']}")
    if not report.clean:
        click.get_current_context().exit(1)


async def _verify(metrics: RunMetrics, *, check_bytes: bool, remove_orphans: bool) -> Report:
    end_as_interrupted()
    from services.verify import verify as check
    from services.wiring import open_blobs, open_log, open_views

    settings = invocation().settings()
    async with AsyncExitStack() as stack:
        log, blobs, views = open_log(settings), open_blobs(settings), open_views(settings)
        for part in (log, blobs, views):
            stack.push_async_callback(part.close)
        line = stack.enter_context(closing(ProgressLine()))
        began = time.monotonic()

        def tell(report: Report) -> None:
            done, total = (
                (report.bytes, report.expected_bytes) if check_bytes else (report.blobs, report.expected_blobs)
            )
            metrics.progress(done or 0, total)
            line.tell(lambda: progress_line(report, time.monotonic() - began))

        return await check(log, blobs, views, check_bytes=check_bytes, remove_orphans=remove_orphans, progress=tell)


def progress_line(report: Report, seconds: float) -> str:
    """The progress of a verification after this many seconds, as a line."""
    parts = [f"{report.events:,} events"]
    if report.expected_blobs:
        parts.append(f"{report.blobs:,} of {report.expected_blobs:,} blobs")
    if report.bytes is not None:
        rate = report.bytes / _MIB / max(seconds, 1e-3)
        parts.append(f"{report.bytes / _MIB:,.1f} of {report.expected_bytes / _MIB:,.1f} MiB, {rate:,.1f} MiB/s")
    if report.violation_count:
        parts.append(f"{report.violation_count:,} violations")
    return ", ".join(parts)
