"""The operating guide's commands work: each marked block is run exactly as printed, on real services.

Only names of hosts, prefixes, buckets and files are replaced by the test's. The product itself prepares what a block
needs. `tests/chart` runs the block of values.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from confluent_kafka.admin import (  # type: ignore[attr-defined] # not in __all__
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ConfigResource,
    ResourcePatternType,
    ResourceType,
)

from services.config import PREFIX, Settings
from tests.archives import records_of
from tests.buckets import Bucket
from tests.conftest import Endpoints
from tests.documents import ROOT, blocks
from tests.integration.conditions import until
from tests.integration.kafka.test_rights import bindings
from tests.integration.kafka_stage import open_kafka_log
from tests.integration.processes import ProductProcess, output_of
from tests.integration.trace_receiver import trace_receiver
from tests.services.install import java, kafka_tool_jars
from tests.services.kafka import KafkaBroker

pytestmark = [pytest.mark.services, pytest.mark.processes, pytest.mark.endurance]

BLOCKS = blocks("docs/operating.md")
SECONDS = 120.0
FILES = 20


@pytest.fixture(scope="module", autouse=True)
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A `PATH` with the program, and with Kafka's own tools under the names that they have in its distribution."""
    folder = tmp_path_factory.mktemp("tools")
    mains = {
        "kafka-acls.sh": "org.apache.kafka.tools.AclCommand",
        "kafka-configs.sh": "kafka.admin.ConfigCommand",
        "kafka-consumer-groups.sh": "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand",
    }
    for name, main in mains.items():
        command = f"exec {java()} -XX:TieredStopAtLevel=1 -cp '{kafka_tool_jars()}/*' {main}"
        (folder / name).write_text(f'#!/bin/sh\n{command} "$@"\n', encoding="utf-8")
        (folder / name).chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{folder}:{os.environ['PATH']}")
        yield


def environment(settings: Settings | None = None) -> dict[str, str]:
    """What a shell knows: nothing of the product but these settings."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return {**clean, **(settings.environment() if settings is not None else {})}


def run(name: str, stand_ins: Mapping[str, str], settings: Settings | None = None) -> str:
    """Run a block with these texts in place of the guide's; its standard output. It must succeed."""
    script = BLOCKS[name]
    for text, own in stand_ins.items():
        assert text in script, f"the block {name} does not name {text}"
        script = script.replace(text, own)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env=environment(settings),
        capture_output=True,
        text=True,
        timeout=SECONDS * 3,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    """A broker with an authorizer, whose administrator the test is."""
    options = {
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
    }
    with KafkaBroker(tmp_path_factory.mktemp("guarded"), options=options) as broker:
        yield broker


def rights(broker: KafkaBroker) -> set[str]:
    any_of: Any = None
    every = AclBindingFilter(
        ResourceType.ANY, any_of, ResourcePatternType.ANY, any_of, any_of, AclOperation.ANY, AclPermissionType.ANY
    )
    admin = AdminClient({"bootstrap.servers": broker.endpoint})
    found: list[AclBinding] = admin.describe_acls(every).result(SECONDS)
    return set(map(str, found))


def test_rights_are_given_with_kafkas_own_tool(guarded: KafkaBroker, tmp_path: Path) -> None:
    (tmp_path / "admin.properties").touch()
    before = rights(guarded)
    run(
        "rights",
        {"kafka-1:9093": guarded.endpoint, " artifacts ": " lab ", "admin.properties": f"{tmp_path}/admin.properties"},
    )
    assert rights(guarded) - before == set(map(str, bindings()))


def test_the_gateways_alone_get_the_right_to_write(guarded: KafkaBroker) -> None:
    out = run("write_right", {"kafka-1:9092": guarded.endpoint, "PREFIX": "artifacts"})
    assert "principal=User:artifact-store-gateway" in out.partition("Current ACLs")[2]


