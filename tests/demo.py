"""`python -m tests.demo`: the main job on the embedded default with real files, and its results.

The files are the sources of Python's standard library. A gateway is started as a process, and the command line
publishes, follows, rebuilds and pulls. At the end nothing is running and nothing is left behind. It needs only what the
product itself needs.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import signal
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from blake3 import blake3

from services.config import PREFIX, Settings
from tests.integration.processes import output_of, serving
from tests.services.process import ServiceError

FOLDER = Path(__file__).resolve().parents[1] / "var" / "demo"
MOST_FILES = 2_000
PROJECTIONS = ("registry", "retention", "usage")
_VIEW_SECONDS = 30.0
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__"})


class DemoError(Exception):
    """Something is not as it must be."""


def main() -> int:
    """Returns the exit code: 0 when everything was as it must be, 1 otherwise."""
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        del os.environ[name]  # the demonstration is of the embedded default, whatever the shell is set up for
    signal.signal(signal.SIGTERM, _interrupt)
    shutil.rmtree(FOLDER, ignore_errors=True)
    began = time.monotonic()
    try:
        _run()
    except (DemoError, AssertionError, ServiceError) as error:
        _say(f"\nFAILED  {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)
    _say(f"\nAll of it held, in {time.monotonic() - began:.1f} s. Nothing runs any more, and var/demo is gone.")
    return 0


def _run() -> None:
    source, again = FOLDER / "source", FOLDER / "again"
    with _step("take the sources of Python's standard library") as fact:
        count, size = _collect(source)
        fact("files", f"{count:,} ({size / 1e6:.1f} MB)")
    settings = Settings(
        log_url=f"sqlite:///{FOLDER}/log.db",
        blobs_url=f"file:{FOLDER}/blobs",
        views_url=f"sqlite+aiosqlite:///{FOLDER}/views.db",
        state_dir=FOLDER / "state",
    )
    with ExitStack() as stack:
        with _step("start `artifact-store serve`") as fact:
            url = stack.enter_context(serving(settings, FOLDER)).endpoint
            fact("gateway", f"{url} on a SQLite log, local files and SQLite views")
        package_id, address = _publish(url, source, count, size)
        _read_manifest(url, package_id, address, count)
        _tail(url, package_id, count)
        _bring_back(url, address, source, again, count)
        _fold_again(settings)
        with _step("verify log, blobs and views") as fact:
            output_of(settings, "verify")
            fact("verdict", "no invariant is broken")


def _collect(source: Path) -> tuple[int, int]:
    """Copy the library's sources; its tests only as far as they are needed to make up the number."""
    library = Path(sysconfig.get_path("stdlib"))
    found = [path.relative_to(library) for path in library.rglob("*.py")]
    kept = [path for path in found if not _LEFT_OUT.intersection(path.parts)]
    kept.sort(key=lambda path: (bool({"test", "tests", "idle_test"}.intersection(path.parts)), path))
    total = 0
    for path in kept[:MOST_FILES]:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library / path, source / path)
        total += (source / path).stat().st_size
    return len(kept[:MOST_FILES]), total


def _publish(url: str, source: Path, count: int, size: int) -> tuple[str, str]:
    version = ".".join(map(str, sys.version_info[:3]))
    about = ["--name", f"standard library of Python {version}", "--producer", "make demo", "--subject", "python"]
    about += ["--retention-class", "build-output", "--metadata", f"version={version}"]
    with _step("push: create, stream every file, finalize") as fact:
        began = time.monotonic()
        pushed = json.loads(output_of(None, "push", source, *about, "--json", url=url))
        _require("every file was pushed", (pushed["files"], pushed["bytes"]), (count, size))
        _require("each file is one event", pushed["sequence"], count + 2)
        fact("package", pushed["package_id"])
        fact("manifest", pushed["manifest_digest"])
        rate = count / (time.monotonic() - began)
        fact("rate", f"{rate:,.0f} files/s, each acknowledged when its bytes and its event are durable")
    return pushed["package_id"], pushed["manifest_digest"]


