"""The operating guide's section on Kubernetes fits the chart: values, Secret, objects, and a Job made of another."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from services.cli import main
from tests.chart.commands import containers
from tests.chart.helm import CHART, NEWEST_KUBERNETES, render, template
from tests.documents import blocks

pytestmark = pytest.mark.timeout(1900)  # as in test_chart.py

GUIDE = (CHART.parents[1] / "docs" / "operating.md").read_text(encoding="utf-8")
SECTION = GUIDE.partition("\n## Kubernetes\n")[2].partition("\n## ")[0]
COMMANDS = "\n".join(re.findall(r"```sh\n(.*?)```", SECTION, re.DOTALL)).replace("\\\n", " ")


@pytest.fixture
def values(tmp_path: Path) -> list[Path]:
    """The guide's values, as a file."""
    path = tmp_path / "values.yaml"
    path.write_text(blocks("docs/operating.md")["values"], encoding="utf-8")
    return [path]


def test_the_values_install_the_image_that_was_pushed(values: list[Path]) -> None:
    (pushed,) = re.findall(r"docker push (\S+)", COMMANDS)
    assert {container["image"] for document in render(values) for container in containers(document)} == {pushed}
    assert f"make image TAG={pushed}\n" in COMMANDS


def test_the_secret_has_the_keys_that_the_chart_looks_for() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    keys = {name: where["key"] for name, where in values["secrets"].items() if where is not None}
    views = {keys["ARTIFACT_STORE_VIEWS_URL"]}
    store = {keys["ARTIFACT_STORE_S3_ACCESS_KEY"], keys["ARTIFACT_STORE_S3_SECRET_KEY"]}
    made = re.findall(r"create secret generic (\S+)((?: +--from-literal=\S+)+)", COMMANDS)
    assert {name: set(re.findall(r"--from-literal=([\w-]+)=", rest)) for name, rest in made} == {
        values["gateway"]["secretName"]: {*keys.values()},
        values["projector"]["secretName"]: views,
        values["webhooks"]["secretName"]: views,
        values["migration"]["secretName"]: views | store,
        "artifact-store-verify": views | store,
    }


def test_commands_run_in_pods_that_there_are(values: list[Path]) -> None:
    (release,) = re.findall(r"helm --namespace store install (\S+)", COMMANDS)
    documents = yaml.safe_load_all(template(values, release=release))
    deployments = {document["metadata"]["name"] for document in documents if document["kind"] == "Deployment"}
    ran = re.findall(r"exec deployment/(\S+) -- artifact-store (\w+)(.*)", COMMANDS)
    assert {name for _, name, _ in ran} == {"status", "doctor", "parked"}
    for deployment, name, arguments in ran:
        assert deployment in deployments
        main.commands[name].make_context(name, arguments.split())


def test_the_migration_becomes_another_job(values: list[Path]) -> None:
    (edit,) = re.findall(r"\|\s+(sed -n .*?)\s+\| kubectl", COMMANDS)
    hooks = template(values, release="artifact-store")
    done = subprocess.run(["/bin/sh", "-c", edit], input=hooks, capture_output=True, text=True, check=True)
    job = next(yaml.safe_load_all(done.stdout))
    assert job["kind"] == "Job"
    kubernetes_validate.validate(job, NEWEST_KUBERNETES, strict=True)
    (container,) = containers(job)
    assert container["command"] == ["artifact-store", "verify", "--bytes"]
    assert job["metadata"]["name"] == "artifact-store-verify"
    assert not job["metadata"]["annotations"]
    assert "activeDeadlineSeconds" not in job["spec"]
    assert job["spec"]["backoffLimit"] == 0, "`verify` that finds something is not to be run again"
    secrets = {
        e["valueFrom"]["secretKeyRef"]["name"] for e in container["env"] if "secretKeyRef" in e.get("valueFrom", {})
    }
    assert secrets == {"artifact-store-verify"}, "the users of the migration cannot read the log"
    assert job["spec"]["template"]["spec"]["serviceAccountName"] == "artifact-store-migration"
