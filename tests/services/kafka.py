"""Apache Kafka in KRaft mode: one broker, or a cluster of three whose members can be killed one by one.

Group and transaction time-outs are far below Kafka's defaults, so that take-overs in tests are quick. Durability for
clients (acknowledgements, fencing, read_committed) is as usual.
"""

from __future__ import annotations

import base64
import os
import socket
import struct
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

from tests.services.install import java, kafka_jars
from tests.services.process import Server, ServiceError, free_ports, wait_until

_LOG4J = """status = warn
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d %p %m (%c{1})%n%ex
rootLogger.level = warn
rootLogger.appenderRef.out.ref = out
"""
MEMBERS_AWAITED = "group.initial.rebalance.delay.ms"
MEMBERS_AWAITED_MS = 3_000
"""How long a broker waits for the other members of a new group: Kafka's default where a durable set is for measuring.
Tests have no time for it.
"""
_INTERNAL_TOPICS = ("offsets.topic", "transaction.state.log", "share.coordinator.state.topic")
_METADATA_KEY, _METADATA_VERSION = 3, 1


def random_uuid() -> str:
    """A Kafka Uuid: 16 bytes as URL-safe base64 without padding, never with a leading dash."""
    while (text := base64.urlsafe_b64encode(os.urandom(16)).decode().rstrip("=")).startswith("-"):
        pass
    return text


