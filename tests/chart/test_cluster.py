"""The chart on a real Kubernetes with simulated nodes: installed, upgraded, rolled back, scaled, drained."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.helm import CHART, VALUES, helm_binary, template, value_sets
from tests.documents import blocks
from tests.services.install import go_module, kubernetes_binaries
from tests.services.kubernetes import Cluster, run_with_output
from tests.services.process import wait_until

pytestmark = [pytest.mark.endurance, pytest.mark.timeout(0)]  # Kubernetes is built at first

PROMETHEUS_OPERATOR = ("github.com/prometheus-operator/prometheus-operator", "v0.85.0")
KEDA = ("github.com/kedacore/keda/v2", "v2.21.0")
NODES = {f"node-{number}": f"zone-{number % 3}" for number in range(6)}
SELECTOR = "app.kubernetes.io/name=artifact-store,app.kubernetes.io/component={}"
GUIDES_NAME = "artifact-store"  # of the release in the guide
SECONDS = 90.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Six nodes in three zones, with the definitions of the operators whose objects the chart has."""
    prometheus = go_module(*PROMETHEUS_OPERATOR) / "example" / "prometheus-operator-crd"
    keda = go_module(*KEDA) / "config" / "crd" / "bases"
    with Cluster(tmp_path_factory.mktemp("cluster")) as started:
        started.apply(
            prometheus / "monitoring.coreos.com_podmonitors.yaml",
            prometheus / "monitoring.coreos.com_prometheusrules.yaml",
            keda / "keda.sh_scaledobjects.yaml",
            {
                "apiVersion": "scheduling.k8s.io/v1",
                "kind": "PriorityClass",
                "metadata": {"name": "store"},
                "value": 1000,
            },
        )
        started.kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd", "--all")
        started.add_nodes(NODES)
        yield started


@pytest.fixture(scope="module")
def volumes(cluster: Cluster) -> None:
    """Eight volumes for states."""
    cluster.apply(
        {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "metadata": {"name": "fast"},
            "provisioner": "kubernetes.io/no-provisioner",
            "volumeBindingMode": "WaitForFirstConsumer",
        },
        *(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": f"state-{number}"},
                "spec": {
                    "capacity": {"storage": "4Gi"},
                    "accessModes": ["ReadWriteOnce"],
                    "storageClassName": "fast",
                    "hostPath": {"path": f"/state-{number}"},
                },
            }
            for number in range(8)
        ),
    )


