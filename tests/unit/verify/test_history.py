"""The oracle finds nothing wrong with any events of the core, and builds the same manifests."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from artifact_store.errors import ConflictError
from artifact_store.events import Event, FileIngested, PackageFinalized
from artifact_store.rules import metadata_text
from services.core.decide import Command, CreatePackage, FinalizePackage, IngestFiles, Limits, decide
from services.core.state import PackageState, evolve
from services.verify.check_log import Histories
from services.verify.notes import Claim, Notes
from tests import commands
from tests.verify_scene import changed, history

PATHS = st.sampled_from(["a", "b", "a/b", "é", "z" * 40, "dir/file.txt", "\U00010000", "\uff5e"])
METADATA = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    st.one_of(st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.floats(-1e6, 1e6)),
    max_size=3,
)


@st.composite
def packages(draw: st.DrawFn, name: str) -> list[Command]:
    """The commands of one package; some are retries, and some are refused."""
    created = commands.create(name, metadata=metadata_text(draw(METADATA), 1 << 16))
    found: list[Command] = [created]
    for number in range(draw(st.integers(0, 4))):
        paths = draw(st.lists(PATHS, min_size=1, max_size=4, unique=True))
        found += [commands.ingest(created.package_id, *paths, name=number)] * draw(st.integers(1, 2))
    if draw(st.booleans()):
        found.append(commands.finalize(created.package_id))
    return found


def appended(all_commands: list[list[Command]], order: list[int], limits: Limits) -> list[Event]:
    """What a log holds after the commands of several packages, interleaved in this order as long as there are any."""
    states: dict[UUID, PackageState] = {}
    events: list[Event] = []
    left = [list(of_package) for of_package in all_commands]
    turns = [*order, *range(len(left))] + [i for i, of_package in enumerate(left) for _ in of_package]
    for now, turn in enumerate(turns, 1):
        of_package = left[turn % len(left)]
        if not of_package:
            continue
        command = of_package.pop(0)
        try:
            made = decide(states.get(command.package_id), command, now, limits)
        except ConflictError:
            continue
        for event in made:
            states[command.package_id] = evolve(states.get(command.package_id), event)
            events.append(event)
    return events


def judged(events: list[Event], cached_heads: int = 4096) -> tuple[list[tuple[str, str, str]], list[Claim | None]]:
    """What the oracle says of the events, and what they claim of blobs."""
    said: list[tuple[str, str, str]] = []
    with Notes(cached_heads) as notes:
        histories = Histories(notes, lambda *what: said.append(what))
        claims = [followed[1] for event in events if (followed := histories.follow(event)) is not None]
        said += [("unfinished-command", str(package), str(command)) for package, command in notes.unfinished()]
    return said, claims


@given(
    all_commands=st.tuples(packages("one"), packages("two"), packages("three")),
    order=st.lists(st.integers(0, 2), max_size=20),
    inline=st.booleans(),
    cached_heads=st.integers(1, 3),
)
def test_what_the_core_made_is_clean_however_packages_interleave_and_little_is_cached(
    all_commands: tuple[list[Command], ...], order: list[int], inline: bool, cached_heads: int
) -> None:
    limits = Limits(inline_manifest_bytes=1 << 20 if inline else 0)
    events = appended(list(all_commands), order, limits)
    said, claims = judged(events, cached_heads)
    assert said == []
    assert [event for event, claim in zip(events, claims, strict=True) if claim is not None] == [
        event
        for event in events
        if isinstance(event.payload, FileIngested)
        or (isinstance(event.payload, PackageFinalized) and event.payload.manifest_key)
    ]


def test_a_claim_check_is_claimed_with_the_length_and_digest_of_the_manifest_that_the_core_built() -> None:
    for count in (0, 1, 23, 24, 255, 256):
        made = commands.create()
        files = tuple(commands.stored(f"{number:05}") for number in range(count))
        asked: list[Command] = [made, FinalizePackage(made.package_id, commands.command_id("end"), "ada")]
        if files:
            asked.insert(1, IngestFiles(made.package_id, commands.command_id("files"), "ada", files))
        events = history(asked, Limits(inline_manifest_bytes=1 << 40, max_event_bytes=1 << 40))
        payload = events[-1].payload
        assert isinstance(payload, PackageFinalized)
        manifest = payload.manifest
        assert manifest is not None
        moved = replace(payload, manifest=None, manifest_key=f"blobs/{count}")
        said, claims = judged([*events[:-1], replace(events[-1], payload=moved)])
        assert {kind for kind, _, _ in said} == {"manifest-key"}
        claim = claims[-1]
        assert claim is not None
        assert (claim.length, claim.blake3) == (len(manifest), blake3(manifest).digest())


def test_a_torn_command_that_its_retry_made_whole_later_is_clean() -> None:
    made = commands.create()
    asked = commands.ingest(made.package_id, "a", "b", "c")
    state: PackageState | None = None
    events: list[Event] = []
    steps: list[tuple[Command, int]] = [(made, 1), (asked, 1), (asked, 9)]
    for now, (command, most) in enumerate(steps, 1):
        for event in decide(state, command, now, Limits())[:most]:
            state = evolve(state, event)
            events.append(event)
    assert [event.command_index for event in events] == [0, 0, 1, 2]
    assert judged(events)[0] == []
    assert [kind for kind, _, _ in judged(events[:3])[0]] == ["unfinished-command"]


def test_a_retention_class_that_is_unknown_today_is_not_judged() -> None:
    made = commands.create()
    assert isinstance(made, CreatePackage)
    (event,) = history([made])
    assert judged([changed(event, retention_class="of-another-time", retention_days=12)])[0] == []
