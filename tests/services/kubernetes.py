"""A real Kubernetes without machines: API server, controllers, scheduler and etcd; kwok simulates nodes and pods.

Pods are scheduled, evicted and replaced as in any cluster, but nothing runs in them: each pod is ready at once, and the
pods of a Job succeed at once.
"""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.services.install import (
    KWOK_VERSION,
    etcd_binary,
    go_module,
    go_program,
    kubernetes_binaries,
)
from tests.services.process import Server, free_ports, is_ok

_KWOK = "sigs.k8s.io/kwok"
_STAGES = (
    "node/fast/node-initialize",
    "node/heartbeat-with-lease/node-heartbeat-with-lease",
    "pod/fast/pod-ready",
    "pod/fast/pod-complete",
    "pod/fast/pod-delete",
)
_TOKEN = "of-the-tests"  # of a server on loopback that lives as long as one test
_COMMAND_SECONDS = 360.0
_UNVERIFIED = ssl._create_unverified_context()  # noqa: S323 - on loopback, where servers sign for themselves


class _Part(Server):
    """One process of the cluster."""

    start_seconds = 180.0

    def __init__(self, name: str, folder: Path, port: int, command: Sequence[str | Path], health: str) -> None:
        super().__init__(folder / name, port)
        self.name = name  # type: ignore[misc]  # one class for all of them
        self._command = [str(part) for part in command]
        self._health = health

    @property
    def endpoint(self) -> str:
        return self._health

    def prepare(self) -> None:
        """Nothing: all is on the command line."""

    def command(self) -> list[str]:
        return self._command

    def answers(self) -> bool:
        return is_ok(self._health, context=_UNVERIFIED if self._health.startswith("https") else None)