@pytest.fixture
def store(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Store]:
    """A namespace that refuses pods which are not confined, for one release of the chart. All nodes take pods."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_"))[:60].strip("-")
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    yield Store(cluster, name)
    cluster.kubectl("uncordon", *NODES)
    cluster.kubectl("delete", "namespace", name, "--wait=false")


class Store:
    """One release of the chart in one namespace."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace

    def helm(self, *arguments: str | Path) -> str:
        """What Helm prints. Raises CalledProcessError."""
        own = {f"HELM_{name}_HOME": str(self.cluster.folder / "helm" / name) for name in ("CACHE", "CONFIG", "DATA")}
        command = [str(helm_binary()), "--namespace", self.namespace, *map(str, arguments)]
        return run_with_output(command, {**own, "KUBECONFIG": str(self.cluster.kubeconfig)})

    def run_of_guide(self, block: str, values: str = "") -> None:
        """Run a block of the guide in this namespace, on the release that it names. Raises CalledProcessError."""
        folder = self.cluster.folder / self.namespace
        folder.mkdir(exist_ok=True)
        (folder / "values.yaml").write_text(values, encoding="utf-8")
        path = f"{helm_binary().parent}:{kubernetes_binaries()}:{os.environ['PATH']}"
        environment = {"PATH": path, "KUBECONFIG": str(self.cluster.kubeconfig), "HOME": str(folder)}
        script = blocks("docs/operating.md")[block].replace("--namespace store", f"--namespace {self.namespace}")
        script = script.replace("values.yaml", str(folder / "values.yaml")).replace("helm/artifact-store", str(CHART))
        run_with_output(["/bin/sh", "-ec", script], environment)

    def deploy(self, verb: str, *values: str, base: Path = VALUES / "default.yaml") -> None:
        """Install or upgrade with these values (`--set`), and wait until all pods are ready."""
        given = [f"--set={value}" for value in ("monitoring.enabled=true", *values)]
        self.helm(verb, "shelf", CHART, "--wait", "--timeout=300s", "--values", base, *given)

    def pods(self, component: str) -> list[dict[str, Any]]:
        """The pods of a component that are not about to go."""
        found = self.cluster.find("v1/pods", self.namespace, SELECTOR.format(component))
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def nodes(self, component: str) -> Counter[str]:
        """How many pods of a component each node has; those without a node are under the empty name."""
        return Counter(pod["spec"].get("nodeName", "") for pod in self.pods(component))

    def specs(self) -> dict[tuple[str, str], Any]:
        """What every object of the release asks for, by kind and name."""
        manifest = self.helm("get", "manifest", "shelf")
        command = ("--namespace", self.namespace, "get", "--output", "json", "--filename", "-")
        found = json.loads(self.cluster.kubectl(*command, stdin=manifest))["items"]
        return {(one["kind"], one["metadata"]["name"]): one.get("spec", one.get("data")) for one in found}

    def available(self, component: str) -> int:
        """How many pods of a component are ready."""
        conditions = [
            {one["type"]: one["status"] for one in pod["status"].get("conditions", ())} for pod in self.pods(component)
        ]
        return sum(one.get("Ready") == "True" for one in conditions)

    def await_ready(self, component: str, count: int) -> None:
        """Wait until this many pods of a component are ready."""
        wait_until(lambda: self.available(component) == count, SECONDS, f"not {count} pods of {component} are ready")

    def await_pods(self, component: str, count: int, tag: str = "0.1.0") -> None:
        """Wait until a component has exactly this many pods, all ready and with this image."""
        image = f"registry.example/artifact-store:{tag}"

        def there() -> bool:
            images = [c["image"] for pod in self.pods(component) for c in pod["spec"]["containers"]]
            return images == [image] * count and self.available(component) == count

        wait_until(there, SECONDS, f"{component} does not have {count} ready pods of {tag}")

    def try_objects(self, text: str) -> list[str]:
        """The names of the objects in this YAML, all of which the server would take. Raises CalledProcessError."""
        options = ("--dry-run=server", "--validate=strict", "--output", "name", "--filename", "-")
        return self.cluster.kubectl("--namespace", self.namespace, "create", *options, stdin=text).split()

    def scale(self, workload: str, replicas: int) -> None:
        """As a scaler does."""
        self.cluster.kubectl("--namespace", self.namespace, "scale", workload, f"--replicas={replicas}")

    def evict(self, pod: str) -> None:
        """As a drain does. Raises CalledProcessError when the budget forbids it."""
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}/eviction"
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}}
        self.cluster.kubectl("create", "--raw", path, "--filename", "-", stdin=json.dumps(eviction))


class Least:
    """The least number of ready pods of a component that was seen during a `with` block, which may last minutes."""

    def __init__(self, store: Store, component: str) -> None:
        self.seen = store.available(component)
        self._store = store
        self._component = component
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._ended.wait(0.2):
            self.seen = min(self.seen, self._store.available(self._component))

    def __enter__(self) -> Least:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@pytest.mark.parametrize("values", sorted(value_sets()))
def test_the_server_accepts_every_object(values: str, store: Store) -> None:
    text = template(value_sets()[values], "1.36")
    accepted = store.try_objects(text)
    rendered = [document for document in yaml.safe_load_all(text) if document is not None]
    assert len(accepted) == len(rendered)
    if values == "scaled":
        operators = {"podmonitor.monitoring.coreos.com", "prometheusrule.monitoring.coreos.com", "scaledobject.keda.sh"}
        assert operators <= {name.partition("/")[0] for name in accepted}
    with pytest.raises(subprocess.CalledProcessError) as refusal:
        store.try_objects(text.replace("\nspec:\n", "\nspec:\n  unheard: 1\n"))
    assert "".join(refusal.value.__notes__).count('unknown field "spec.unheard"') == text.count("\nspec:\n")


