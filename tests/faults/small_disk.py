"""Servers with a small separate disk that can be filled: a file system in a file, mounted only for them."""

from __future__ import annotations

import pwd
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import asyncpg

from tests.services.minio import MinioServer
from tests.services.postgres import USER, PostgresServer
from tests.services.process import Server


class SmallDisk:
    """A disk at `folder`, for a server that is started by root. What is on it outlives the server."""

    def __init__(self, folder: Path, mib: int) -> None:
        self.folder = folder
        self._image = folder.with_name(f"{folder.name}.image")
        self._mib = mib

    def make(self) -> None:
        """Make the file system unless it is there. Blocks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._image.exists():
            with self._image.open("wb") as file:
                file.truncate(self._mib << 20)
            subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", self._image], check=True)

    def command(self, inner: list[str], user: str | None = None) -> list[str]:
        """The command line that runs `inner` where the disk is mounted, as `user`, who then owns the disk."""
        mount, become = f"mount -o loop {self._image} {self.folder}", ""
        if user is not None:
            owner = pwd.getpwnam(user)
            mount += f" && chown {owner.pw_uid}:{owner.pw_gid} {self.folder}"
            become = f"setpriv --reuid {owner.pw_uid} --regid {owner.pw_gid} --clear-groups "
        return ["unshare", "--mount", "sh", "-c", f'{mount} && exec {become}"$@"', "sh", *inner]

    @contextmanager
    def filled(self, server: Server) -> Iterator[None]:
        """Inside the block, the disk of this server has no room. Blocks."""
        ballast = Path(f"/proc/{server.pid}/root{self.folder}/ballast")
        try:
            with ballast.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(1 << 16))
            yield
        finally:
            ballast.unlink(missing_ok=True)


class SmallMinio(MinioServer):
    """MinIO with a small disk."""

    mib = 256

    @property
    def disk(self) -> SmallDisk:
        """Where its data is."""
        return SmallDisk(self.folder / "disk", self.mib)

    def prepare(self) -> None:
        super().prepare()
        self.disk.make()

    def command(self) -> list[str]:
        *command, _ = super().command()
        return self.disk.command([*command, str(self.disk.folder / "data")])


class SmallPostgres(PostgresServer):
    """PostgreSQL whose database `views` has its tables on a small disk; started by root."""

    mib = 32
    _prepared = False

    @property
    def disk(self) -> SmallDisk:
        """Where the tables are."""
        return SmallDisk(self.home / "small", self.mib)

    def prepare(self) -> None:
        super().prepare()
        self.disk.make()
        self._prepared = True

    def user(self) -> str | None:
        return None if self._prepared else super().user()  # who mounts the disk becomes that user behind it

    def command(self) -> list[str]:
        return self.disk.command(super().command(), super().user())

    async def small_database(self) -> str:
        """The URL of the database, which is made."""
        connection = await asyncpg.connect(self.url(USER).replace("+asyncpg", ""))
        try:
            await connection.execute(f"CREATE TABLESPACE small LOCATION '{self.disk.folder}'")
            await connection.execute("CREATE DATABASE views TABLESPACE small")
        finally:
            await connection.close()
        return self.url("views")
