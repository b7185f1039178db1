"""Finds the members of a consumer group in a child process.

librdkafka aborts the process that describes a group if the connection to the group's coordinator breaks at the wrong
moment (confluentinc/librdkafka#4605; its fix, #5397, is not released). A gateway asks all the time, and must survive
this. So a child process asks, and is restarted if it dies.

The two exchange lines of JSON: the connection's settings, then the name of a group for each request. The settings go
through the pipe, so that the command line contains no secret. The child ends when its standard input ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from selectors import EVENT_READ, DefaultSelector
from threading import Lock
from typing import IO, Any, cast

from artifact_store.errors import ArtifactStoreError, ConfigurationError, UnavailableError
from services.log.kafka.cluster import ANSWER_SECONDS, Cluster, Member, Shared
from services.log.kafka.connection import KafkaSettings

_CHILD = "from services.log.kafka.group_process import main; main()"
_CHILD_SECONDS = ANSWER_SECONDS + 5.0
"""A child that has not answered after this long is ended: its client may be stuck, or the process frozen."""

_PIECE_BYTES = 65_536


class GroupProcess:
    """Describes groups through a child process. Every method may be called from any thread."""

    def __init__(self, kafka: KafkaSettings) -> None:
        """Does not start the child yet."""
        self._kafka = kafka
        self._asking = Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._answers: dict[str, Shared[Mapping[str, Any]]] = {}
        """By group."""

    def members(self, group: str) -> list[Member] | None:
        """As `Cluster.members`. Blocks for at most twice _CHILD_SECONDS. Simultaneous callers share an answer.

        Raises UnavailableError, ConfigurationError.
        """
        answer = self._answers.setdefault(group, Shared(partial(self._answer, group))).answer()
        if (detail := answer.get("error")) is not None:
            raise ConfigurationError(detail) if answer["lasting"] else UnavailableError(detail)
        found = answer["members"]
        return None if found is None else [Member(m, client_id, frozenset(parts)) for m, client_id, parts in found]

    def close(self) -> None:
        """End the child."""
        with self._asking:
            self._end()

    def _answer(self, group: str) -> Mapping[str, Any]:
        with self._asking:
            return self._asked(group)

    def _asked(self, group: str) -> Mapping[str, Any]:
        line = json.dumps(group).encode() + b"\n"
        for _ in range(2):  # the child may have died since the last request, or die during this one
            try:
                child = self._child or self._start()
                cast("IO[bytes]", child.stdin).write(line)
                found: Mapping[str, Any] = json.loads(_line(cast("IO[bytes]", child.stdout).fileno(), _CHILD_SECONDS))
            except (BrokenPipeError, EOFError):
                self._end()
            except TimeoutError:
                self._end()
                break
            else:
                return found
        return {"error": "nobody says who the members of the group are", "lasting": False}

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: no module of the current folder may replace one of ours.
        command = [sys.executable, "-P", "-c", _CHILD]
        child = subprocess.Popen(  # noqa: S603 - nothing in it comes from outside
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self._child = child
        cast("IO[bytes]", child.stdin).write(json.dumps(asdict(self._kafka)).encode() + b"\n")
        return child

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            with child:  # closes the pipes and waits
                pass


def _line(pipe: int, seconds: float) -> bytes:
    """The next line. Raises EOFError if the pipe ends, TimeoutError if the time is over."""
    deadline = time.monotonic() + seconds
    found = b""
    with DefaultSelector() as selector:
        selector.register(pipe, EVENT_READ)
        while not found.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            if not (piece := os.read(pipe, _PIECE_BYTES)):
                raise EOFError
            found += piece
    return found


def main() -> None:
    """The child: answers until its standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal also sends it to the parent, which ends us
    cluster = Cluster(KafkaSettings(**json.loads(sys.stdin.buffer.readline())))
    for line in sys.stdin.buffer:
        answer: Mapping[str, Any]
        try:
            members = cluster.members(json.loads(line))
            told = None if members is None else [(m.member_id, m.client_id, sorted(m.partitions)) for m in members]
            answer = {"members": told}
        except ArtifactStoreError as error:
            answer = {"error": error.detail, "lasting": isinstance(error, ConfigurationError)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
