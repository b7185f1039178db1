"""SeaweedFS on one folder: a second S3, unrelated to MinIO, to check that the product only needs S3."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.services.install import seaweed_binary
from tests.services.process import free_ports
from tests.services.s3 import S3Server

_ROLES = ("master", "filer", "volume", "admin")
"""Each listens on a port for HTTP and one for gRPC, as the S3 gateway does."""

INNER_PORTS = 2 * len(_ROLES) + 1
"""How many ports it listens on beside that of S3."""


class SeaweedServer(S3Server):
    """One SeaweedFS, all of its parts in one process."""

    name = "seaweedfs"
    health = "/healthz"

    def __init__(
        self,
        folder: Path,
        port: int | None = None,
        access_key: str | None = None,
        secret_key: str | None = None,
        *,
        inner_ports: Sequence[int] | None = None,
    ) -> None:
        """Without `inner_ports`, as many as `INNER_PORTS`: free ones. See S3Server for the rest."""
        super().__init__(folder, port, access_key, secret_key)
        self._ports = list(inner_ports or free_ports(INNER_PORTS))

    def command(self) -> list[str]:
        s3_grpc, *others = self._ports
        ports = [f"-s3.port={self.port}", f"-s3.port.grpc={s3_grpc}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        for role, http, grpc in zip(_ROLES, others[::2], others[1::2], strict=True):
            ports += [f"-{role}.port={http}", f"-{role}.port.grpc={grpc}"]
        return [
            str(seaweed_binary()),
            "-logtostderr=true",
            "mini",
            f"-dir={self.folder / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            *ports,
            "-admin.ui=false",
            "-webdav=false",
            "-master.telemetry=false",  # it would call home otherwise
            "-s3.autoCreateBucket=false",  # S3 has no buckets that come of themselves
        ]

    def environment(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}

    def delete(self) -> None:
        super().delete()
        for port in (self.port, *self._ports):  # its sockets lie there, whatever it is told
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # noqa: S108 - a name of its own making
                left.unlink(missing_ok=True)
