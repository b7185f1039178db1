"""One gateway of several processes behind one address.

The first process binds the address once and hands the socket to all others, which accept connections from it; it serves
no requests itself. Each of the others is a whole gateway: a member of the group of writers with its own internal
listener. They share the folder of the writers' state, where a lock guards each partition, so that one process continues
where another stopped.

Whichever process a scrape reaches answers with the metrics of all, each labelled with its process number. Otherwise
Prometheus would see the counters of a different process at each scrape.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from prometheus_client import Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from artifact_store.errors import ConfigurationError
from artifact_store.rules import parse_number
from services.config import Settings
from services.runtime.processes import PYTHON, Command, RestartRule
from services.runtime.processes import run_processes as run_all

_PATIENCE_SECONDS = 2.0


class Siblings:
    """Exchanges metrics between the processes of one gateway. Belongs to one event loop."""

    def __init__(self, member: Member, own: Callable[[], bytes]) -> None:
        """`own` gives this process's metrics in Prometheus' text format."""
        self._member = member
        self._own = own

    @asynccontextmanager
    async def telling(self) -> AsyncIterator[None]:
        """Within the block, serve this process's metrics to the others."""

        async def tell(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                writer.write(self._own())
                await writer.drain()
            except OSError:
                pass  # the other process stopped waiting
            finally:
                writer.close()

        server = await asyncio.start_unix_server(tell, self._member.path_of(self._member.number))
        try:
            yield
        finally:
            server.close()

    async def exposition(self) -> bytes:
        """The metrics of all processes in Prometheus' text format, without those of a process that does not answer."""
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
    """Merge expositions, given by process number; every sample gets the label `process`. None: a process is down."""
    up = GaugeMetricFamily(
        "artifact_store_process_up",
        "1 for each process behind the same address, 0 for one that did not answer",
        labels=["process"],
    )
    families: dict[str, Metric] = {up.name: up}
    for number, text in texts.items():
        label = {"process": str(number)}
        up.add_metric([str(number)], 0.0 if text is None else 1.0)
        for family in text_string_to_metric_families((text or b"").decode()):
            into = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                into.add_sample(sample.name, {**sample.labels, **label}, sample.value)
    return generate_latest(_Families(families.values()))


MOST_DEATHS = 5
"""Consecutive deaths of one process after which the whole gateway ends, so that its service manager notices."""

_WRONG_SETTINGS = 2


@dataclass(frozen=True)
class Member:
    """The number of one process, counted from 1, and what it shares with the others.

    `descriptor` is the listening socket's. Each process has a socket in `folder` at which the others fetch its metrics.
    """

    number: int
    count: int
    descriptor: int
    folder: str

    def text(self) -> str:
        """The member as text, for the command line of the process."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `text` returned."""
        return cls(**json.loads(text))

    def path_of(self, number: int) -> Path:
        """The path of the socket at which process `number` serves its metrics."""
        return Path(self.folder) / f"{number}.sock"


async def run_processes(
    settings: Settings, command: str, processes: int, listener: socket.socket, stop: asyncio.Event
) -> int:
    """Run `processes` processes of `command` on the socket until `stop` is set; returns the exit code.

    Returns when all have ended: 0 if they ended because they were told to. A process that dies is restarted. All end
    when one reports wrong settings (exit code 2) or dies MOST_DEATHS times in a row. Closes the socket as soon as the
    processes are told to stop.

    Raises ConfigurationError: `internal_listen` or `internal_url` cannot give each process an address of its own.
    """
    rule = RestartRule(final=frozenset({_WRONG_SETTINGS}), all_or_none=True, most_deaths=MOST_DEATHS)
    with tempfile.TemporaryDirectory(prefix="artifact-store-") as folder:
        commands = []
        for number in range(1, processes + 1):
            member = Member(number, processes, listener.fileno(), folder)
            own = replace(settings, **internal_addresses(settings, number, processes))
            arguments = [*PYTHON, "-m", "services.cli", command, "--member", member.text()]
            commands.append(Command(arguments, {**os.environ, **own.environment()}, (listener.fileno(),)))
        # From then on new connections are refused, because nobody would accept them.
        return await run_all(commands, rule, stop, when_ending=listener.close)


def internal_addresses(settings: Settings, number: int, processes: int) -> dict[str, Any]:
    """Settings of the internal listener of process `number`: each takes the next port. Empty if any port will do.

    Raises ConfigurationError: no fixed port for `internal_url` to name, or not enough ports.
    """
    host, _, port = settings.internal_listen.rpartition(":")
    first = parse_number(port)
    if not first:  # an invalid port is refused where it is used
        if settings.internal_url is not None:
            raise ConfigurationError(
                "with several processes ARTIFACT_STORE_INTERNAL_URL needs a fixed port in "
                "ARTIFACT_STORE_INTERNAL_LISTEN: each process takes the next one"
            )
        return {}
    if first + processes - 1 > 65_535:
        raise ConfigurationError(f"ARTIFACT_STORE_INTERNAL_LISTEN leaves no ports for {processes} processes")
    found = {"internal_listen": f"{host}:{first + number - 1}"}
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
