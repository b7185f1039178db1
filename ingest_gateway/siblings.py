"""Metrics of a gateway of several processes: whichever is asked shows those of all, each with its number.

A Prometheus that asks at the common address would otherwise see now the counters of one process, now of another.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from artifact_store.errors import ConfigurationError
from services.config import Settings
from services.processes import PYTHON, Command, RestartRule
from services.processes import run_processes as run_all

_PATIENCE_SECONDS = 2.0
_UP = "artifact_store_process_up"


class Siblings:
    """What the processes of one gateway tell each other. Belongs to one event loop."""

    def __init__(self, member: Member, own: Callable[[], bytes]) -> None:
        """`own` gives this process's metrics in Prometheus' text format."""
        self._member = member
        self._own = own

    @asynccontextmanager
    async def telling(self) -> AsyncIterator[None]:
        """Give this process's metrics to the others for the length of the block."""

        async def tell(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                writer.write(self._own())
                await writer.drain()
            except OSError:
                pass  # whoever asked waits no longer
            finally:
                writer.close()

        server = await asyncio.start_unix_server(tell, self._member.path_of(self._member.number))
        try:
            yield
        finally:
            server.close()

    async def exposition(self) -> bytes:
        """The metrics of all processes in Prometheus' text format, those of one that does not answer missing."""
        numbers = range(1, self._member.count + 1)
        texts = await asyncio.gather(*(self._of(number) for number in numbers))
        return await asyncio.to_thread(merged, dict(zip(numbers, texts, strict=True)))

    async def _of(self, number: int) -> bytes | None:
        if number == self._member.number:
            return self._own()
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                reader, writer = await asyncio.open_unix_connection(self._member.path_of(number))
                try:
                    return await reader.read() or None
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return None


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def merged(texts: Mapping[int, bytes | None]) -> bytes:
    """One exposition of several, by process number: every sample gets the label `process`, None is one that is down."""
    up = Metric(_UP, "Whether the process gave its metrics", "gauge")
    families = {_UP: up}
    for number, text in texts.items():
        label = {"process": str(number)}
        up.add_sample(_UP, label, 0.0 if text is None else 1.0)
        for family in text_string_to_metric_families((text or b"").decode()):
            into = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                into.add_sample(sample.name, {**sample.labels, **label}, sample.value)
    return generate_latest(_Families(families.values()))


MOST_DEATHS = 5
"""After so many deaths in a row of one process the whole gateway ends, so that whoever watches over it notices."""

_WRONG_SETTINGS = 2


@dataclass(frozen=True)
class Member:
    """Which of the processes one is, counted from 1, and what it shares with the others.

    `descriptor` is that of the listening socket; in `folder` each has a socket by which the others get its metrics.
    """

    number: int
    count: int
    descriptor: int
    folder: str

    def text(self) -> str:
        """For the command line of the process."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Self:
        """What `text` gave."""
        return cls(**json.loads(text))

    def path_of(self, number: int) -> Path:
        """Where process `number` gives its metrics."""
        return Path(self.folder) / f"{number}.sock"


async def run_processes(
    settings: Settings, command: str, processes: int, listener: socket.socket, stop: asyncio.Event
) -> int:
    """Run so many processes of `command` on the socket until `stop` is set, then tell them to stop; the exit code.

    Blocks until all have ended. The code is 0 when they were told to end and did so. A process that dies is started
    again; one that says that the settings are wrong (exit code 2), or that died MOST_DEATHS times in a row, ends all.
    Closes the socket as soon as they are to end.

    Raises ConfigurationError: the internal listeners cannot have addresses of their own.
    """
    rule = RestartRule(final=frozenset({_WRONG_SETTINGS}), all_or_none=True, most_deaths=MOST_DEATHS)
    with tempfile.TemporaryDirectory(prefix="artifact-store-") as folder:
        commands = []
        for number in range(1, processes + 1):
            member = Member(number, processes, listener.fileno(), folder)
            own = settings.model_copy(update=internal_addresses(settings, number, processes))
            arguments = [*PYTHON, "-m", "services.cli", command, "--member", member.text()]
            commands.append(Command(arguments, {**os.environ, **own.environment()}, (listener.fileno(),)))
        # Connections that nobody takes any more are to be refused rather than to wait.
        return await run_all(commands, rule, stop, when_ending=listener.close)


def internal_addresses(settings: Settings, number: int, processes: int) -> dict[str, str]:
    """The settings of the internal listener of process `number`: its port counts up, unless any will do.

    Raises ConfigurationError.
    """
    host, _, port = settings.internal_listen.rpartition(":")
    if not port.isascii() or not port.isdigit() or int(port) == 0:  # one that is no number is refused where it is used
        if settings.internal_url is not None:
            raise ConfigurationError(
                "with several processes ARTIFACT_STORE_INTERNAL_URL needs a fixed port in "
                "ARTIFACT_STORE_INTERNAL_LISTEN: each process takes the next one"
            )
        return {}
    if int(port) + processes - 1 > 65_535:
        raise ConfigurationError(f"ARTIFACT_STORE_INTERNAL_LISTEN leaves no ports for {processes} processes")
    found = {"internal_listen": f"{host}:{int(port) + number - 1}"}
    if settings.internal_url is not None:
        found["internal_url"] = _counted_up(settings.internal_url, number - 1)
    return found


def _counted_up(url: str, by: int) -> str:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        port = None
    if port is None:
        raise ConfigurationError(
            "with several processes ARTIFACT_STORE_INTERNAL_URL must name a port: each process takes the next one"
        )
    return parts._replace(netloc=f"{parts.netloc.rpartition(':')[0]}:{port + by}").geturl()
