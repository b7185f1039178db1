"""`python -m tests.image`: builds the image as the guide does, and tries it as a pod of the chart would run it.

A container with a read-only root and an unprivileged user stores a file and gives it back. The image's bill of
materials is copied to `var/sbom.cdx.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.services.process import ServiceError, wait_until

ROOT = Path(__file__).resolve().parents[1]
CONTAINERFILE = ROOT / "Containerfile"
SBOM = "/opt/artifact-store/sbom.cdx.json"
_LABELS = "org.opencontainers.image"
_CONFINED = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--tmpfs=/tmp")
_STATE = "--volume=/var/lib/artifact-store"  # nameless, with the owner that the image gives: podman's tmpfs takes none


def engine() -> str:
    """The name of the container engine. Raises ServiceError when none answers."""
    for name in ("docker", "podman"):
        if shutil.which(name) and subprocess.run([name, "info"], capture_output=True, check=False).returncode == 0:
            return name
    raise ServiceError("no container engine answers: install Docker or podman")


def project() -> dict[str, str]:
    """Name, version and the rest of what pyproject.toml says of the project."""
    found: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def build(engine: str, tag: str) -> None:
    """Build the image of this checkout. Minutes at first."""
    revision = _run("git", "-C", str(ROOT), "rev-parse", "HEAD").strip()
    arguments = (f"--build-arg=VERSION={project()['version']}", f"--build-arg=REVISION={revision}")
    _run(engine, "build", "--file", str(CONTAINERFILE), *arguments, "--tag", tag, str(ROOT))
    labels = json.loads(_run(engine, "image", "inspect", "--format", "{{json .Config.Labels}}", tag))
    found = (labels.get(f"{_LABELS}.version"), labels.get(f"{_LABELS}.revision"))
    if found != (project()["version"], revision):
        raise ServiceError(f"the image's labels are {labels}")


def check(engine: str, tag: str) -> None:
    """Run the image. Raises ServiceError when it does not do what it is for."""
    user = _run(engine, "run", "--rm", *_CONFINED, "--entrypoint=id", tag, "--user").strip()
    if user != "10001":
        raise ServiceError(f"the image runs as user {user}")
    text = _run(engine, "run", "--rm", *_CONFINED, "--entrypoint=cat", tag, SBOM)
    names = {component["name"] for component in json.loads(text)["components"]}
    if not {"aiohttp", "confluent-kafka", "opentelemetry-sdk"} <= names:
        raise ServiceError(f"the bill of materials lacks distributions; it has {sorted(names)}")
    (ROOT / "var").mkdir(exist_ok=True)
    (ROOT / "var" / "sbom.cdx.json").write_text(text, encoding="utf-8")
    with _served(engine, tag) as container:
        inside = (engine, "exec", container, "artifact-store")
        of = ("--name", "smoke", "--producer", "ci", "--subject", "image", "--retention-class", "scratch")
        pushed = json.loads(_run(*inside, "push", "/etc/os-release", *of, "--json"))
        pulled = _run(*inside, "pull", pushed["package_id"], "/tmp/pulled")  # noqa: S108 - the container's own
        given = _run(engine, "exec", container, "sh", "-c", "cat /tmp/pulled/* | cmp - /etc/os-release && echo same")
        if given.strip() != "same":
            raise ServiceError(f"what was stored came back changed: {pulled}")


@contextmanager
def _served(engine: str, tag: str) -> Iterator[str]:
    """The id of a container that serves."""
    container = _run(engine, "run", "--detach", *_CONFINED, _STATE, tag, "serve").strip()
    try:
        ask = [engine, "exec", container, "artifact-store", "status"]
        wait_until(
            lambda: subprocess.run(ask, capture_output=True, check=False).returncode == 0, 60, "`serve` does not answer"
        )
        yield container
    except ServiceError as error:
        error.add_note(_run(engine, "logs", container))
        raise
    finally:
        _run(engine, "rm", "--force", "--volumes", container)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ServiceError(f"{' '.join(command[:3])} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.image", description=__doc__)
    parser.add_argument("--tag", default=f"artifact-store:{project()['version']}")
    tag = parser.parse_args().tag
    try:
        found = engine()
        build(found, tag)
        check(found, tag)
    except ServiceError as error:
        sys.stderr.write("\n".join((str(error), *getattr(error, "__notes__", ()))) + "\n")
        return 1
    sys.stdout.write(f"{tag} is built and works; its bill of materials is var/sbom.cdx.json\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
