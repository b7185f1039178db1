"""Prometheus, which scrapes given addresses and evaluates the chart's rules, or faster ones."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from tests.services.install import prometheus_binary
from tests.services.process import Server, is_ok

RULES = Path(__file__).resolve().parents[2] / "helm" / "artifact-store" / "files" / "alerts.yaml"


def hastened_rules(folder: Path, times: int) -> Path:
    """A file with the rules of the chart in which only times differ: each second, and `for` so many times shorter."""
    found = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    units = {"s": 1000, "m": 60_000, "h": 3_600_000}
    for group in found["groups"]:
        group["interval"] = "1s"
        for rule in group["rules"]:
            if "for" in rule:
                rule["for"] = f"{int(rule['for'][:-1]) * units[rule['for'][-1]] // times}ms"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "hastened.yml"
    file.write_text(yaml.safe_dump(found), encoding="utf-8")
    return file


class PrometheusServer(Server):
    """One Prometheus. `targets` are the jobs' addresses, HOST:PORT; each is scraped every `scrape_seconds`."""

    name: ClassVar[str] = "prometheus"

    def __init__(
        self,
        folder: Path,
        targets: Mapping[str, Sequence[str]],
        port: int | None = None,
        *,
        scrape_seconds: int = 1,
        rules: Path = RULES,
    ) -> None:
        super().__init__(folder, port)
        self._rules = rules
        self._targets = targets
        self._scrape_seconds = scrape_seconds

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def prepare(self) -> None:
        """Write the configuration."""
        jobs = [
            {"job_name": job, "static_configs": [{"targets": list(addresses)}]}
            for job, addresses in self._targets.items()
        ]
        configuration = {
            "global": {
                "scrape_interval": f"{self._scrape_seconds}s",
                "scrape_timeout": f"{self._scrape_seconds}s",
                "evaluation_interval": "1s",
            },
            "rule_files": [str(self._rules)],
            "scrape_configs": jobs,
        }
        # JSON is YAML.
        (self.folder / "prometheus.yml").write_text(json.dumps(configuration), encoding="utf-8")

    def command(self) -> list[str]:
        return [
            prometheus_binary(),
            f"--config.file={self.folder}/prometheus.yml",
            f"--storage.tsdb.path={self.folder}/data",
            f"--web.listen-address={self.endpoint}",
        ]

    def environment(self) -> dict[str, str]:
        return {}

    def answers(self) -> bool:
        return is_ok(f"http://{self.endpoint}/-/ready", seconds=2)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that the expression gives now. Raises AssertionError when Prometheus refuses it. Blocks."""
        parameters = urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(f"http://{self.endpoint}/api/v1/query?{parameters}", timeout=10) as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{expression}: {error.read().decode()}") from None
        return list(found["data"]["result"])
