"""Alerts fire for their failure and nothing else, are explained in the runbooks, and reach the cluster."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.helm import CHART, render, value_sets
from tests.services.install import promtool

PROJECT = CHART.parents[1]
RULES = CHART / "files" / "alerts.yaml"
TESTS = Path(__file__).parent / "alerts" / "alerts.yaml"

pytestmark = pytest.mark.timeout(1900)


def _alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for rule in group["rules"] if "alert" in rule]


def test_prometheus_accepts_the_rules_and_each_fires_as_its_test_says() -> None:
    done = subprocess.run([promtool(), "test", "rules", str(TESTS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_rule_that_does_not_fire_fails_its_test(tmp_path: Path) -> None:
    wrong = RULES.read_text(encoding="utf-8").replace('component="views"}) == 0', 'component="views"}) == 2')
    (tmp_path / "alerts.yaml").write_text(wrong, encoding="utf-8")
    tests = yaml.safe_load(TESTS.read_text(encoding="utf-8"))
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump({**tests, "rule_files": ["alerts.yaml"]}), encoding="utf-8")
    command = [promtool(), "test", "rules", str(tmp_path / "tests.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ArtifactStoreViewsAway" in done.stdout + done.stderr


def test_each_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    checks = [check for test in yaml.safe_load(TESTS.read_text())["tests"] for check in test["alert_rule_test"]]
    fires = {check["alertname"] for check in checks if check["exp_alerts"]}
    quiet = {check["alertname"] for check in checks if not check["exp_alerts"]}
    assert fires == quiet == {rule["alert"] for rule in _alerts()}


def test_each_alert_has_a_section_in_the_runbooks_that_its_annotation_leads_to() -> None:
    text = (PROJECT / "docs" / "runbooks.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (ArtifactStore\w+)$", text, re.MULTILINE)
    assert sections == [rule["alert"] for rule in _alerts()]
    for rule in _alerts():
        assert rule["annotations"]["runbook"] == f"docs/runbooks.md#{rule['alert'].lower()}"


def test_rules_use_metrics_that_there_are() -> None:
    catalogue = (PROJECT / "docs" / "metrics.md").read_text(encoding="utf-8")
    (group,) = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    used = {name for rule in group["rules"] for name in re.findall(r"artifact_store_\w+", rule["expr"])}
    used = {re.sub("_(bucket|count)$", "", name) for name in used}
    assert sorted(name for name in used if f"`{name}`" not in catalogue) == []


def test_the_chart_gives_the_rules_and_every_metrics_port_to_the_operator_when_asked() -> None:
    documents = render(value_sets()["full"])
    (rule,) = (document for document in documents if document["kind"] == "PrometheusRule")
    assert rule["spec"] == yaml.safe_load(RULES.read_text(encoding="utf-8"))
    monitors = [document for document in documents if document["kind"] == "PodMonitor"]
    pods = [d["spec"]["template"] for d in documents if d["kind"] == "Deployment"]
    for pod in pods:
        (monitor,) = (
            m for m in monitors if m["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        )
        assert monitor["metadata"]["labels"]["release"] == "prometheus"
        ports = {port["name"] for container in pod["spec"]["containers"] for port in container["ports"]}
        watched = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
        assert watched == {name for name in ports if name.startswith("metrics")}
    assert len(monitors) == len(pods)
    assert {"PodMonitor", "PrometheusRule"}.isdisjoint(document["kind"] for document in render())


def test_the_chart_gives_the_dashboard_to_grafanas_sidecar_when_asked() -> None:
    documents = render(value_sets()["full"])
    (dashboard,) = (d for d in documents if "grafana_dashboard" in d["metadata"].get("labels", {}))
    assert (dashboard["kind"], dashboard["metadata"]["labels"]["grafana_dashboard"]) == ("ConfigMap", "1")
    text = dashboard["data"]["artifact-store.json"]
    assert json.loads(text) == json.loads((RULES.parent / "dashboard.json").read_text(encoding="utf-8"))
    assert not any("dashboard" in d["metadata"]["name"] for d in render(value_sets()["scaled"]))
