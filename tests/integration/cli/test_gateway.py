"""The client commands through a gateway in a separate process, and how the gateway's processes end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from services.config import Settings
from services.views.projections import PROJECTIONS
from tests import trees
from tests.integration.http_gateway import running_gateway
from tests.integration.processes import (
    COMMAND,
    ProductProcess,
    command_environment,
    output_of,
    run_command,
    serving,
)
from tests.services.process import becomes_true

pytestmark = pytest.mark.processes

ABOUT = ("--name", "n", "--producer", "p", "--subject", "s", "--retention-class", "scratch")
NAMES = ("a b.txt", "läs/mig.txt", "%41", "#x?y", "d/e/e/p/leaf", "plus+&=;,@")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in NAMES:
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (tmp_path / "tree" / "empty").write_bytes(b"")
    with (tmp_path / "tree" / "large.bin").open("wb") as large:
        for number in range(8):
            large.write(bytes([number]) * (1 << 20))
    return tmp_path / "tree"


LOADED = """
import sys
from services.cli import main
try:
    main(sys.argv[1:])
finally:
    print(*sys.modules, file=sys.stderr)
"""
"""The command line, which says at its end which modules it has loaded."""


def loaded_by(url: str, home: Path, *arguments: str | Path) -> set[str]:
    """The modules that a command has loaded when it ends well."""
    command = [sys.executable, "-c", LOADED, *map(str, arguments), "--url", url]
    environment = command_environment(None, None, home)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


async def test_push_and_pull_load_no_more_than_they_need(embedded_settings: Settings, tmp_path: Path) -> None:
    """Nothing else happens while modules load, which takes longer than it does to send a thousand files."""
    (tmp_path / "tree").mkdir()
    for number in range(10):
        (tmp_path / "tree" / f"{number}").write_bytes(b"%d" % number)
    async with running_gateway(embedded_settings) as gateway:
        for command in (("push", tmp_path / "tree", *ABOUT), ("pull", "PACKAGE", tmp_path / "back")):
            packages = await gateway.parts.registry.list_packages()
            named = [str(packages.items[0].package_id) if part == "PACKAGE" else part for part in command]
            loaded = await asyncio.to_thread(loaded_by, gateway.url, tmp_path, *named)
            assert {"aiohttp", "blake3", "services.cli.transfer"} <= loaded
            heavy = {"confluent_kafka", "dotenv", "fastavro", "minio", "prometheus_client", "pydantic", "rich"}
            assert loaded & {*heavy, "schemas", "services.wiring", "sqlalchemy", "sqlite3"} == set()
            own = {name for name in loaded if name.startswith("services.cli.")}
            assert own == {f"services.cli.{name}" for name in ("command", "standard_streams", "transfer")}
    assert trees.read(tmp_path / "back") == trees.read(tmp_path / "tree")


def test_a_tree_goes_through_a_gateway_and_back(embedded_settings: Settings, tree: Path, tmp_path: Path) -> None:
    with serving(embedded_settings, tmp_path) as gateway:
        url = gateway.endpoint
        pushed = json.loads(output_of(None, "push", tree, *ABOUT, "--actor", "Åda", "--json", "--url", url))
        assert pushed["sequence"] == pushed["files"] + 2
        for number, which in enumerate((pushed["package_id"], pushed["manifest_digest"])):
            output_of(None, "pull", which, tmp_path / str(number), url=url)
            assert trees.read(tmp_path / str(number)) == trees.read(tree)
        events = output_of(None, "tail", "--json", url=url).splitlines()
        assert {json.loads(event)["actor"] for event in events} == {"Åda"}
        again = output_of(None, "manifest", pushed["package_id"], "--format", "json", url=url)
        _shows_projections_and_webhooks(gateway)
    # And the same from the files themselves, once the gateway has let go of them.
    assert output_of(embedded_settings, "manifest", pushed["package_id"], "--format", "json") == again


def _shows_projections_and_webhooks(process: ProductProcess) -> None:
    """`serve` gives the metrics of all that it runs, each once."""

    def shown() -> list[str]:
        with urllib.request.urlopen(f"{process.endpoint}/metrics", timeout=10) as answer:  # noqa: S310 - of our own
            return [line.rpartition(" ")[0] for line in answer.read().decode().splitlines() if line[0] != "#"]

    wanted = {
        "artifact_store_webhook_deliverer",
        *(f'artifact_store_projection_running{{projection="{name}"}}' for name in PROJECTIONS),
        *(f'artifact_store_projection_lag{{partition="0",projection="{name}"}}' for name in PROJECTIONS),
    }
    assert becomes_true(lambda: wanted <= set(shown()), 30)
    names = shown()
    assert len(names) == len(set(names))


def test_an_address_that_can_be_no_gateway_is_wrong_usage() -> None:
    refused = run_command(None, "show", "11111111-1111-4111-8111-111111111111", url="ftp://127.0.0.1:9")
    assert refused.returncode == 2
    assert b"http(s)://" in refused.stderr


def test_an_address_that_is_taken_is_said_in_one_line(embedded_settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = replace(embedded_settings, listen=f"127.0.0.1:{port}")
        refused = run_command(settings, "serve", "--json")
    assert refused.returncode == 2
    assert b"Traceback" not in refused.stderr
    assert f"cannot listen on 127.0.0.1, port {port}" in json.loads(refused.stderr.splitlines()[-1])["detail"]


@pytest.mark.parametrize("setting", ["listen", "metrics_listen"])
def test_an_address_that_is_taken_is_said_before_partitions_change_hands(setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as broker:
        port = taken.getsockname()[1]
        where = {"listen": "127.0.0.1:0", setting: f"127.0.0.1:{port}"}
        settings = Settings.from_env(log_url=f"kafka://127.0.0.1:{broker.getsockname()[1]}/artifacts", **where)
        refused = run_command(settings, "gateway", "--json")
        broker.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has asked the log
            broker.accept()
    assert refused.returncode == 2
    detail = json.loads(refused.stderr.splitlines()[-1])["detail"]
    assert f"cannot listen on 127.0.0.1, port {port}" in detail
    assert detail.endswith(f"ARTIFACT_STORE_{setting.upper()} says where")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", ["serve", "gateway", "projector"])
def test_a_process_of_the_product_ends_cleanly_when_it_is_told(
    embedded_settings: Settings, tmp_path: Path, command: str, number: signal.Signals
) -> None:
    output_of(embedded_settings, "migrate")
    settings = replace(embedded_settings, listen="127.0.0.1:0")
    with subprocess.Popen(
        [*COMMAND, command], env={**os.environ, **settings.environment()}, stderr=subprocess.PIPE
    ) as made:
        try:
            assert made.stderr is not None
            if command != "projector":
                while b"listening on" not in made.stderr.readline():
                    assert made.poll() is None
            else:
                wait_for_handler(made.pid, number)
            made.send_signal(number)
            assert made.wait(timeout=30) == 0
        finally:
            made.kill()


def wait_for_handler(pid: int, number: signal.Signals) -> None:
    """Return once the process catches the signal with a handler of an event loop (which keeps it blocked in no way)."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
        if caught >> (signal.SIGTERM - 1) & 1 and caught >> (number - 1) & 1:
            return
        time.sleep(0.02)
    raise AssertionError("the process never caught the signal")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_following_ends_cleanly_when_it_is_told(
    embedded_settings: Settings, tree: Path, tmp_path: Path, number: signal.Signals
) -> None:
    output_of(embedded_settings, "push", tree, *ABOUT)
    environment = command_environment(embedded_settings, None, tmp_path)
    command = [*COMMAND, "tail", "--follow", "--json"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as made:
        try:
            assert made.stdout is not None
            lines = [json.loads(made.stdout.readline()) for _ in range(10)]
            made.send_signal(number)
            rest, said = made.communicate(timeout=30)
        finally:
            made.kill()
    assert [line["sequence"] for line in lines] == list(range(1, 11))
    assert (made.returncode, rest, said) == (0, b"", b"")


def test_progress_is_on_standard_error_and_only_on_a_terminal(
    embedded_settings: Settings, tree: Path, tmp_path: Path
) -> None:
    done = run_command(embedded_settings, "push", tree, *ABOUT, "--json")
    assert done.stderr == b""
    own, other = os.openpty()
    environment = {**command_environment(embedded_settings, None, tmp_path), "TERM": "xterm"}
    drawn = subprocess.Popen(
        [*COMMAND, "push", str(tree), *ABOUT, "--json"], env=environment, stdout=subprocess.PIPE, stderr=other
    )
    os.close(other)
    out, _ = drawn.communicate(timeout=60)
    assert drawn.returncode == 0
    assert json.loads(out)["files"] == len(NAMES) + 2
    assert b"files" in os.read(own, 1 << 16)
    os.close(own)
