"""Metrics of a gateway of several processes: whichever is asked shows those of all, each with its number.

A Prometheus that asks at the common address would otherwise see now the counters of one process, now of another.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager

from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from ingest_gateway.processes import Member

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
