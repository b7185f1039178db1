"""What copies files into a bucket and back without a registry: minio-py, rclone and mc, each set as fast as it goes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import urllib3
from minio import Minio

from services.config import Settings
from tests.services.install import go_program
from tests.services.process import ServiceError

RCLONE = ("github.com/rclone/rclone", "v1.68.2")
MC = ("github.com/minio/mc", "v0.0.0-20250313080218-cf909e1063a9")
_SECONDS = 300.0
_PART_BYTES = 16 << 20  # the default of 5 MiB is slower
_THREADS = 8  # of Python; 16 and more were slower on two cores

Copy = Callable[[Path, str], None]
"""Copies between a folder and the keys below a prefix of the bucket. Blocks."""


@dataclass(frozen=True, slots=True)
class Copier:
    """One program, in both directions."""

    name: str
    upload: Copy
    download: Copy


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket and how to reach it, by plain HTTP."""

    host: str
    name: str
    access_key: str
    secret_key: str
    region: str

    @classmethod
    def of(cls, settings: Settings) -> Bucket:
        """The bucket of these settings."""
        url = urlsplit(settings.blobs_url)
        secret = settings.s3_secret_key.get_secret_value()
        return cls(url.netloc, url.path.strip("/"), settings.s3_access_key, secret, settings.s3_region)

    def client(self, connections: int = 1) -> Minio:
        """The SDK with this many connections to keep."""
        pool = urllib3.PoolManager(maxsize=connections, timeout=urllib3.Timeout(60))
        return Minio(self.host, self.access_key, self.secret_key, secure=False, region=self.region, http_client=pool)


def copiers(bucket: Bucket, note: Callable[[str], None]) -> list[Copier]:
    """All that can be had; `note` is told which cannot."""
    found = [_minio_py(bucket, _THREADS)]
    for program, make in ((RCLONE, _rclone), (MC, _mc)):
        try:
            found.append(make(bucket, go_program(*program)))
        except ServiceError as error:
            note(f"{program[0]} is left out: {error}")
    return found


async def seconds_of(work: Callable[[], object]) -> float:
    """How long the work takes in a thread."""
    began = time.perf_counter()
    await asyncio.to_thread(work)
    return time.perf_counter() - began


def _minio_py(bucket: Bucket, threads: int) -> Copier:
    """Within this process, so that no start of Python is in its time."""
    client = bucket.client(threads)

    def upload(folder: Path, prefix: str) -> None:
        def put(path: Path) -> None:
            name = f"{prefix}/{path.relative_to(folder).as_posix()}"
            client.fput_object(bucket.name, name, str(path), part_size=_PART_BYTES)

        with ThreadPoolExecutor(threads) as pool:
            for done in pool.map(put, [path for path in folder.rglob("*") if path.is_file()], chunksize=8):
                assert done is None

    def download(folder: Path, prefix: str) -> None:
        def get(key: str) -> None:
            # What `fget_object` does, without asking for each object's size first.
            path = folder / key.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            answer = client.get_object(bucket.name, key)
            try:
                path.write_bytes(answer.read())
            finally:
                answer.close()
                answer.release_conn()

        with ThreadPoolExecutor(threads) as pool:
            listed = client.list_objects(bucket.name, prefix=f"{prefix}/", recursive=True)
            for done in pool.map(get, [str(item.object_name) for item in listed], chunksize=8):
                assert done is None

    return Copier(f"minio-py, {threads} threads", upload, download)


def _rclone(bucket: Bucket, program: Path) -> Copier:
    environment = {
        "RCLONE_CONFIG": "",
        "RCLONE_CONFIG_B_TYPE": "s3",
        "RCLONE_CONFIG_B_PROVIDER": "Minio",
        "RCLONE_CONFIG_B_ENDPOINT": f"http://{bucket.host}",
        "RCLONE_CONFIG_B_ACCESS_KEY_ID": bucket.access_key,
        "RCLONE_CONFIG_B_SECRET_ACCESS_KEY": bucket.secret_key,
        "RCLONE_CONFIG_B_REGION": bucket.region,
    }
    # Nothing is looked up that need not be: neither bucket nor destination, nor an object before or after its copy.
    fast = ["--no-check-dest", "--s3-no-check-bucket", "--s3-no-head", "--s3-no-head-object", "--use-server-modtime"]
    tuned = [
        *fast,
        "--transfers",
        "32",
        "--checkers",
        "32",
        "--fast-list",
        "--s3-disable-checksum",
        "--s3-chunk-size",
        f"{_PART_BYTES >> 20}Mi",
        "--ignore-size",  # which it would have to ask for
        "--ignore-checksum",
    ]

    def copy(source: str, target: str) -> None:
        _run([str(program), "copy", source, target, *tuned, "--quiet"], environment)

    return Copier(
        f"rclone {RCLONE[1]}, 32 transfers",
        lambda folder, prefix: copy(str(folder), f"b:{bucket.name}/{prefix}"),
        lambda folder, prefix: copy(f"b:{bucket.name}/{prefix}", str(folder)),
    )


def _mc(bucket: Bucket, program: Path) -> Copier:
    environment = {"MC_HOST_b": f"http://{bucket.access_key}:{bucket.secret_key}@{bucket.host}"}

    def copy(source: str, target: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            command = [str(program), "--config-dir", folder, "--quiet", "cp", "--recursive", source, target]
            _run(command, environment)

    return Copier(
        "mc",
        lambda folder, prefix: copy(f"{folder}/", f"b/{bucket.name}/{prefix}/"),
        lambda folder, prefix: copy(f"b/{bucket.name}/{prefix}/", f"{folder}/"),
    )


def _run(command: list[str], environment: Mapping[str, str]) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={**os.environ, **environment},
        timeout=_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr[-500:].decode(errors='replace')}")