def test_pods_stand_on_different_nodes_and_zones_with_their_priority(store: Store) -> None:
    over = "gateway.spreadOver=topology.kubernetes.io/zone"
    store.deploy("install", "gateway.replicas=3", over, "gateway.priorityClassName=store", "projector.replicas=2")
    assert Counter(NODES[node] for node in store.nodes("gateway").elements()) == {f"zone-{n}": 1 for n in range(3)}
    assert sorted(store.nodes("webhooks").values()) == [1, 1]
    for projection in ("registry", "retention", "usage"):
        assert sorted(store.nodes(f"projector-{projection}").values()) == [1, 1]
    assert {pod["spec"]["priority"] for pod in store.pods("gateway")} == {1000}
    release = json.loads(store.helm("status", "shelf", "--output", "json"))
    phases = {hook["kind"]: hook["last_run"]["phase"] for hook in release["hooks"]}
    assert phases == {"Job": "Succeeded", "ServiceAccount": "Succeeded"}


def test_the_guides_other_job_runs_beside_the_release(store: Store) -> None:
    store.helm("install", GUIDES_NAME, CHART, "--wait", "--timeout=300s", "--values", VALUES / "default.yaml")
    store.run_of_guide("job")
    (job,) = store.cluster.find("batch/v1/jobs", store.namespace)
    assert (job["metadata"]["name"], job["status"]["succeeded"]) == ("artifact-store-verify", 1)


def test_an_upgrade_keeps_gateways_ready_and_a_rollback_gives_back_what_was(store: Store) -> None:
    store.deploy("install", "gateway.replicas=3")
    before = store.specs()
    changed = ("image.tag=0.2.0", "settings.ARTIFACT_STORE_LOG_LEVEL=debug", "gateway.replicas=4", "service.port=81")
    with Least(store, "gateway") as gateways, Least(store, "webhooks") as webhooks:
        store.deploy("upgrade", *changed)
    assert (gateways.seen, webhooks.seen) == (3, 2)
    after = store.specs()
    assert after.keys() == before.keys()
    store.await_pods("gateway", 4, "0.2.0")
    store.await_pods("webhooks", 2, "0.2.0")
    store.await_pods("projector-registry", 1, "0.2.0")
    with Least(store, "gateway") as gateways:
        store.helm("rollback", "shelf", "1", "--wait", "--timeout=300s")
    assert gateways.seen >= 3
    assert store.specs() == before
    assert before != after
    store.await_pods("gateway", 3, "0.1.0")


def test_a_failed_migration_stops_an_upgrade_before_anything_is_changed(store: Store) -> None:
    store.deploy("install")
    before = store.specs()
    # No node takes the pod of the Job, which so ends at its deadline, as one that hangs would.
    store.cluster.kubectl("cordon", *NODES)
    with pytest.raises(subprocess.CalledProcessError) as failure:
        store.deploy("upgrade", "image.tag=0.2.0", "migration.deadlineSeconds=10")
    assert "pre-upgrade hooks failed" in str(failure.value.__notes__)
    assert store.specs() == before
    store.cluster.kubectl("uncordon", *NODES)
    store.deploy("upgrade", "image.tag=0.2.0")


def test_a_drain_waits_for_the_budget_and_pods_come_back_elsewhere(store: Store) -> None:
    store.deploy("install", "gateway.replicas=3", "projector.replicas=2")
    first, second, _ = sorted(store.nodes("gateway"))
    with Least(store, "gateway") as gateways, Least(store, "webhooks") as webhooks:
        for node in (first, second):
            store.cluster.kubectl("drain", node, "--delete-emptydir-data", "--timeout=120s")
    assert gateways.seen >= 2
    assert webhooks.seen >= 1
    for component, count in (("gateway", 3), ("webhooks", 2), ("projector-registry", 2)):
        store.await_pods(component, count)
    for component in ("gateway", "webhooks", "projector-usage"):
        assert not {first, second} & store.nodes(component).keys()
    # Without a node that takes pods, what is evicted does not come back: the budget lets one go.
    store.cluster.kubectl("cordon", *NODES)
    for component, left in (("gateway", 2), ("webhooks", 1), ("projector-registry", 1)):
        one, another, *_ = (pod["metadata"]["name"] for pod in store.pods(component))
        store.evict(one)
        store.await_ready(component, left)
        with pytest.raises(subprocess.CalledProcessError) as refusal:
            store.evict(another)
        assert "disruption budget" in str(refusal.value.__notes__)


