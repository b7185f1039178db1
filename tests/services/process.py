"""One server process: started detached, and known by pid and start time, so that no other process is ever signalled.

A server outlives the command that started it. A process that wants to stop it later (perhaps days later) adopts it by
`Identity`; a pid that was given to another process meanwhile does not match and is left alone.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

# Below the range that systems draw client ports from (Linux 32768 up, macOS 49152 up): a client that retries a dead
# server could otherwise be given that very port, connect to itself, and keep the server from coming back.
_FIRST_PORT, _LAST_PORT = 20_000, 31_999
_POLL_SECONDS = 0.05

_given: set[int] = set()
"""Ports that were given out, in use or about to be: a stage asks for several before the first server has started."""


def _own_ports(worker: str | None, workers: str | None) -> range:
    """The ports to draw from: of processes of pytest-xdist (`gw0`, `gw1`, …) each has a share of its own."""
    ports = range(_FIRST_PORT, _LAST_PORT + 1)
    return ports if worker is None or workers is None else ports[int(worker.removeprefix("gw")) :: int(workers)]


class ServiceError(Exception):
    """A service cannot be had, or did not start. The text says what to do, or holds the end of its log."""


def free_ports(count: int) -> list[int]:
    """Loopback TCP ports that nothing listens on now, and that this process was not given before."""
    ports = _own_ports(os.environ.get("PYTEST_XDIST_WORKER"), os.environ.get("PYTEST_XDIST_WORKER_COUNT"))
    with ExitStack() as stack:
        found: list[int] = []
        for _ in range(1000):
            if len(found) == count:
                return found
            port = random.choice(ports)
            if port in _given:
                continue
            probe = stack.enter_context(socket.socket())
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            _given.add(port)
            found.append(port)
    raise ServiceError(f"no free port between {_FIRST_PORT} and {_LAST_PORT}")


def becomes_true(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition, at most that long; whether it came. Blocks."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def wait_until(condition: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """Wait for a condition. Blocks; raises ServiceError with the text `otherwise` when it does not come in time."""
    if not becomes_true(condition, seconds):
        raise ServiceError(f"{otherwise} (waited {seconds:.0f} s)")


def is_ok(url: str, *, seconds: float = 1, context: ssl.SSLContext | None = None) -> bool:
    """Whether GET of the URL is answered with 200, within so many seconds. Blocks."""
    try:
        with urllib.request.urlopen(url, timeout=seconds, context=context) as answer:  # noqa: S310 - of a server of ours
            return int(answer.status) == 200
    except OSError:
        return False


@dataclass(frozen=True)
class Identity:
    """A process beyond doubt: its pid and the moment it began, in the system's own notation."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> Identity | None:
        """The identity of a running process; None when it is gone or only waits to be reaped."""
        if Path("/proc/self/stat").exists():
            try:
                fields = (
                    Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
                )
            except OSError:
                return None
            return None if fields[0] in "ZX" else cls(pid, fields[19])
        shown = subprocess.run(
            ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
        ).stdout.strip()
        state, _, started = shown.partition(" ")
        return cls(pid, started.strip()) if state and not state.startswith("Z") else None

    @property
    def running(self) -> bool:
        return Identity.of(self.pid) == self


def _children(pid: int) -> list[int]:
    """Direct children of a process (PostgreSQL's server processes; the others have none)."""
    if Path("/proc/self/stat").exists():
        pairs = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = entry.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            except OSError:
                continue  # gone meanwhile
            pairs.append((int(entry.parent.name), int(fields[1])))
    else:
        shown = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        pairs = [(int(line.split()[0]), int(line.split()[1])) for line in shown.splitlines()]
    return [child for child, parent in pairs if parent == pid]


def _stands(pid: int) -> bool:
    """Whether a process is stopped, in all its threads where the system shows them, or is gone."""
    try:
        if not Path("/proc/self/stat").exists():
            shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
            return shown.stdout.strip()[:1] in {"T", "Z", ""}
        states = {
            stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
            for stat in Path(f"/proc/{pid}/task").glob("*/stat")
        }
    except OSError:  # it went, or a thread of it did
        return Identity.of(pid) is None
    return states <= set("TtZX")


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


