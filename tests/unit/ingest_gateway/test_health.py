"""A gateway's log lines about components that do not work."""

from __future__ import annotations

import asyncio
import logging

import pytest

from artifact_store.errors import UnavailableError
from ingest_gateway import health
from ingest_gateway.health import Checks, ReadyAnswers


async def _works() -> None:
    return None


async def test_the_log_names_a_component_that_fails_for_more_than_a_moment_once_and_says_when_it_works_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(health, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(health, "WATCH_SECONDS", 0.0)
    caplog.set_level(logging.INFO, "ingest_gateway.health")
    views = iter(["down"] * 3 + ["up"] + ["down"] + ["up"])
    stop = asyncio.Event()

    async def look() -> None:
        found = next(views, None)
        if found is None:
            stop.set()
        if found == "down":
            raise UnavailableError("nothing answers")

    answers = ReadyAnswers(Checks(_works, _works, _works, look))
    await answers.watch(lambda *_: None, stop)
    assert caplog.messages == ["component views fails: nothing answers", "component views works again after 0 s"]
