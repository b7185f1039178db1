"""Finds the modules of the product that a piece of work enters, in all threads of this process."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_PRODUCT = ("artifact_store", "schemas", "services", "ingest_gateway", "projector")


class EnteredModules:
    """Install it before the work's threads start: a profile reaches only the threads that begin after it."""

    def __init__(self) -> None:
        self._recording = False
        self._found: set[str] = set()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Watch every call of this process for the length of the block."""
        threading.setprofile(self._called)
        sys.setprofile(self._called)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    @contextmanager
    def recorded(self) -> Iterator[set[str]]:
        """The modules that are entered inside the block."""
        found: set[str] = set()
        self._found = found
        self._recording = True
        try:
            yield found
        finally:
            self._recording = False

    def _called(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and self._recording:
            name = frame.f_globals.get("__name__", "")
            if name.partition(".")[0] in _PRODUCT:
                self._found.add(name)
