"""The failures: how each is caused, which signs show it, and how the runbook mends it.

Alerts are named without `ArtifactStore`. Texts are regular expressions.
"""

from __future__ import annotations

import re
import resource
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

import aiohttp
import asyncpg

from services.views.projections import PROJECTIONS
from tests.certificates import Authority
from tests.drills.scene import Scene, away, frozen, recipe
from tests.faults.small_disk import SmallDisk, SmallMinio, SmallPostgres
from tests.faults.torture.kinds import stray
from tests.faults.torture.leaders import set_on_topic
from tests.faults.torture.stage import SMALL_DISK_MIB, Part, in_thread
from tests.integration.kafka_stage import state_about
from tests.integration.processes import COMMAND
from tests.integration.webhooks.receiver import Receiver, receiving
from tests.services.process import Server

ALERT_SECONDS = 60.0
"""How long an alert may take."""

_SLOW_SECONDS = 1.28
"""Each way: an answer takes a little longer than what counts as slow, and less than what counts as away."""

Make = Callable[[Scene], AbstractAsyncContextManager[None]]
"""Makes the failure. What it took away is back at the end of the block."""

Mend = Callable[[Scene], Awaitable[None]]
"""Does what the runbook says, by the commands that the product prints."""


async def _by_itself(_: Scene) -> None:
    """The runbook says to bring back what is away, which the end of the failure does."""


def _printed(command: str, *more: str) -> Mend:
    """Runs the command of ours that `doctor` prints and that begins so, with `more` after it."""

    async def mend(scene: Scene) -> None:
        printed = recipe((await scene.doctor())[1], f"artifact-store {command}")
        code, said = await scene.command(*printed[1:], *more)
        assert code == 0, said

    return mend


@dataclass(frozen=True)
class Drill:
    """One failure.

    `alerts` fire within `seconds`; `also` may fire too, as a consequence; no other does. `doctor`, `status`, `ready`
    and `log` is what these say; `runbook` is what the section of one of these alerts says.
    """

    name: str
    make: Make
    alerts: frozenset[str] = frozenset()
    also: frozenset[str] = frozenset()
    doctor: Sequence[str] = ()
    status: Sequence[str] = ()
    ready: Sequence[str] = ()
    log: Sequence[str] = ()
    runbook: str = ""
    mend: Mend = _by_itself
    lingers: frozenset[str] = frozenset()
    """Alerts that go on for a while after it is mended."""
    seconds: float = ALERT_SECONDS


DRILLS: list[Drill] = []

_WRITES = frozenset({"RequestsFail", "PartitionWithoutWriter", "CannotWrite", "TakeoversFail", "ComponentSlow"})
_VIEWS = frozenset({"ViewsAway", "ProjectionStopped", "ProjectionBehind", "RequestsFail", "ComponentSlow"})


def drill(
    name: str,
    alerts: str = "",
    also: frozenset[str] = frozenset(),
    *,
    doctor: Sequence[str] = (),
    status: Sequence[str] = (),
    ready: Sequence[str] = (),
    log: Sequence[str] = (),
    runbook: str = "",
    mend: Mend = _by_itself,
    lingers: str = "",
    seconds: float = ALERT_SECONDS,
) -> Callable[[Callable[[Scene], AsyncIterator[None]]], Make]:
    """Enter a failure; `alerts` and `lingers` are words."""

    def enter(make: Callable[[Scene], AsyncIterator[None]]) -> Make:
        made = asynccontextmanager(make)
        DRILLS.append(
            Drill(
                name,
                made,
                frozenset(alerts.split()),
                also,
                doctor=doctor,
                status=status,
                ready=ready,
                log=log,
                runbook=runbook,
                mend=mend,
                lingers=frozenset(lingers.split()) | {"TakeoversFail"},
                seconds=seconds,
            )
        )
        return made

    return enter


# --- Kafka ---


@drill(
    "one broker of three away",
    also=frozenset({"TakeoversFail"}),
    doctor=("ok     log: .*a replica is not in sync.*are all brokers up",),
    log=(r"WARNING \S+: the Kafka broker 127\.0\.0\.1:[0-9]+ cannot be reached: Connection refused",),
)
async def one_broker(scene: Scene) -> AsyncIterator[None]:
    """Nothing stands still, so nothing cries."""
    async with away(scene.stage.cluster.brokers[2]):
        yield


