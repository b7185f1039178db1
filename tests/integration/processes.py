"""Processes of the product: `serve`, `gateway`, `projector`, and single commands, as users start them.

It needs only what the product needs, so that the demonstration can use it too. A process belongs to a `with` block,
which ends it; if something fails, the error ends with the process's output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from services.config import PREFIX, Settings
from services.views.projections import PROJECTIONS
from tests.services.process import Server, free_ports

COMMAND = [sys.executable, "-m", "services.cli"]
"""The command line, as `artifact-store` runs it, with this very interpreter."""

_OWNED = "artifact_store_partition_owned{"

COMMAND_SECONDS = 120.0
"""How long a single command may take at most."""


class ProductProcess(Server):
    """One long-running command of the product, with settings of its own."""

    name: ClassVar[str] = "artifact-store"
    start_seconds: ClassVar[float] = 60.0

    def __init__(
        self, settings: Settings, folder: Path, *arguments: str, listens: bool = True, port: int | None = None
    ) -> None:
        """`arguments` are the command and its own; one that `listens` does so on `port` and is asked for readiness.

        Its log is `folder`/artifact-store.log; nothing else is written there.
        """
        super().__init__(folder, port)
        self._arguments = arguments
        self._listens = listens
        self._settings = replace(settings, listen=f"127.0.0.1:{self.port}")

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def prepare(self) -> None:
        """Nothing: `migrate` has made what the process needs."""

    def command(self) -> list[str]:
        return [*COMMAND, *self._arguments]

    def environment(self) -> dict[str, str]:
        return {**self._settings.environment(), "PYTHONUNBUFFERED": "1"}

    def answers(self) -> bool:
        """Whether it is ready; a projector is, as soon as it runs: whoever needs a view waits for the view."""
        return not self._listens or get(f"{self.endpoint}/readyz") == 200


def get(url: str) -> int | None:
    """The status of a plain GET; None when nothing answers within two seconds."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310  a loopback address of our own
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return None


def partitions_of(gateway: ProductProcess) -> int:
    """How many partitions the process writes to now, as its metrics say."""
    return sum(int(value) for name, value in metrics_of(gateway).items() if name.startswith(_OWNED))


def metrics_of(gateway: ProductProcess) -> dict[str, float]:
    """What it shows at `/metrics`, by name and labels."""
    with urllib.request.urlopen(f"{gateway.endpoint}/metrics", timeout=10) as answer:  # noqa: S310  as above
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def readiness(gateway: ProductProcess) -> str:
    """The cause that `/readyz` gives for its writer, empty when there is none."""
    try:
        with urllib.request.urlopen(f"{gateway.endpoint}/readyz", timeout=10) as answer:  # noqa: S310 - as above
            found = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        found = json.loads(error.read())
    return found["parts"]["writer"]["cause"] or ""


def run_command(
    settings: Settings | None, *arguments: str | Path, url: str | None = None, seconds: float = COMMAND_SECONDS
) -> subprocess.CompletedProcess[bytes]:
    """Run a command of the product to its end, whatever its exit code; through the gateway at `url` when it is given.

    Without settings it knows `url` alone, as a client's machine would.
    """
    with tempfile.TemporaryDirectory(prefix="artifact-store-client-") as home:
        return subprocess.run(
            [*COMMAND, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd="/",
            env=command_environment(settings, url, home),
            timeout=seconds,
            check=False,
        )


@contextmanager
def started(settings: Settings, folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A command that goes on until it is told to end, and the file in `folder` that its standard error goes to."""
    said = folder / "said"
    environment = command_environment(settings, None, folder)
    with (
        said.open("wb") as log,
        subprocess.Popen([*COMMAND, *arguments], stdin=subprocess.DEVNULL, stderr=log, env=environment) as command,
    ):
        yield command, said


def command_environment(settings: Settings | None, url: str | None, home: str | Path) -> dict[str, str]:
    """What a command needs to know; what it keeps of an interrupted push goes to `home`."""
    given = settings.environment() if settings is not None else {}
    if url is not None:
        given[f"{PREFIX}URL"] = url
    return {**os.environ, **given, "XDG_STATE_HOME": str(home)}


def output_of(settings: Settings | None, *arguments: str | Path, url: str | None = None) -> bytes:
    """The standard output of a command that must succeed. Raises AssertionError with what it said otherwise."""
    done = run_command(settings, *arguments, url=url)
    if done.returncode != 0:
        said = (done.stdout[-2000:] + done.stderr[-4000:]).decode(errors="replace")
        raise AssertionError(f"`{' '.join(map(str, arguments))}` ended with exit code {done.returncode}:\n{said}")
    return done.stdout


@contextmanager
def serving(settings: Settings, folder: Path) -> Iterator[ProductProcess]:
    """Gateway and projections in one process, on parts that are made first."""
    output_of(settings, "migrate")
    with ProductProcess(settings, folder / "serve", "serve") as process:
        yield process


@contextmanager
def deployed(settings: Settings, folder: Path) -> Iterator[Mapping[str, ProductProcess]]:
    """The product as it is scaled out: a gateway and one projector a projection, by the name `gateway` and those
    of the projections."""
    output_of(settings, "migrate")
    ports = free_ports(1 + len(PROJECTIONS))
    processes = {
        "gateway": ProductProcess(settings, folder / "gateway", "gateway", port=ports[0]),
        **{
            name: ProductProcess(settings, folder / name, "projector", name, listens=False, port=port)
            for name, port in zip(PROJECTIONS, ports[1:], strict=True)
        },
    }
    with ExitStack() as stack:
        for name in (*PROJECTIONS, "gateway"):  # the gateway last: it is waited for
            stack.enter_context(processes[name])
        yield processes
