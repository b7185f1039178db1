"""PostgreSQL: one cluster on a loopback port, which is only reached by TCP.

Its default collation is linguistic if the build has ICU, so that tests notice a column without the binary order.
PostgreSQL refuses to run as root: then it runs as the system's `postgres` user, with its data below /var/tmp, because
that user cannot reach root's folders.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import ClassVar

from tests.services.install import postgres_binaries
from tests.services.process import Server, ServiceError

USER = "artifact_store"
_PROTOCOL = 3 << 16  # version 3.0 of the frontend/backend protocol


class PostgresServer(Server):
    """One PostgreSQL with a superuser `artifact_store` and the database `artifact_store`. `endpoint` is `host:port`."""

    name = "postgres"
    stop_signal: ClassVar[signal.Signals] = signal.SIGINT  # "fast": ends sessions, rolls back, writes a checkpoint

    def __init__(
        self,
        folder: Path,
        port: int | None = None,
        password: str | None = None,
        home: Path | None = None,
        *,
        durable: bool = False,
    ) -> None:
        """Without `durable`, nothing is forced to disk: quick, safe against SIGKILL, not against a loss of power.

        `home` is where an earlier start left its data. Without `password`: drawn at random.
        """
        super().__init__(folder, port)
        self.password = password or secrets.token_urlsafe(24)
        self.durable = durable
        self._home = home

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def url(self, database: str = USER) -> str:
        """The SQLAlchemy URL for asyncpg, password included."""
        return f"postgresql+asyncpg://{USER}:{self.password}@{self.endpoint}/{database}"

    @property
    def home(self) -> Path:
        """A folder that the user PostgreSQL runs as can reach; holds the data."""
        if self._home is None:
            user = self.user()
            if user is None:
                self._home = self.folder
            else:
                self._home = Path(tempfile.mkdtemp(prefix="artifact-store-postgres-", dir="/var/tmp"))
                shutil.chown(self._home, user, user)
        return self._home

    @property
    def data(self) -> Path:
        return self.home / "data"

    def user(self) -> str | None:
        if os.geteuid() != 0:
            return None
        binaries = postgres_binaries()  # installing the system's package makes the user
        try:
            return pwd.getpwnam("postgres").pw_name
        except KeyError:
            raise ServiceError(
                f"{binaries}/postgres does not run as root and there is no user `postgres`: add one (useradd postgres)"
            ) from None

    def prepare(self) -> None:
        if (self.data / "PG_VERSION").exists():
            return
        binaries = postgres_binaries()
        password = self.home / "password"
        password.touch(mode=0o600)
        password.write_text(f"{self.password}\n", encoding="utf-8")
        if user := self.user():
            shutil.chown(password, user, user)
        options = ["--encoding=UTF8", "--no-sync", "--auth=scram-sha-256", f"--username={USER}", f"--pwfile={password}"]
        initdb = [str(binaries / "initdb"), *options, "-D", str(self.data), "--locale=C"]
        made = self._feed([*initdb, "--locale-provider=icu", "--icu-locale=en-US"]) or self._feed(initdb)
        password.unlink()
        if not made:
            raise ServiceError(f"initdb failed:\n{self.end_of_log()}")
        single = [str(binaries / "postgres"), "--single", "-D", str(self.data), "postgres"]
        if not self._feed(single, f"create database {USER}\n"):
            raise ServiceError(f"the database could not be made:\n{self.end_of_log()}")

    def _feed(self, command: list[str], text: str = "") -> bool:
        """Run to the end as PostgreSQL's user with `text` as standard input; whether it succeeded."""
        user = self.user()
        with self.log.open("ab") as log:
            done = subprocess.run(
                command,
                input=text.encode(),
                stdout=log,
                stderr=log,
                cwd="/",
                timeout=120,
                check=False,
                user=user,
                group=user,
                extra_groups=[] if user else None,
            )
        return done.returncode == 0

    def command(self) -> list[str]:
        settings: dict[str, str | int] = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": 200,
            "shared_buffers": "128MB",
            "max_wal_size": "2GB",
        }
        if not self.durable:
            settings |= {"fsync": "off", "full_page_writes": "off"}
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        return [str(postgres_binaries() / "postgres"), "-D", str(self.data), "-p", str(self.port), *options]

    def answers(self) -> bool:
        """Whether it takes sessions: a start-up packet is answered by a question for the password, not by an error."""
        parameters = b"".join(part.encode() + b"\0" for part in ("user", USER, "database", USER)) + b"\0"
        packet = struct.pack(">ii", 8 + len(parameters), _PROTOCOL) + parameters
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(packet)
                return bool(connection.recv(1) == b"R")
        except OSError:
            return False

    def delete(self) -> None:
        if self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)
        super().delete()