def _read_manifest(url: str, package_id: str, address: str, count: int) -> None:
    with _step("read the manifest, in CBOR and as JSON") as fact:
        cbor = output_of(None, "manifest", package_id, "--format", "cbor", url=url)
        manifest = json.loads(output_of(None, "manifest", package_id, "--format", "json", url=url))
        _require("the manifest's BLAKE3 is its address", f"blake3:{blake3(cbor).hexdigest()}", address)
        _require("the manifest lists every file", len(manifest["files"]), count)
        largest = max(manifest["files"], key=lambda file: int(file["size_bytes"]))
        fact("size", f"{len(cbor):,} bytes of CBOR, hashed again: the address is right")
        fact(
            "largest", f"{largest['relative_path']}, {largest['size_bytes']:,} bytes, blake3:{largest['blake3'][:16]}…"
        )


def _tail(url: str, package_id: str, count: int) -> None:
    with _step("tail the log") as fact:
        lines = output_of(None, "tail", "--package", package_id, "--json", url=url).splitlines()
        events: list[dict[str, Any]] = [json.loads(line) for line in lines]
        _require("the events are in order", [event["sequence"] for event in events], list(range(1, count + 3)))
        kinds = Counter(event["type"] for event in events)
        fact("events", f"{len(events):,}: " + ", ".join(f"{number:,} {kind}" for kind, number in kinds.items()))
        for event in [*events[:3], None, events[-1]]:
            fact("", "…" if event is None else _shown(event))


def _shown(event: dict[str, Any]) -> str:
    what = event["payload"].get("relative_path") or event["payload"].get("name") or ""
    return f"{event['sequence']:>5}  {event['type']}  {event['id']}  {what}".rstrip()


def _bring_back(url: str, address: str, source: Path, again: Path, count: int) -> None:
    with _step("pull it back by its address") as fact:
        output_of(None, "pull", address, again, url=url)
        wanted = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
        got = {path.relative_to(again) for path in again.rglob("*") if path.is_file()}
        _require("the same files came back", got, wanted)
        different = [path for path in wanted if not filecmp.cmp(source / path, again / path, shallow=False)]
        _require("every file came back as it was", different, [])
        fact("compared", f"{count:,} files, byte for byte")


def _fold_again(settings: Settings) -> None:
    with _step("fold both views again from the log's beginning") as fact:
        _wait_for_views(settings)
        for name in PROJECTIONS:
            before = json.loads(output_of(settings, "digest", name, "--json"))
            after = json.loads(output_of(settings, "replay", name, "--json"))
            fact(name, f"before {before['digest']}")
            fact("", f"after  {after['digest']}")
            wanted = (before["digest"], before["rows"])
            _require(f"a replay of {name} gives the same view", (after["digest"], after["rows"]), wanted)


def _wait_for_views(settings: Settings) -> None:
    """The projections run beside the gateway, and may be a moment behind it."""
    deadline = time.monotonic() + _VIEW_SECONDS
    while any(view["behind"] for view in json.loads(output_of(settings, "status", "--json"))["projections"]):
        if time.monotonic() > deadline:
            raise DemoError(f"the views are still behind the log after {_VIEW_SECONDS:.0f} s")


def _require(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise DemoError(f"{what}: {str(found)[:500]} instead of {str(wanted)[:500]}")


@contextmanager
def _step(title: str) -> Iterator[Callable[[str, str], None]]:
    """A step: its title at once, how long it took when it is done, and below it the facts that it was told."""
    _say(f"• {title} ", end="")
    began = time.monotonic()
    facts: list[str] = []
    yield lambda name, value: facts.append(f"    {name:<9} {value}")
    _say("\n".join([f"({time.monotonic() - began:.1f} s)", *facts]))


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, flush=True)  # noqa: T201  the demonstration is what it prints


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