def test_the_policy_of_the_guide_is_valid(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(BLOCKS["policy"], encoding="utf-8")
    policy.chmod(0o600)
    output_of(None, "policy", "check", policy)


async def test_a_gateway_of_the_guide_sends_spans(embedded_settings: Settings, tmp_path: Path) -> None:
    class Traced(ProductProcess):
        def command(self) -> list[str]:
            script = BLOCKS["traces"].replace("http://collector:4318", receiver.url)
            assert script.splitlines()[-1] == "artifact-store gateway"
            return ["bash", "-euc", script.replace("\nartifact-store", "\nexec artifact-store")]

        def environment(self) -> dict[str, str]:
            return {**environment(), **super().environment()}

    trace, sender = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    output_of(embedded_settings, "migrate")
    with trace_receiver() as receiver:
        with Traced(embedded_settings, tmp_path / "gateway", "gateway") as gateway:
            async with aiohttp.ClientSession() as session:
                headers = {"traceparent": f"00-{trace}-{sender}-01"}
                async with session.get(f"{gateway.endpoint}/v1/packages", headers=headers) as answer:
                    assert answer.status == 200
        (span,) = receiver.trace(trace, ["GET /v1/packages"])
    assert (span.service, span.parent_id) == ("artifact-store-gateway", sender)


def test_a_partition_that_holds_a_future_time_may_be_written_to(real_settings: Settings) -> None:
    output_of(real_settings, "migrate")
    url = urlsplit(real_settings.log_url)
    run("future_time", {"kafka-1:9092": url.netloc, "PREFIX": url.path[1:]})
    admin = AdminClient({"bootstrap.servers": url.netloc})
    topic = ConfigResource(ConfigResource.Type.TOPIC, f"{url.path[1:]}.events")
    (future,) = admin.describe_configs([topic]).values()
    assert future.result(SECONDS)["message.timestamp.after.max.ms"].value == "97200000"


def push(settings: Settings, folder: Path, gateway: ProductProcess) -> str:
    """The id of a package of FILES files."""
    tree = folder / "tree"
    tree.mkdir()
    for n in range(FILES):
        (tree / f"{n}.txt").write_text(f"file {n}")
    options = ("--name", "n", "--producer", "lab", "--subject", "s", "--retention-class", "report", "--json")
    return str(json.loads(output_of(settings, "push", tree, *options, url=gateway.endpoint))["package_id"])


async def test_a_group_is_reset_to_fold_its_view_again(real_settings: Settings, tmp_path: Path) -> None:
    await asyncio.to_thread(output_of, real_settings, "migrate")
    url = urlsplit(real_settings.log_url)

    async def usage_is_folded() -> bool:
        told = await asyncio.to_thread(output_of, real_settings, "status", "--json")
        return all(view["behind"] == 0 for view in json.loads(told)["projections"] if view["projection"] == "usage")

    def digest() -> str:
        return str(json.loads(output_of(real_settings, "digest", "usage", "--json"))["digest"])

    with ProductProcess(real_settings, tmp_path / "gateway", "gateway") as gateway:
        await asyncio.to_thread(push, real_settings, tmp_path, gateway)
        with ProductProcess(real_settings, tmp_path / "first", "projector", "usage", listens=False):
            await until(usage_is_folded, SECONDS, "the view does not come to the log's end")
        before = await asyncio.to_thread(digest)
        await asyncio.to_thread(run, "reset_group", {"kafka-1:9092": url.netloc, "PREFIX": url.path[1:]})
        said = tmp_path / "second" / "artifact-store.log"

        async def folded_again() -> bool:
            return "was reset to the log's start" in said.read_text() and await usage_is_folded()

        with ProductProcess(real_settings, tmp_path / "second", "projector", "usage", listens=False):
            await until(folded_again, SECONDS, "the projector does not fold the view again")
        assert await asyncio.to_thread(digest) == before


async def test_a_log_is_backed_up_restored_and_copied(
    real_settings: Settings, endpoints: Endpoints, tmp_path: Path
) -> None:
    await asyncio.to_thread(output_of, real_settings, "migrate")
    url = urlsplit(real_settings.log_url)
    prefix, brokers = url.path[1:], url.netloc
    archive = {"/backup/artifacts-2026-12-01.archive": f"{tmp_path}/artifacts.archive"}
    restored, copy, without, elsewhere = (f"{prefix}-{name}" for name in ("restored", "copy", "without", "elsewhere"))
    with ProductProcess(real_settings, tmp_path / "gateway", "gateway") as gateway:
        pushed = await asyncio.to_thread(push, real_settings, tmp_path, gateway)
        await asyncio.to_thread(run, "back_up", archive, real_settings)
        events = await asyncio.to_thread(output_of, real_settings, "tail", "--json", url=gateway.endpoint)
    last = json.loads(events.splitlines()[-1])
    async with open_kafka_log(real_settings) as log:
        record = next(r for found in (await records_of(log)).values() for r in found if r.key.decode() == pushed)
    own = real_settings.s3_secret_key.get_secret_value()
    bucket = Bucket(endpoints.s3, real_settings.s3_access_key, own, real_settings.s3_region)
    with ExitStack() as stack:
        stack.push(bucket)  # made by the block, removed here
        out = await asyncio.to_thread(
            run,
            "restore",
            {
                **archive,
                "kafka://kafka-1:9093/restored": f"kafka://{brokers}/{restored}",
                "s3://minio:9000/restored": str(bucket.settings["blobs_url"]),
            },
            replace(real_settings, views_url=f"sqlite+aiosqlite:///{tmp_path}/views.db"),
        )
    assert re.search(rf"^events +{len(events.splitlines())}$", out, re.MULTILINE), out
    assert re.search(r"^violation count +0$", out, re.MULTILINE), out
    positions = {"POSITION   #": f"{last['position']} #", "0:120,1:77,2:98": "0:0,1:0,2:0"}
    out = await asyncio.to_thread(run, "positions", {**archive, **positions}, real_settings)
    assert re.fullmatch(r"(\S+\t0:\d+,1:\d+,2:\d+\n){2}", out), out
    names = {
        "kafka://kafka-9:9093/artifacts": f"kafka://{brokers}/{elsewhere}",
        "artifacts3 --skip 3:41207": f"{without} --skip {record.partition}:{record.offset}",
        "artifacts2": copy,
        " artifacts ": f" {prefix} ",
    }
    await asyncio.to_thread(run, "copy", names, real_settings)
    for name, expected in ((copy, len(events.splitlines())), (without, len(events.splitlines()) - 1)):
        async with open_kafka_log(replace(real_settings, log_url=f"kafka://{brokers}/{name}")) as log:
            assert sum(map(len, (await records_of(log)).values())) == expected