@drill(
    "Kafka away",
    "CannotWrite",
    _WRITES | {"ProjectionStopped", "ProjectionBehind"},
    doctor=("WRONG  log: .*ARTIFACT_STORE_LOG_URL", "ok     views", "ok     blobs"),
    status=("Kafka",),
    ready=("log: ",),
    log=("no broker is reached|gave no answer in time|cannot be reached",),
    runbook="are the brokers up",
)
async def kafka_away(scene: Scene) -> AsyncIterator[None]:
    async with away(*scene.stage.cluster.brokers):
        yield


@drill(
    "Kafka frozen",
    "CannotWrite",
    _WRITES | {"ProjectionStopped", "ProjectionBehind"},
    doctor=("WRONG  log: ",),
    status=("Kafka",),
    ready=("log: ",),
    log=("gave no answer in time|no broker is reached",),
    runbook="are the brokers up",
)
async def kafka_frozen(scene: Scene) -> AsyncIterator[None]:
    with frozen(*scene.stage.cluster.brokers):
        yield


@drill(
    "Kafka full",
    "CannotWrite",
    _WRITES | {"ProjectionStopped", "ProjectionBehind"},
    doctor=("WRONG  log: ",),
    ready=("log: ",),
    log=("no broker is reached|gave no answer in time|cannot be reached",),
    runbook="A broker whose disk is full ends: make room, then start it again",
)
async def kafka_full(scene: Scene) -> AsyncIterator[None]:
    """No broker can write to a file any more, so each ends, as it does on a full disk."""
    brokers = scene.stage.cluster.brokers
    for broker in brokers:
        resource.prlimit(broker.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    assert await scene.becomes(partial(_ended, *brokers), ALERT_SECONDS), "brokers go on without room"
    async with away(*brokers):
        yield


async def _ended(*servers: Server) -> bool:
    return not any(server.running for server in servers)


@drill(
    "fewer brokers than min.insync.replicas",
    "CannotWrite",
    _WRITES | {"ProjectionStopped", "ProjectionBehind"},
    doctor=("WRONG ",),
    ready=("log: |writer: ",),
    log=("min.insync.replicas|no broker is reached|gave no answer in time|between two brokers",),
    runbook="are the brokers up",
)
async def two_brokers(scene: Scene) -> AsyncIterator[None]:
    async with away(*scene.stage.cluster.brokers[:2]):
        yield


@drill(
    "Kafka slow for one gateway",
    "ComponentSlow",
    _WRITES,
    runbook="One is its network",
)
async def kafka_slow(scene: Scene) -> AsyncIterator[None]:
    with scene.stage.network.slow(0.45):
        yield


# --- MinIO ---


@drill(
    "MinIO away",
    "CannotWrite",
    _WRITES,
    doctor=("WRONG  blobs: .*ARTIFACT_STORE_BLOBS_URL", "WRONG  gateways: .*blobs: "),
    status=("blobs: ",),
    ready=("blobs: ",),
    log=("503 for PUT",),
    runbook="does the store answer",
)
async def minio_away(scene: Scene) -> AsyncIterator[None]:
    async with away(scene.stage.minio):
        yield


@drill(
    "MinIO frozen",
    "CannotWrite",
    _WRITES,
    doctor=("WRONG  blobs: ", "WRONG  gateways: .*blobs: no answer within 3 s"),
    status=("blobs: no answer within 3 s",),
    ready=("blobs: no answer within 3 s",),
    log=("WARNING ingest_gateway.health: component blobs fails: no answer within 3 s",),
    runbook="does the store answer",
)
async def minio_frozen(scene: Scene) -> AsyncIterator[None]:
    with frozen(scene.stage.minio):
        yield


@drill("MinIO slow", "ComponentSlow", _WRITES, runbook="`blobs`: the store's disks")
async def minio_slow(scene: Scene) -> AsyncIterator[None]:
    assert scene.stage.store is not None
    with scene.stage.store.slow(_SLOW_SECONDS):
        yield


@drill(
    "MinIO full",
    "RequestsFail",
    _WRITES,
    log=("503 for PUT .*(full|space|room|storage)",),
    runbook="503 comes with another alert|has its disk room",
)
async def minio_full(scene: Scene) -> AsyncIterator[None]:
    minio = scene.stage.minio
    assert isinstance(minio, SmallMinio)
    with minio.disk.filled(minio):
        yield


# --- PostgreSQL ---


@drill(
    "PostgreSQL away",
    "ViewsAway ProjectionStopped",
    _VIEWS,
    doctor=("WRONG  views: .*ARTIFACT_STORE_VIEWS_URL", "ok     log", "WRONG  gateways: .*views: "),
    status=("^views: ", "partition.*writer"),
    ready=("views: ",),
    log=("trying again in",),
    runbook="Bring PostgreSQL back",
)
async def postgres_away(scene: Scene) -> AsyncIterator[None]:
    async with away(scene.stage.postgres):
        yield


@drill(
    "PostgreSQL frozen",
    "ViewsAway ProjectionStopped",
    _VIEWS,
    doctor=("WRONG  views: ", "WRONG  gateways: .*views: no answer within 3 s"),
    status=("^views: ",),
    ready=("views: no answer within 3 s",),
    log=("folding [0-9]+ events has taken more than 10 s|trying again in",),
    runbook="Bring PostgreSQL back",
)
async def postgres_frozen(scene: Scene) -> AsyncIterator[None]:
    with frozen(scene.stage.postgres):
        yield


@drill("PostgreSQL slow", "ComponentSlow", _VIEWS, runbook="`views`: locks, a disk")
async def postgres_slow(scene: Scene) -> AsyncIterator[None]:
    assert scene.stage.database is not None
    with scene.stage.database.slow(_SLOW_SECONDS):
        yield


@drill(
    "PostgreSQL full",
    "ProjectionStopped",
    _VIEWS,
    log=("No space left on device",),
    runbook="The projector's last message names the cause",
)
async def postgres_full(scene: Scene) -> AsyncIterator[None]:
    postgres = scene.stage.postgres
    assert isinstance(postgres, SmallPostgres)
    with postgres.disk.filled(postgres):
        yield


@drill(
    "a view is locked by others",
    "ProjectionStopped",
    _VIEWS,
    log=("registry: folding [0-9]+ events has taken more than 10 s",),
    runbook="long transactions in PostgreSQL",
)
async def view_locked(scene: Scene) -> AsyncIterator[None]:
    async with _database(scene) as connection:
        await connection.execute("BEGIN; LOCK TABLE artifact_packages IN SHARE MODE")
        yield
        await connection.execute("ROLLBACK")


# --- processes ---


@drill("a gateway away", "TargetDown", _WRITES, runbook="Its last log lines and its exit code")
async def gateway_away(scene: Scene) -> AsyncIterator[None]:
    async with away(scene.gateways[0]):
        yield


@drill("a gateway frozen", "TargetDown", _WRITES, runbook="kill it with SIGKILL")
async def gateway_frozen(scene: Scene) -> AsyncIterator[None]:
    with frozen(scene.gateways[1]):
        yield


@drill(
    "all gateways away",
    "TargetDown PartitionWithoutWriter",
    frozenset({"ProjectionBehind"}),
    doctor=("WRONG  partitions: partition 0 takes no writes: no process writes to it", "gateways: 0 processes"),
    status=("partition 0: no process writes to it",),
    runbook="If it was the only one",
)
async def gateways_away(scene: Scene) -> AsyncIterator[None]:
    async with away(*scene.gateways):
        yield


@drill(
    "a projector away",
    "TargetDown ProjectionStopped",
    frozenset({"ProjectionBehind", "RequestsFail"}),
    doctor=("WRONG  projections: registry: no process runs it",),
    status=("registry\t[1-9][0-9]*\t0\tnone",),
    runbook="other projectors its share of the views",
)
async def projector_away(scene: Scene) -> AsyncIterator[None]:
    async with away(scene.projectors[0]):
        yield


@drill(
    "a projector frozen",
    "TargetDown ProjectionStopped",
    frozenset({"ProjectionBehind"}),
    doctor=("WRONG  projections: retention: no process runs it",),
    status=("retention\t[1-9][0-9]*\t0\tnone",),
    runbook="kill it with SIGKILL",
)
async def projector_frozen(scene: Scene) -> AsyncIterator[None]:
    with frozen(scene.projectors[1]):
        yield


@drill(
    "a gateway in a crash loop",
    "ProcessRestarts",
    _WRITES | {"TargetDown"},
    runbook="Its last log lines before each start say why",
    lingers="ProcessRestarts",
    seconds=90,
)
async def crash_loop(scene: Scene) -> AsyncIterator[None]:
    gateway = scene.gateways[2]
    seen = f'process_start_time_seconds{{instance="127.0.0.1:{gateway.port}"}}'

    def started() -> float:
        found = scene.prometheus.query(seen)
        return float(found[0]["value"][1]) if found else 0.0

    for _ in range(3):
        before = await in_thread(started)
        async with away(gateway):
            pass

        async def scraped(before: float = before) -> bool:
            return await in_thread(started) not in (0.0, before)

        await scene.becomes(scraped, 30)
    yield


@drill(
    "processes of two releases",
    status=("\t9.9.9\t",),
)
async def two_releases(scene: Scene) -> AsyncIterator[None]:
    """An upgrade: for an hour nothing cries, and then ReleasesDiffer does."""
    gateway = scene.gateways[0]
    gateway.said_release = "9.9.9"
    await in_thread(gateway.restart)
    assert await scene.becomes(lambda: _pends(scene, "ReleasesDiffer"), ALERT_SECONDS)
    _, said = await scene.doctor()
    assert re.search(r"release 0\.\S+ and 9\.9\.9", said), said
    assert "an upgrade is not finished" in said
    try:
        yield
    finally:
        gateway.said_release = None
        await in_thread(gateway.restart)


async def _pends(scene: Scene, alert: str) -> bool:
    return alert in await scene.pending()


# --- webhooks ---


@drill(
    "nobody delivers webhooks",
    "WebhooksStopped",
    doctor=("WRONG  webhooks: no process delivers to 1 active subscriptions: start `artifact-store webhooks`",),
    status=("^webhooks: no process delivers to 1 active subscriptions",),
    runbook="Start it: each subscription goes on where it was",
)
async def webhooks_away(scene: Scene) -> AsyncIterator[None]:
    """Prometheus has never heard of the process, which is killed while it delivers."""
    webhooks = Part(scene.stage.settings, scene.stage.folder / "webhooks", "webhooks", listens=False)
    async with receiving() as receiver, _subscribed(scene, receiver):
        try:
            await in_thread(webhooks.start)
            await receiver.until(lambda: bool(receiver.accepted), ALERT_SECONDS)
            await in_thread(webhooks.kill)
            before = len(receiver.accepted)
            yield
            await in_thread(webhooks.start)
            await receiver.until(lambda: len(receiver.accepted) > before, ALERT_SECONDS)
            assert await scene.becomes(lambda: _served(scene), ALERT_SECONDS)
        finally:
            await in_thread(webhooks.kill)


async def _served(scene: Scene) -> bool:
    return "WebhooksStopped" not in await scene.firing() | await scene.pending()


@asynccontextmanager
async def _subscribed(scene: Scene, receiver: Receiver) -> AsyncIterator[None]:
    url = f"{scene.stage.urls[0]}/v1/subscriptions"
    async with aiohttp.ClientSession(raise_for_status=True) as session:
        async with session.post(url, json={"url": receiver.url}) as answer:
            made = await answer.json()
        receiver.secrets.append(made["secret"])
        try:
            yield
        finally:
            async with session.delete(f"{url}/{made['subscription_id']}"):
                pass


# --- the topic ---


async def _mend_topic(scene: Scene) -> None:
    """Run what `doctor` prints; its tool is Kafka's own, whose request is made here."""
    command = recipe((await scene.doctor())[1], "kafka-configs.sh")
    await _set_on_topic(scene, *command[command.index("--add-config") + 1].split("="))
    assert await scene.becomes(lambda: _is_quiet(scene), 60), "gateways do not go on once the topic is mended"


async def _set_on_topic(scene: Scene, name: str, value: str) -> None:
    await in_thread(lambda: set_on_topic(scene.stage.cluster, scene.stage.topic, name, value))


@asynccontextmanager
async def _changed(scene: Scene, name: str, value: str, *, back: str) -> AsyncIterator[None]:
    """Within the block the topic's setting has another value."""
    await _set_on_topic(scene, name, value)
    try:
        yield
    finally:
        await _set_on_topic(scene, name, back)


async def _is_quiet(scene: Scene) -> bool:
    return not (await scene.readiness()).strip()


@drill(
    "the topic may lose events",
    "SettingsDrifted CannotWrite",
    _WRITES,
    doctor=("WRONG  log: .*retention.ms=86400000.*kafka-configs.sh", "WRONG  gateways: .*writer: .*retention.ms"),
    status=("writer: .*retention.ms",),
    ready=("writer: .*retention.ms",),
    log=("503 for POST .*retention.ms",),
    runbook="`artifact-store doctor` names the settings",
    mend=_mend_topic,
)
async def drifted(scene: Scene) -> AsyncIterator[None]:
    async with _changed(scene, "retention.ms", "86400000", back="-1"):
        yield


@drill(
    "the topic takes any time",
    "SettingsDrifted",
    doctor=("WRONG  log: .*message.timestamp.after.max.ms=90000000.*kafka-configs.sh",),
    log=("message.timestamp.after.max.ms",),
    runbook="`artifact-store doctor` names the settings",
    mend=_mend_topic,
)
async def drifted_times(scene: Scene) -> AsyncIterator[None]:
    async with _changed(scene, "message.timestamp.after.max.ms", "90000000", back="3600000"):
        yield


@drill(
    "a foreign record",
    "ForeignRecord",
    _WRITES | {"ProjectionBehind", "PackagesParked"},  # views park the package that the record's key names
    doctor=("WRONG  partitions: partition 1 takes no writes: .*artifact-store log skip 1 [0-9]+ --digest",),
    status=("partition 1: .*artifact-store log skip 1 [0-9]+ --digest",),
    ready=("writer: partition 1 .*artifact-store log skip 1",),
    log=("artifact-store log skip 1",),
    runbook="artifact-store log skip PARTITION OFFSET --digest DIGEST",
    mend=_printed("log skip", "--reason", "a drill"),
)
async def foreign_record(scene: Scene) -> AsyncIterator[None]:
    scene.stage.strays.append(b"no event")
    await in_thread(lambda: stray(scene.stage, 1, b"no event"))
    yield


@drill(
    "an acknowledged record is gone",
    "LogLost",
    _WRITES | {"TargetDown", "ProjectionBehind"},
    doctor=("WRONG  partitions: partition 2 takes no writes: .*artifact-store log accept-loss 2",),
    status=("partition 2: .*artifact-store log accept-loss 2",),
    ready=("writer: partition 2 .*artifact-store log accept-loss 2",),
    log=("artifact-store log accept-loss 2",),
    runbook="before you accept the loss",
    mend=_printed("log accept-loss", "--reason", "a drill"),
)
async def record_lost(scene: Scene) -> AsyncIterator[None]:
    """What all writers know that they acknowledged lies beyond the partition's end, at one offset."""
    for gateway in scene.gateways:
        await in_thread(gateway.stop)
    files = [path for g in scene.gateways for path in (g.folder / "state").glob("*-2.db")]
    lost = 1_000_000
    assert files
    for path in files:
        with state_about(path) as about:
            assert about[3] < lost
            about[3] = lost
    for gateway in scene.gateways:
        await in_thread(gateway.start)
    yield


# --- views ---


@drill(
    "a view of another log",
    "TargetDown",
    frozenset({"ProjectionStopped", "ProjectionBehind"}),
    doctor=("WRONG  projections: usage: usage was folded from log .*artifact-store replay usage",),
    status=("usage: usage was folded from log",),
    log=("usage stops: usage was folded from log",),
    runbook="Its last log lines and its exit code say why it ended",
    mend=_printed("replay usage"),
)
async def another_log(scene: Scene) -> AsyncIterator[None]:
    usage = list(PROJECTIONS).index("usage")
    async with _database(scene) as connection:
        change = "UPDATE projection_generations SET log = gen_random_uuid() WHERE projection = 'usage'"
        await connection.execute(change)
    yield
    await in_thread(scene.projectors[usage].restart)


async def _migrate(scene: Scene) -> None:
    code, said = await scene.command("migrate")
    assert code == 0, said


@drill(
    "PostgreSQL came back empty",
    "ProjectionStopped",
    _VIEWS,
    doctor=("WRONG  views: .*artifact-store migrate",),
    status=("^views: .*artifact-store migrate",),
    ready=("views: .*artifact-store migrate",),
    log=("artifact-store migrate",),
    runbook="tables missing",
    mend=_migrate,
)
async def views_gone(scene: Scene) -> AsyncIterator[None]:
    async with _database(scene) as connection:
        await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    yield


@drill(
    "a replay ended early",
    "ReplayEndedEarly",
    doctor=("WRONG  projections: registry: a replay by process .* ended early",),
    status=("registry: a replay by process .* ended early",),
    runbook="goes on where it was",
    mend=_printed("replay registry"),
)
async def replay_killed(scene: Scene) -> AsyncIterator[None]:
    environment = {**scene.stage.settings.environment(), "PATH": "/usr/bin:/bin"}
    command = [*COMMAND, "replay", "registry", "--max-rate", "1"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as replay:
        try:
            assert await scene.becomes(lambda: _is_built(scene), 60), "the replay does not begin"
        finally:
            replay.send_signal(signal.SIGKILL)
    yield


async def _is_built(scene: Scene) -> bool:
    async with _database(scene) as connection:
        return bool(await connection.fetchval("SELECT count(*) FROM projection_builds"))


# --- machines ---


@contextmanager
def _clock_ahead(gateway: Part, seconds: int) -> Iterator[None]:
    """Within the block the gateway's clock is so far ahead; negative: behind."""
    gateway.set_clock(seconds)
    try:
        yield
    finally:
        gateway.set_clock(0)


@drill(
    "a gateway's clock a day ahead",
    "ClockWrong CannotWrite",
    _WRITES,
    doctor=("WRONG  gateways: .*clock is .* ahead of the blob store's",),
    status=("clock is .* ahead of the blob store's",),
    ready=("writer: this machine's clock is 24 h ahead",),
    log=("clock",),
    runbook="Run NTP",
)
async def clock_wrong(scene: Scene) -> AsyncIterator[None]:
    with _clock_ahead(scene.gateways[0], 86_400):
        yield


@drill(
    "a gateway's clock half a minute behind",
    "ClockWrong",
    doctor=("WRONG  gateways: .*its clock is [23][0-9] s behind the blob store's",),
    status=("its clock is [23][0-9] s behind",),
    runbook="Run NTP",
)
async def clock_behind(scene: Scene) -> AsyncIterator[None]:
    with _clock_ahead(scene.gateways[1], -30):
        yield


@drill(
    "a gateway's state disk full",
    "StateDiskFull StateDiskLow",
    _WRITES | {"TargetDown"},
    doctor=("WRONG  partitions: partition [0-9]: .*disk|WRONG  gateways: .*ARTIFACT_STORE_STATE_DIR has",),
    status=("ARTIFACT_STORE_STATE_DIR has",),
    runbook="Make room in `ARTIFACT_STORE_STATE_DIR`",
)
async def state_disk_full(scene: Scene) -> AsyncIterator[None]:
    gateway = scene.gateways[2]
    disk = SmallDisk(gateway.folder / "state", SMALL_DISK_MIB)
    await in_thread(gateway.stop)
    await in_thread(disk.make)
    gateway.disk = disk
    await in_thread(gateway.start)
    try:
        with disk.filled(gateway):
            yield
    finally:
        gateway.disk = None
        await in_thread(gateway.restart)


@drill(
    "a certificate about to end",
    "CertificateEnds",
    frozenset({"TargetDown"}),
    doctor=("WRONG  gateways: .*the certificate in ARTIFACT_STORE_CA ends in 3 days",),
    status=("the certificate in ARTIFACT_STORE_CA ends in 3 days",),
    runbook="Put the new certificate",
    mend=lambda scene: _renew(scene, days=300),
)
async def certificate_ends(scene: Scene) -> AsyncIterator[None]:
    gateway = scene.gateways[1]
    await _renew(scene, days=3)
    gateway.change(ca=scene.stage.folder / "certificates" / "authority.pem")
    await in_thread(gateway.restart)
    yield


async def _renew(scene: Scene, *, days: int) -> None:
    Authority(scene.stage.folder / "certificates", ends=datetime.now(UTC) + timedelta(days=days, hours=1))


@asynccontextmanager
async def _database(scene: Scene) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(scene.stage.postgres.url().replace("+asyncpg", ""))
    try:
        yield connection
    finally:
        with suppress(asyncpg.PostgresError, OSError):
            await connection.close()