class Server(ABC):
    """A server on one loopback port with its data in one folder. Every method blocks until what it says is true.

    As a context manager it is private: started on entry, stopped and its data deleted on exit.
    """

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    start_seconds: ClassVar[float] = 90.0
    stop_seconds: ClassVar[float] = 30.0

    def __init__(self, folder: Path, port: int | None = None) -> None:
        """`folder` takes configuration, log and (mostly) data; it is made when it is missing. No port: a free one."""
        self.folder = folder.absolute()
        self.port = port if port is not None else free_ports(1)[0]
        self.identity: Identity | None = None
        self._child: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def endpoint(self) -> str:
        """What a client connects to."""

    @abstractmethod
    def prepare(self) -> None:
        """Make configuration and data for the first start; must be safe to repeat on what is there."""

    @abstractmethod
    def command(self) -> list[str]:
        """The command line; it must become the server itself, not a parent of it."""

    @abstractmethod
    def answers(self) -> bool:
        """Whether the server takes requests now. Blocks a second at most."""

    def environment(self) -> dict[str, str]:
        """Variables beyond those of this process."""
        return {}

    def user(self) -> str | None:
        """The system user to run as; None for the present one."""
        return None

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def pid(self) -> int:
        """Raises ServiceError when it does not run."""
        if self.identity is None:
            raise ServiceError(f"{self.name} does not run")
        return self.identity.pid

    @property
    def running(self) -> bool:
        return self.identity is not None and self.identity.running

    def adopt(self, identity: Identity) -> None:
        """Take over a server that another process started with the same folder and port, if it still runs."""
        self.identity = identity if identity.running else None

    def start(self) -> None:
        """Start and wait until it answers. Raises ServiceError with the end of its log when it does not."""
        if self.running:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._refuse_used_port()
        self.prepare()
        user = self.user()
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={**os.environ, **self.environment()},
                start_new_session=True,
                user=user,
                group=user,
                extra_groups=[] if user else None,
            )
        self.identity = Identity.of(self._child.pid)
        try:
            self._await_answer()
        except BaseException:
            self.kill()
            raise

    def _refuse_used_port(self) -> None:
        """Otherwise a stranger of the same kind could answer for a server that is about to fail."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections do not count
            try:
                probe.bind(("127.0.0.1", self.port))
                probe.listen()
            except OSError as error:
                raise ServiceError(f"port {self.port} of {self.name} is in use by another process") from error

    def _await_answer(self) -> None:
        deadline = time.monotonic() + self.start_seconds
        while True:
            if not self.running:
                raise ServiceError(f"{self.name} ended while it started:\n{self.end_of_log()}")
            if self.answers():
                return
            if time.monotonic() > deadline:
                raise ServiceError(f"{self.name} gave no answer in {self.start_seconds:.0f} s:\n{self.end_of_log()}")
            time.sleep(_POLL_SECONDS)

    @property
    def exit_code(self) -> int | None:
        """Of the process that was started last, negative for a signal; None while it runs, or when it was adopted."""
        return None if self._child is None else self._child.poll()

    def end_of_log(self) -> str:
        """For messages: where the log is, and its last lines."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return f"… of {self.log}:\n" + "\n".join(text.splitlines()[-25:])

    def stop(self) -> None:
        """End it in order; by force after `stop_seconds`. Data stays."""
        if self.running:
            self.thaw()
            _send(self.pid, self.stop_signal)
            if self._gone_within(self.stop_seconds):
                self.identity = None
                return
        self.kill()

    def kill(self) -> None:
        """SIGKILL, as a machine that lost power would do it, children included. Data stays."""
        if self.running:
            children = [identity for pid in _children(self.pid) if (identity := Identity.of(pid))]
            _send(self.pid, signal.SIGKILL)
            for child in children:
                if child.running:
                    _send(child.pid, signal.SIGKILL)
            if not self._gone_within(10.0) or not becomes_true(
                lambda: not any(child.running for child in children), 10.0
            ):
                raise ServiceError(f"{self.name} (pid {self.pid}) outlives SIGKILL")
        elif self._child is not None:
            self._child.wait(timeout=10)
        self.identity = None

    def _gone_within(self, seconds: float) -> bool:
        if not becomes_true(lambda: not self.running, seconds):
            return False
        if self._child is not None:
            self._child.wait(timeout=10)
        return True

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered."""
        for pid in (self.pid, *_children(self.pid)):
            _send(pid, signal.SIGSTOP)
            wait_until(partial(_stands, pid), 10, f"process {pid} of {self.name} does not stop")

    def thaw(self) -> None:
        """SIGCONT: go on where `freeze` stopped it."""
        for pid in (*_children(self.pid), self.pid):
            _send(pid, signal.SIGCONT)

    def restart(self) -> None:
        """Start again on the same port and data; stops it first when it still runs."""
        self.stop()
        self.start()

    def close(self) -> None:
        """Stop, and delete the data."""
        self.stop()
        self.delete()

    def delete(self) -> None:
        """Delete configuration, log and data of a server that does not run."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.delete()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