class KafkaBroker(Server):
    """One broker that is its own controller. `endpoint` is `host:port`."""

    name = "kafka"

    def __init__(
        self,
        folder: Path,
        port: int | None = None,
        controller_port: int | None = None,
        *,
        heap_mib: int = 256,
        options: Mapping[str, str | int] | None = None,
    ) -> None:
        """`options` are broker settings beyond or instead of the ones here. See Server for the rest."""
        super().__init__(folder, port)
        self.controller_port = controller_port if controller_port is not None else free_ports(1)[0]
        self.node_id = 1
        self.voters = {1: self.controller_port}
        self.cluster_id = random_uuid()
        self.directory_ids: dict[int, str] = {}
        self._heap_mib = heap_mib
        self.listeners = {
            "CLIENT": (self.port, self.port),
            "CONTROLLER": (self.controller_port, self.controller_port),
        }
        """By name, the port that is listened on and the one that is advertised; they count from the next start on."""
        self.options = dict(options or {})
        """Broker settings beyond or instead of the ones here; they count from the next start on."""

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def command(self) -> list[str]:
        return [*self._java(), "kafka.Kafka", str(self.folder / "server.properties")]

    def _java(self) -> list[str]:
        memory = [f"-Xms{self._heap_mib}m", f"-Xmx{self._heap_mib}m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        logging = f"-Dlog4j2.configurationFile={self.folder / 'log4j2.properties'}"
        return [java(), *memory, logging, "-cp", f"{kafka_jars()}/*"]

    def prepare(self) -> None:
        (self.folder / "log4j2.properties").write_text(_LOG4J, encoding="utf-8")
        properties = "".join(f"{key}={value}\n" for key, value in {**self._properties(), **self.options}.items())
        configuration = self.folder / "server.properties"
        configuration.write_text(properties, encoding="utf-8")
        if (self.data / "meta.properties").exists():
            return
        if self.directory_ids:
            voters = ",".join(f"{n}@127.0.0.1:{port}:{self.directory_ids[n]}" for n, port in self.voters.items())
            quorum = ["--initial-controllers", voters]
        else:
            quorum = ["--standalone"]
        tool = [*self._java(), "kafka.tools.StorageTool", "format", "-t", self.cluster_id, "-c", str(configuration)]
        done = subprocess.run([*tool, *quorum], capture_output=True, text=True, timeout=60, check=False)
        if done.returncode != 0:
            raise ServiceError(f"Kafka's storage could not be formatted:\n{done.stdout}{done.stderr}")

    def _properties(self) -> dict[str, str | int]:
        replicas = min(3, len(self.voters))
        in_sync = 2 if replicas == 3 else 1
        properties: dict[str, str | int] = {
            "process.roles": "broker,controller",
            "node.id": self.node_id,
            "listeners": ",".join(f"{name}://127.0.0.1:{port}" for name, (port, _) in self.listeners.items()),
            "advertised.listeners": ",".join(
                f"{name}://127.0.0.1:{port}" for name, (_, port) in self.listeners.items()
            ),
            "listener.security.protocol.map": ",".join(f"{name}:PLAINTEXT" for name in self.listeners),
            "inter.broker.listener.name": "CLIENT",
            "controller.listener.names": "CONTROLLER",
            "controller.quorum.bootstrap.servers": ",".join(f"127.0.0.1:{port}" for port in self.voters.values()),
            "log.dirs": str(self.data),
            "auto.create.topics.enable": "false",
            "unclean.leader.election.enable": "false",
            "default.replication.factor": replicas,
            "min.insync.replicas": in_sync,
            "num.network.threads": 2,
            "num.io.threads": 4,
            "log.cleaner.dedupe.buffer.size": 16 << 20,
            "file.delete.delay.ms": 1000,
            "log.initial.task.delay.ms": 500,
            "log.retention.check.interval.ms": 500,
            "broker.session.timeout.ms": 3000,
            "broker.heartbeat.interval.ms": 500,
            MEMBERS_AWAITED: 0,
            "group.min.session.timeout.ms": 1000,
            "group.consumer.min.session.timeout.ms": 1000,
            "group.consumer.session.timeout.ms": 6000,
            "group.consumer.min.heartbeat.interval.ms": 200,
            "group.consumer.heartbeat.interval.ms": 500,
            "transaction.abort.timed.out.transaction.cleanup.interval.ms": 1000,
        }
        for topic in _INTERNAL_TOPICS:
            properties[f"{topic}.num.partitions"] = 4
            properties[f"{topic}.replication.factor"] = replicas
        for topic in _INTERNAL_TOPICS[1:]:
            properties[f"{topic}.min.isr"] = in_sync
        return properties

    def answers(self) -> bool:
        return self.brokers_seen() >= 1

    def brokers_seen(self) -> int:
        """How many brokers this one says are alive, by a Metadata request without topics (Kafka protocol guide)."""
        client = b"start"
        header = struct.pack(">hhih", _METADATA_KEY, _METADATA_VERSION, 1, len(client)) + client
        request = header + struct.pack(">i", 0)
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(struct.pack(">i", len(request)) + request)
                # Answer: length, correlation id, then the count of brokers.
                answer = b""
                while len(answer) < 12:
                    received = connection.recv(4096)
                    if not received:
                        return 0
                    answer += received
        except OSError:
            return 0
        return int(struct.unpack(">iii", answer[:12])[2])


class KafkaCluster:
    """Brokers in one cluster, each its own process and folder; replication factor 3, two in sync."""

    def __init__(self, folder: Path, brokers: int = 3, *, options: Mapping[str, str | int] | None = None) -> None:
        """`folder` takes one folder a broker."""
        self.folder = folder.absolute()
        ports = free_ports(2 * brokers)
        cluster_id = random_uuid()
        voters = {n: ports[2 * n - 1] for n in range(1, brokers + 1)}
        directory_ids = {n: random_uuid() for n in voters}
        self.brokers: list[KafkaBroker] = []
        for n in voters:
            broker = KafkaBroker(
                self.folder / f"broker-{n}", ports[2 * n - 2], voters[n], heap_mib=192, options=options
            )
            broker.node_id, broker.voters = n, voters
            broker.cluster_id, broker.directory_ids = cluster_id, directory_ids
            self.brokers.append(broker)

    @property
    def endpoint(self) -> str:
        """`host:port,host:port,…`"""
        return ",".join(broker.endpoint for broker in self.brokers)

    def start(self) -> None:
        """Start all brokers that do not run; returns when each knows every other."""
        # One alone has no quorum and would wait for the others.
        with ThreadPoolExecutor(len(self.brokers)) as pool:
            for started in [pool.submit(broker.start) for broker in self.brokers]:
                started.result()
        wait_until(
            lambda: all(broker.brokers_seen() == len(self.brokers) for broker in self.brokers),
            self.brokers[0].start_seconds,
            "the brokers of the cluster do not find each other",
        )

    def stop(self) -> None:
        """End all brokers in order. Data stays."""
        for broker in self.brokers:
            broker.stop()

    def close(self) -> None:
        """Kill all brokers and delete their data."""
        for broker in self.brokers:
            broker.kill()
            broker.delete()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