class Cluster:
    """A cluster of its own in one folder, for a `with` block. Methods block, and raise CalledProcessError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.kubeconfig = self.folder / "kubeconfig"
        self._server = ""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, stack: ExitStack) -> None:
        folder, binaries = self.folder, kubernetes_binaries()
        folder.mkdir(parents=True, exist_ok=True)
        etcd, peers, api, controllers, scheduler, kwok = free_ports(6)
        self._write_access(api)
        key, public = folder / "accounts.key", folder / "accounts.pub"

        def run(name: str, port: int, health: str, *command: str | Path) -> None:
            stack.enter_context(_Part(name, folder, port, command, health))

        clients, others = f"http://127.0.0.1:{etcd}", f"http://127.0.0.1:{peers}"
        run(
            *("etcd", etcd, f"{clients}/health", etcd_binary()),
            *("--unsafe-no-fsync", "--data-dir", folder / "etcd-data"),
            *("--listen-client-urls", clients, "--advertise-client-urls", clients),
            *("--listen-peer-urls", others, "--initial-advertise-peer-urls", others),
            *("--initial-cluster", f"default={others}"),
        )
        run(
            *("kube-apiserver", api, f"https://127.0.0.1:{api}/readyz", binaries / "kube-apiserver"),
            *(f"--etcd-servers={clients}", f"--secure-port={api}", "--bind-address=127.0.0.1"),
            *("--advertise-address=127.0.0.1", f"--cert-dir={folder / 'certificates'}", "--authorization-mode=RBAC"),
            *(f"--token-auth-file={folder / 'tokens.csv'}", "--service-cluster-ip-range=10.0.0.0/24"),
            *("--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={public}"),
            *(f"--service-account-signing-key-file={key}", "--enable-admission-plugins=PodSecurity,Priority"),
            # etcd 3.5.1 is too old for watches that begin with a list: kwok's would fail, and begin again 30 s later.
            "--feature-gates=WatchList=false",
        )
        common = (f"--kubeconfig={self.kubeconfig}", "--leader-elect=false", "--bind-address=127.0.0.1")
        for name, port in (("kube-controller-manager", controllers), ("kube-scheduler", scheduler)):
            more = (f"--service-account-private-key-file={key}",) if name == "kube-controller-manager" else ()
            open_paths = "--authorization-always-allow-paths=/healthz"
            certificates = f"--cert-dir={folder / name / 'certificates'}"
            health = f"https://127.0.0.1:{port}/healthz"
            run(name, port, health, binaries / name, *common, open_paths, certificates, f"--secure-port={port}", *more)
        stages = [go_module(_KWOK, KWOK_VERSION) / "kustomize" / "stage" / f"{name}.yaml" for name in _STAGES]
        run(
            *("kwok", kwok, f"http://127.0.0.1:{kwok}/healthz", go_program(f"{_KWOK}/cmd/kwok", KWOK_VERSION)),
            *(f"--kubeconfig={self.kubeconfig}", "--manage-all-nodes", "--node-lease-duration-seconds=40"),
            *(f"--server-address=127.0.0.1:{kwok}", *(f"--config={stage}" for stage in stages)),
        )

    def _write_access(self, port: int) -> None:
        """What processes and clients prove themselves by."""
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (self.folder / "accounts.key").write_bytes(private)
        (self.folder / "accounts.pub").write_bytes(public)
        (self.folder / "tokens.csv").write_text(f'{_TOKEN},admin,admin,"system:masters"\n', encoding="utf-8")
        self._server = f"https://127.0.0.1:{port}"
        cluster = {"server": self._server, "insecure-skip-tls-verify": True}
        access = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "tests", "cluster": cluster}],
            "users": [{"name": "tests", "user": {"token": _TOKEN}}],
            "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "tests"}}],
            "current-context": "tests",
        }
        self.kubeconfig.write_text(yaml.safe_dump(access), encoding="utf-8")

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """What kubectl prints."""
        command = [str(kubernetes_binaries() / "kubectl"), *arguments]
        return run_with_output(command, {"KUBECONFIG": str(self.kubeconfig), "HOME": str(self.folder)}, stdin)

    def apply(self, *objects: Mapping[str, Any] | Path) -> None:
        """Make these objects, or those in these files, on the server's side."""
        texts = [one.read_text(encoding="utf-8") if isinstance(one, Path) else json.dumps(one) for one in objects]
        self.kubectl("apply", "--server-side", "--filename", "-", stdin="\n---\n".join(texts))

    def find(self, kind: str, namespace: str, selector: str = "") -> list[dict[str, Any]]:
        """The objects of a kind (`v1/pods`, `policy/v1/poddisruptionbudgets`) that have these labels.

        Asks the server without kubectl, which takes a hundred times as long: callers ask again and again. Raises
        OSError: the server does not answer, or refuses.
        """
        version, _, plural = kind.rpartition("/")
        start = "apis" if "/" in version else "api"
        path = f"{start}/{version}/namespaces/{namespace}/{plural}?{urlencode({'labelSelector': selector})}"
        access = {"Authorization": f"Bearer {_TOKEN}"}
        request = urllib.request.Request(f"{self._server}/{path}", headers=access)  # noqa: S310 - of our server
        with urllib.request.urlopen(request, timeout=60, context=_UNVERIFIED) as answer:  # noqa: S310 - of our server
            found: list[dict[str, Any]] = json.load(answer)["items"]
        return found

    def add_nodes(self, names: Mapping[str, str], cpu: str = "8", memory: str = "32Gi") -> None:
        """Nodes by name, each with its zone. Returns when pods can be scheduled to them."""
        amounts = {"cpu": cpu, "memory": memory, "pods": "110"}
        nodes = []
        for name, zone in names.items():
            labels = {"kubernetes.io/hostname": name, "topology.kubernetes.io/zone": zone}
            metadata = {"name": name, "labels": labels}
            status = {"allocatable": amounts, "capacity": amounts}
            nodes.append({"apiVersion": "v1", "kind": "Node", "metadata": metadata, "status": status})
        everything = {"apiVersion": "v1", "kind": "List", "items": nodes}
        self.kubectl("create", "--filename", "-", stdin=json.dumps(everything))
        self.kubectl("wait", "--for=condition=Ready", "--timeout=120s", "node", *names)


def run_with_output(command: Sequence[str], environment: Mapping[str, str], stdin: str | None = None) -> str:
    """Run to the end and return what it printed. Raises CalledProcessError, which shows what it printed as a note."""
    done = subprocess.run(
        command,
        input=stdin,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=_COMMAND_SECONDS,
        check=False,
    )
    try:
        done.check_returncode()
    except subprocess.CalledProcessError as error:
        error.add_note(done.stdout + done.stderr)
        raise
    return done.stdout
