"""The one shared set of services of a checkout: `make services` starts it, `make services-stop` stops it.

`var/services/` has logs, data and `state.json` (ports, pids, keys); `var/services.env` has the settings for a shell to
source. Only their owner can read them. Starting again keeps running services, and restarts dead ones on their own data.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from tests.services import docker
from tests.services.kafka import MEMBERS_AWAITED, MEMBERS_AWAITED_MS, KafkaBroker
from tests.services.minio import MinioServer
from tests.services.postgres import PostgresServer
from tests.services.process import Identity, Server, ServiceError, free_ports, wait_until
from tests.services.s3 import REGION, S3Server
from tests.services.seaweed import INNER_PORTS, SeaweedServer

ROOT = Path(__file__).resolve().parents[2]
VAR = ROOT / "var"
FOLDER = VAR / "services"
ENVIRONMENT_FILE = VAR / "services.env"
_STATE_FILE = FOLDER / "state.json"

Store = Literal["minio", "seaweedfs"]
STORES: tuple[Store, ...] = get_args(Store)
"""The object stores to choose from; the first runs unless told otherwise."""


def start(*, durable: bool = False, store: Store | None = None) -> bool:
    """Bring up what does not run and write `var/services.env`; blocks until all of it answers.

    Without `store`, the one that the set has, or MinIO for a new set. Returns whether anything had to be started.
    Raises ServiceError when a service cannot be had, or the set has another store than `store`.
    """
    with _alone():
        state = _read_state()
        if state is None:
            state = _draw(durable=durable, store=store or STORES[0])
            _write_state(state)
        elif store not in (None, state["store"]):
            raise ServiceError(f"the store of this set is {state['store']}: end it first (`make services-stop`)")
        try:
            fresh = _up_in_docker(state) if state["engine"] == "docker" else _up(state)
        finally:
            _write_state(state)
        _write_private(ENVIRONMENT_FILE, "".join(f"{k}={shlex.quote(v)}\n" for k, v in _environment(state).items()))
        return fresh


def stop() -> None:
    """End what runs and delete its data, `var/services.env` and `var/state`. Nothing to stop is no error."""
    with _alone():
        state = _read_state()
        if state is not None and state["engine"] == "docker":
            docker.down(state)
        elif state is not None:
            servers = _servers(state)
            with ThreadPoolExecutor(len(servers)) as pool:
                for closed in [pool.submit(server.close) for server in servers]:
                    closed.result()
        ENVIRONMENT_FILE.unlink(missing_ok=True)
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.rmtree(VAR / "state", ignore_errors=True)


def status() -> dict[str, str | None]:
    """Endpoint by service; None for one that does not run."""
    state = _read_state()
    if state is None:
        return {"kafka": None, STORES[0]: None, "postgres": None}
    if state["engine"] == "docker":
        return docker.status(state)
    return {server.name: server.endpoint if server.running else None for server in _servers(state)}


def _up(state: dict[str, Any]) -> bool:
    missing = [server for server in _servers(state) if not server.running]
    try:
        with ThreadPoolExecutor(3) as pool:
            for started in [pool.submit(server.start) for server in missing]:
                started.result()
    finally:
        for server in missing:
            if server.running:
                state[server.name] |= {"pid": server.pid, "started": server.identity.started if server.identity else ""}
            if isinstance(server, PostgresServer):
                state[server.name]["home"] = str(server.home)
    return bool(missing)


def _up_in_docker(state: dict[str, Any]) -> bool:
    fresh = docker.up(state)
    wait_until(lambda: all(server.answers() for server in _servers(state)), 60.0, "the containers give no answer")
    return fresh


def _draw(*, durable: bool, store: Store) -> dict[str, Any]:
    """Ports and keys of a new set."""
    kafka, controller, s3, postgres, *inner = free_ports(4 + INNER_PORTS)
    keys = MinioServer(FOLDER / store, s3)
    password = PostgresServer(FOLDER / "postgres", postgres).password
    return {
        "engine": "docker" if docker.available() else "processes",
        "kafka": {"port": kafka, "controller_port": controller},
        "store": store,
        store: {"port": s3, "access_key": keys.access_key, "secret_key": keys.secret_key, "inner_ports": inner},
        "postgres": {"port": postgres, "password": password, "durable": durable},
    }


def _servers(state: dict[str, Any]) -> list[Server]:
    kafka, postgres = state["kafka"], state["postgres"]
    home = Path(postgres["home"]) if "home" in postgres else None
    waiting = {MEMBERS_AWAITED: MEMBERS_AWAITED_MS} if postgres["durable"] else None
    servers: list[Server] = [
        KafkaBroker(FOLDER / "kafka", kafka["port"], kafka["controller_port"], options=waiting),
        _store(state),
        PostgresServer(FOLDER / "postgres", postgres["port"], postgres["password"], home, durable=postgres["durable"]),
    ]
    for server in servers:
        if "pid" in state[server.name]:
            server.adopt(Identity(state[server.name]["pid"], state[server.name]["started"]))
    return servers


def _store(state: dict[str, Any]) -> S3Server:
    name, kept = state["store"], state[state["store"]]
    place = (FOLDER / name, kept["port"], kept["access_key"], kept["secret_key"])
    return MinioServer(*place) if name == "minio" else SeaweedServer(*place, inner_ports=kept["inner_ports"])


def _environment(state: dict[str, Any]) -> dict[str, str]:
    kafka, store, postgres = state["kafka"], state[state["store"]], state["postgres"]
    views = PostgresServer(FOLDER / "postgres", postgres["port"], postgres["password"]).url()
    values = {
        "LOG_URL": f"kafka://127.0.0.1:{kafka['port']}/artifacts",
        "KAFKA_PARTITIONS": "6",
        "KAFKA_REPLICATION_FACTOR": "1",
        "KAFKA_MIN_INSYNC_REPLICAS": "1",
        "BLOBS_URL": f"s3+http://127.0.0.1:{store['port']}/artifacts",
        "S3_ACCESS_KEY": store["access_key"],
        "S3_SECRET_KEY": store["secret_key"],
        "S3_REGION": REGION,
        "VIEWS_URL": views,
        "STATE_DIR": str(VAR / "state"),
    }
    return {f"ARTIFACT_STORE_{name}": value for name, value in values.items()}


def running_store() -> Store:
    """The object store of the set that was started last."""
    found: Store = (_read_state() or {"store": STORES[0]})["store"]
    return found


def read_environment() -> dict[str, str]:
    """What `var/services.env` says; empty without it."""
    if not ENVIRONMENT_FILE.exists():
        return {}
    lines = shlex.split(ENVIRONMENT_FILE.read_text(encoding="utf-8"))
    return dict(line.split("=", 1) for line in lines)


def _read_state() -> dict[str, Any] | None:
    if not _STATE_FILE.exists():
        return None
    state: dict[str, Any] = {"store": STORES[0], **json.loads(_STATE_FILE.read_text(encoding="utf-8"))}
    return state


def _write_state(state: dict[str, Any]) -> None:
    _write_private(_STATE_FILE, json.dumps(state, indent=1))


def _write_private(path: Path, text: str) -> None:
    """Write whole, readable by the owner alone from its first moment on."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    fresh.replace(path)


@contextmanager
def _alone() -> Iterator[None]:
    """One start or stop at a time."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (VAR / "services.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        FOLDER.mkdir(parents=True, exist_ok=True)
        yield
