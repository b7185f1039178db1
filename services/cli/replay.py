"""`replay` and `digest`: folding a view again, and comparing views."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from services.cli.command import (
    ProgressLine,
    answer,
    common_options,
    invocation,
    known_projection,
    metrics_file_option,
    run,
)
from services.cli.repair import max_parked_option

if TYPE_CHECKING:
    from pathlib import Path

    from projector.rebuild import ReplayProgress, ReplayResult
    from services.runtime.metrics import RunMetrics
    from services.views.projections import Projection


@click.command()
@click.argument("projection")
@click.option(
    "--in-place",
    is_flag=True,
    help="Empty the view first, then fold into it. Readers see an incomplete view meanwhile.",
)
@click.option(
    "--verify", "compare", is_flag=True, help="Switch only if the digests of both views are equal at the same position."
)
@click.option("--even-if-different", is_flag=True, help="With --verify: show what differs, and switch anyway.")
@click.option("--restart", is_flag=True, help="Begin at the log's start, even if an earlier replay was interrupted.")
@max_parked_option
@click.option("--drop", is_flag=True, help="Only remove what an interrupted replay has built.")
@click.option(
    "--processes", type=click.IntRange(1, 64), metavar="N", help="Load in N processes.  [default: one per core]"
)
@click.option(
    "--max-rate",
    type=click.FloatRange(1),
    metavar="EVENTS",
    help="Fold at most this many events per second, to spare the database.",
)
@metrics_file_option
@common_options(shown=("log_url", "views_url"))
def replay(
    projection: str,
    *,
    in_place: bool,
    drop: bool,
    max_parked: int | None,
    metrics_file: Path | None,
    **options: Any,
) -> None:
    """Fold a projection again from the log's start.

    A new generation of its tables is built beside the live view, which is still read and kept up to date. Once it has
    caught up, it takes the live view's place. An interrupted replay continues where it stopped. If --verify finds a
    difference, both are kept and the exit code is 1.
    """
    known = known_projection(projection)
    if options["even_if_different"] and not options["compare"]:
        raise click.UsageError("--even-if-different says what to do after --verify")
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value and name != "compare"]
    given += ["--verify"] * options["compare"]
    if in_place and (drop or given):
        raise click.UsageError(f"--in-place takes no option but --max-parked; leave {(given or ['--drop'])[0]} out")
    if drop:
        given += [] if max_parked is None else ["--max-parked"]
        if given:
            raise click.UsageError(f"--drop takes no other option; leave {given[0]} out")
        _drop(known)
        return
    from services.runtime.metrics import RunMetrics

    with RunMetrics(metrics_file, f"replay {projection}") as metrics:
        done = run(_replay(metrics, projection, in_place=in_place, max_parked=max_parked, **options))
    answer(
        {
            "projection": done.projection,
            "events": done.events,
            "rows": done.rows,
            "digest": done.digest,
            "position": str(done.position),
            "seconds": round(done.seconds, 3),
            **({} if done.matches is None else {"same_as_before": done.matches}),
        }
    )


async def _replay(
    metrics: RunMetrics, projection: str, *, in_place: bool, max_parked: int | None, compare: bool, **options: Any
) -> ReplayResult:
    from projector import RebuildOptions
    from projector import replay as fold_again

    phase = ""
    with closing(ProgressLine()) as line:

        def tell(seen: ReplayProgress) -> None:
            nonlocal phase
            before, phase = phase, seen.phase
            if phase == "load":
                metrics.progress(seen.done, seen.total)
            line.tell(lambda: _line(seen, options["max_rate"]), at_once=phase != before)

        return await fold_again(
            invocation().settings(),
            projection,
            in_place=in_place,
            options=RebuildOptions(verify=compare, **options),
            max_parked=max_parked,
            progress=tell,
        )


def _drop(projection: Projection) -> None:
    from projector import abandon

    dropped = run(abandon(invocation().settings(), projection.name))
    answer({"projection": projection.name, "dropped": dropped}, None if dropped else "there was no build to drop")


def _line(seen: ReplayProgress, max_rate: float | None) -> str:
    if not seen.total:
        return f"{seen.phase}: {seen.events:,} events folded"
    left = "" if seen.seconds_left is None else f", {_duration(seen.seconds_left)} left"
    if seen.outrun:
        left = ", no end in sight: events arrive as fast as they are folded"
        left += "" if max_rate is None else f" (--max-rate {max_rate:g} is too low)"
    part = min(1.0, seen.done / seen.total)
    return f"{seen.phase}: {part:.0%}, {seen.events:,} events folded, {seen.rate:,.0f} events/s{left}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@click.command()
@click.argument("projection")
@common_options(shown=("views_url",))
def digest(projection: str) -> None:
    """Show the canonical digest of a view. Equal content has an equal digest, on every database."""
    answer(run(_digest(known_projection(projection))))


async def _digest(projection: Projection) -> dict[str, Any]:
    from services.views.digest import digest_view
    from services.views.engine.generations import read_build
    from services.wiring import open_views

    views = open_views(invocation().settings())
    try:
        found = await digest_view(views, projection)
        async with views.reading(snapshot=True) as connection:
            build = await read_build(connection, projection)
    finally:
        await views.close()
    return {
        "projection": found.projection,
        "digest": found.digest,
        "position": None if found.position is None else str(found.position),
        "rows": found.rows,
        **({} if build is None else {"building": str(build.position), "builder": build.builder}),
    }
