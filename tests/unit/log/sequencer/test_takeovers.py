"""Failing take-overs: how long a process tries before it leaves its partitions to others, and what it shows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from artifact_store.errors import ConfigurationError, CorruptError, LogIdentityError, UnavailableError
from services.log.sequencer import partition_writer as writer_module
from services.log.sequencer.partition_writer import PartitionWriter
from services.log.sequencer.queue import Counts
from services.log.state.state_file import Irregular


class Clock:
    """The writer's monotonic clock."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(writer_module, "time", made)
    monkeypatch.setattr(writer_module, "_RETRY_SECONDS", (0.0,))
    return made


class Scene:
    """A writer each of whose leases does the next of some steps, and ends when there are none left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], None]) -> None:
        self.given_way = False
        """Whether others were to write at the end."""
        self.counts = Counts()
        self.progressed: Callable[[], None] = lambda: None
        left: Iterator[Callable[[], None]] = iter(steps)
        scene = self

        class Lease:
            """Fails as the step does, while taking over; `serve` has it take over first."""

            def __init__(self, *_: object, progressed: Callable[[], None], **__: object) -> None:
                scene.progressed = progressed
                self.state = SimpleNamespace(irregular=Irregular(), memory_only=None, last_created_at=1)
                self.restored_from, self.exclusive, self.losses, self.stopped = "log", True, (), None
                self._step = next(left, scene.end)
                if getattr(self._step, "__name__", "") != "serve":
                    self._step()

            def require_whole(self) -> None:
                pass

            def tidy(self) -> float:
                self._step()
                return 0.0

            def idle(self) -> None:
                pass

            def close(self) -> None:
                pass

        monkeypatch.setattr(writer_module, "_IDLE_SECONDS", 0.0)

        context = SimpleNamespace(
            loop=asyncio.get_running_loop(),
            submit_seconds=30.0,
            counts=self.counts,
            clock=lambda: 1,
            driver=SimpleNamespace(take_over=Lease, require=lambda *_: None, refusal=lambda _: None, cause=str),
            **dict.fromkeys(["limits", "put_manifest"]),
        )
        self.writer = PartitionWriter(0, cast("Any", context))

    def end(self) -> None:
        """What follows the steps."""
        self.given_way = self.writer.leave_to_others is not None
        self.writer.stop()

    async def played(self) -> None:
        """Wait until the last step is done."""
        self.writer.start()
        assert await asyncio.to_thread(self.writer.join, 30)


async def test_a_take_over_that_fails_for_long_is_left_to_others(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        clock.now += 15
        raise UnavailableError("the partition has no leader")

    scene = Scene(monkeypatch, fail)
    await scene.played()
    assert not scene.given_way
    scene = Scene(monkeypatch, fail, fail)
    await scene.played()
    assert scene.given_way


async def test_one_failure_behind_a_long_take_over_that_got_on_gives_nothing_away(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def long() -> None:
        for _ in range(10):
            clock.now += 10
            scene.progressed()
        raise UnavailableError("the broker was restarted")

    scene = Scene(monkeypatch, long, long)
    await scene.played()
    assert not scene.given_way


@pytest.mark.parametrize("error", [UnavailableError("fenced"), ConfigurationError("no right")])
async def test_one_failure_behind_a_long_tenure_or_a_long_refusal_gives_nothing_away(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def serve() -> None:
        clock.now += 1_000
        raise error

    def fail() -> None:
        raise UnavailableError("the partition has no leader")

    def refuse_all(_error: Exception, seconds: float) -> None:
        clock.now += seconds

    scene = Scene(monkeypatch, serve, fail)
    monkeypatch.setattr(scene.writer, "_refuse_all", refuse_all)
    await scene.played()
    assert not scene.given_way


@pytest.mark.parametrize("error", [ConfigurationError("no right"), LogIdentityError("anew")])
@pytest.mark.usefixtures("clock")
async def test_a_partition_that_refuses_everything_is_not_shown_as_owned(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    since: list[int | None] = []

    def serve() -> None:
        since.append(scene.writer.status("this process").since)
        raise error

    def refuse_all(_error: Exception, _seconds: float) -> None:
        since.append(scene.writer.status("this process").since)

    scene = Scene(monkeypatch, serve)
    monkeypatch.setattr(scene.writer, "_refuse_all", refuse_all)
    await scene.played()
    assert since == [1, None]
    assert scene.counts.failed_takeovers == 1


@pytest.mark.usefixtures("clock")
async def test_a_log_that_contradicts_a_lease_is_taken_over_again_before_everything_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only a take-over tells whether it lost events, which an operator can accept."""
    happened: list[str] = []

    def serve() -> None:
        happened.append("served")
        raise CorruptError("cut short")

    def fail() -> None:
        happened.append("not taken over")
        raise CorruptError("cut short")

    scene = Scene(monkeypatch, serve, fail)
    monkeypatch.setattr(scene.writer, "_refuse_all", lambda _error, _seconds: happened.append("refused"))
    await scene.played()
    assert happened == ["served", "not taken over", "refused"]