def test_replicas_follow_the_values_and_so_do_the_budgets(store: Store) -> None:
    def budgets() -> set[str]:
        found = store.cluster.find("policy/v1/poddisruptionbudgets", store.namespace)
        return {budget["metadata"]["name"].removeprefix("shelf-artifact-store-") for budget in found}

    store.deploy("install", "gateway.replicas=1", "webhooks.replicas=1")
    assert budgets() == set()
    store.deploy("upgrade", "gateway.replicas=5", "webhooks.replicas=3", "projector.replicas=2")
    for component, count in (("gateway", 5), ("webhooks", 3), ("projector-usage", 2)):
        store.await_pods(component, count)
    assert budgets() == {"gateway", "webhooks", "projector-registry", "projector-retention", "projector-usage"}
    assert max(store.nodes("gateway").values()) == 1
    store.deploy("upgrade", "gateway.replicas=2", "webhooks.enabled=false")
    store.await_pods("gateway", 2)
    store.await_pods("webhooks", 0)
    assert budgets() == {"gateway"}


def test_a_scaler_that_is_turned_on_finds_the_pods_that_there_were(store: Store) -> None:
    store.deploy("install", "gateway.replicas=3", "projector.replicas=2")
    gateways = "gateway.autoscaling.maxReplicas=6,gateway.autoscaling.cpuPercent=300"
    address = "projector.autoscaling.prometheus=http://prometheus.monitoring:9090"
    projectors = f"projector.autoscaling.maxReplicas=6,projector.autoscaling.lagSeconds=30,{address}"
    given = ("gateway.replicas=3", "projector.replicas=2", gateways, projectors)
    with Least(store, "gateway") as ready, Least(store, "projector-registry") as folding:
        store.deploy("upgrade", *given)
        store.await_pods("gateway", 3)
    assert (ready.seen, folding.seen) == (3, 2)
    store.scale("deployment/shelf-artifact-store-gateway", 5)
    store.await_pods("gateway", 5)
    with Least(store, "gateway") as ready:
        store.deploy("upgrade", *given, "settings.ARTIFACT_STORE_LOG_LEVEL=debug")
    assert ready.seen == 5


@pytest.mark.usefixtures("volumes")
def test_gateways_take_requests_while_their_state_moves_to_volumes(store: Store) -> None:
    values = (VALUES / "default.yaml").read_text(encoding="utf-8")
    store.helm("install", GUIDES_NAME, CHART, "--wait", "--timeout=300s", "--values", VALUES / "default.yaml")
    with Least(store, "gateway") as gateways:
        store.run_of_guide("volumes", f"{values}\n  persistentState: {{storageClassName: fast}}\n")
    assert gateways.seen >= 2
    store.await_pods("gateway", 2)
    assert {pod["metadata"]["name"] for pod in store.pods("gateway")} == {f"artifact-store-gateway-{n}" for n in (0, 1)}
    store.helm("upgrade", GUIDES_NAME, CHART, "--wait", "--timeout=300s", "--reuse-values", "--set=service.port=81")


@pytest.mark.usefixtures("volumes")
def test_state_stays_with_its_gateway_and_an_upgrade_leaves_the_scaler_its_number(store: Store) -> None:
    store.deploy("install", base=VALUES / "scaled.yaml")

    def claims() -> dict[str, str]:
        found = store.cluster.find("v1/persistentvolumeclaims", store.namespace)
        return {claim["metadata"]["name"]: claim["spec"].get("volumeName", "") for claim in found}

    store.await_pods("gateway", 2)  # the scaler's least; a workload whose scaler says nothing yet has one
    first = claims()
    assert first.keys() == {f"state-shelf-artifact-store-gateway-{number}" for number in range(2)}
    assert all(first.values())
    (node,) = (p["spec"]["nodeName"] for p in store.pods("gateway") if p["metadata"]["name"].endswith("-0"))
    store.cluster.kubectl("drain", node, "--delete-emptydir-data", "--timeout=120s")
    store.await_pods("gateway", 2)
    assert node not in store.nodes("gateway")
    assert claims() == first
    store.scale("statefulset/shelf-artifact-store-gateway", 4)
    store.await_pods("gateway", 4)
    store.deploy("upgrade", "settings.ARTIFACT_STORE_LOG_LEVEL=debug", base=VALUES / "scaled.yaml")
    store.await_pods("gateway", 4)
