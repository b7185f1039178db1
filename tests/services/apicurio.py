"""Apicurio Registry, which keeps everything in memory: a schema registry with Confluent's interface."""

from __future__ import annotations

from typing import ClassVar

from tests.services.install import apicurio_folder, java
from tests.services.process import Server, is_ok

_OLDEST_JAVA = 21


class ApicurioServer(Server):
    """One registry. `endpoint` is the URL below which Confluent's `/subjects` is."""

    name: ClassVar[str] = "apicurio"
    start_seconds: ClassVar[float] = 300.0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}/apis/ccompat/v7"

    def prepare(self) -> None:
        """Nothing: it has no configuration."""

    def command(self) -> list[str]:
        memory = ["-Xms128m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        listen = ["-Dquarkus.http.host=127.0.0.1", f"-Dquarkus.http.port={self.port}"]
        return [java(_OLDEST_JAVA), *memory, *listen, "-jar", str(apicurio_folder() / "quarkus-run.jar")]

    def answers(self) -> bool:
        return is_ok(f"{self.endpoint}/subjects")
