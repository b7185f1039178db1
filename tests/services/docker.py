"""The services as containers, if there is a Docker engine: `compose.yaml`, one project for each checkout."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.services.kafka import MEMBERS_AWAITED_MS
from tests.services.process import ServiceError

ROOT = Path(__file__).resolve().parents[2]
COMPOSE_FILE = ROOT / "compose.yaml"
_ASK_SECONDS = 10.0
_START_SECONDS = 900.0  # images may have to be pulled


def available() -> bool:
    """Whether an engine answers and `docker compose` is there. Blocks 20 seconds at most."""
    if shutil.which("docker") is None:
        return False
    try:
        return all(
            subprocess.run(["docker", *ask], capture_output=True, timeout=_ASK_SECONDS, check=False).returncode == 0
            for ask in (["info"], ["compose", "version"])
        )
    except subprocess.TimeoutExpired:
        return False


def up(state: dict[str, Any]) -> bool:
    """Start the containers that do not run; returns whether there were any. Blocks until all are healthy."""
    if all(status(state).values()):
        return False
    _compose(state, "up", "--detach", "--wait")
    return True


def down(state: dict[str, Any]) -> None:
    """End the containers and delete their volumes."""
    _compose(state, "down", "--volumes", "--remove-orphans", "--timeout", "10")


def status(state: dict[str, Any]) -> dict[str, str | None]:
    """Endpoint by service; None for one that does not run."""
    running = _compose(state, "ps", "--services", "--status", "running").split()
    return {
        name: f"127.0.0.1:{state[name]['port']}" if name in running else None
        for name in ("kafka", state["store"], "postgres")
    }


def environment(state: dict[str, Any]) -> dict[str, str]:
    """The variables that compose.yaml leaves open, and the profile of the store that is to run."""
    store = state[state["store"]]
    return {
        "COMPOSE_PROFILES": state["store"],
        "KAFKA_PORT": str(state["kafka"]["port"]),
        "KAFKA_MEMBERS_AWAITED_MS": str(MEMBERS_AWAITED_MS if state["postgres"]["durable"] else 0),
        "S3_PORT": str(store["port"]),
        "POSTGRES_PORT": str(state["postgres"]["port"]),
        "S3_ACCESS_KEY": store["access_key"],
        "S3_SECRET_KEY": store["secret_key"],
        "POSTGRES_PASSWORD": state["postgres"]["password"],
        "POSTGRES_DURABLE": "on" if state["postgres"]["durable"] else "off",
    }


def _compose(state: dict[str, Any], *arguments: str) -> str:
    """Run `docker compose`, with ports and keys in its environment, never on its command line. Returns its output."""
    project = f"artifact-store-{hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]}"
    command = ["docker", "compose", "--project-name", project, "--file", str(COMPOSE_FILE), *arguments]
    done = subprocess.run(
        command,
        env={**os.environ, **environment(state)},
        capture_output=True,
        text=True,
        timeout=_START_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise ServiceError(f"docker compose {arguments[0]} failed:\n{done.stderr[-2000:]}")
    return done.stdout
