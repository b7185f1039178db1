"""One gateway of several processes behind one address.

The first process binds the address once and hands the socket to all others, which take connections from it; it serves
nothing itself. Each of them is a whole gateway: a member of the group of writers with an internal listener of its own.
They share the folder of the writers' state, where every partition has its lock: what one hands over, another goes on
with.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from services.config import Settings
from services.errors import ConfigurationError
from services.processes import PYTHON, Command, RestartRule
from services.processes import run_processes as run_all

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
