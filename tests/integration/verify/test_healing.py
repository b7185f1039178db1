"""One blob deleted, one damaged: `verify --bytes` names both, and pushing the same files again heals both.

For files with separate blobs and for packed files, on folders, MinIO and SeaweedFS.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.config import Settings
from tests.contract.blobs_stage import endpoint
from tests.integration.processes import deployed, output_of, run_command

pytestmark = pytest.mark.processes

MIB = 1 << 20
ABOUT = ("--name", "n", "--producer", "p", "--subject", "s", "--retention-class", "scratch", "--json")


@pytest.fixture(
    params=[
        "embedded",
        pytest.param("real", marks=pytest.mark.services),
        pytest.param("seaweedfs", marks=pytest.mark.services),
    ]
)
def settings(request: pytest.FixtureRequest) -> Settings:
    """Both sets of parts, and the embedded log and views with their blobs on SeaweedFS."""
    if request.param != "seaweedfs":
        found: Settings = request.getfixturevalue(f"{request.param}_settings")
        return found
    embedded: Settings = request.getfixturevalue("embedded_settings")
    return replace(embedded, **request.getfixturevalue("seaweed_bucket"))


@pytest.fixture
def url(settings: Settings, tmp_path: Path) -> Iterator[str | None]:
    """Where clients push to: the deployed gateway, or the embedded parts themselves."""
    if settings.log_url.startswith("kafka:"):
        with deployed(settings, tmp_path) as processes:
            yield processes["gateway"].endpoint
    else:
        yield None


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files that lie in a blob of their own each, and some that may lie together."""
    folder = tmp_path / "tree"
    folder.mkdir()
    for number, size in enumerate((12 * MIB, 9 * MIB, 100_000, 17, 0)):
        (folder / f"file-{number}").write_bytes(random.Random(number).randbytes(size))
    return folder


class Objects:
    """The blobs of a store, past the product: their keys by size, and ways to do harm to them."""

    def __init__(self, settings: Settings) -> None:
        self._folder = None if settings.blobs_url.startswith("s3") else Path(settings.blobs_url.removeprefix("file:"))
        self._at = endpoint(
            {
                "blobs_url": settings.blobs_url,
                "s3_access_key": settings.s3_access_key,
                "s3_secret_key": settings.s3_secret_key.get_secret_value(),
                "s3_region": settings.s3_region or "us-east-1",
            }
        )

    def of_size(self, size: int) -> str:
        """The key of the one blob of this size."""
        if self._folder is None:
            listed = self._at.sdk().list_objects(self._at.bucket, recursive=True)
            found = [str(item.object_name) for item in listed if item.size == size]
        else:
            paths = (path for path in self._folder.rglob("*") if path.is_file() and path.stat().st_size == size)
            found = [path.relative_to(self._folder).as_posix() for path in paths]
        (key,) = found
        return key

    def keys(self) -> list[str]:
        """The keys of all content-addressed blobs, the largest first."""
        if self._folder is None:
            listed = self._at.sdk().list_objects(self._at.bucket, prefix="blobs/", recursive=True)
            sizes = {str(item.object_name): item.size or 0 for item in listed}
        else:
            paths = (path for path in (self._folder / "blobs").rglob("*") if path.is_file())
            sizes = {path.relative_to(self._folder).as_posix(): path.stat().st_size for path in paths}
        return sorted(sizes, key=sizes.__getitem__, reverse=True)

    def read(self, key: str) -> bytes:
        if self._folder is None:
            with self._at.sdk().get_object(self._at.bucket, key) as answer:
                return answer.read()
        return (self._folder / key).read_bytes()

    def delete(self, key: str) -> None:
        if self._folder is None:
            self._at.sdk().remove_object(self._at.bucket, key)
        else:
            (self._folder / key).unlink()

    def overwrite(self, key: str, data: bytes) -> None:
        if self._folder is None:
            self._at.sdk().put_object(self._at.bucket, key, io.BytesIO(data), len(data))
        else:
            (self._folder / key).write_bytes(data)


def verified(settings: Settings, *, clean: bool) -> dict[str, Any]:
    """What `verify --bytes --json` prints, its exit code being what it must be."""
    done = run_command(settings, "verify", "--bytes", "--json")
    assert done.returncode == (0 if clean else 1), done
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_deleted_and_a_damaged_blob_are_named_and_healed_by_the_next_push(
    settings: Settings, url: str | None, tree: Path, tmp_path: Path
) -> None:
    first = json.loads(output_of(settings, "push", tree, *ABOUT, url=url))
    assert verified(settings, clean=True)["bytes"] >= 21 * MIB
    store = Objects(settings)
    gone, damaged = store.of_size(12 * MIB), store.of_size(9 * MIB)
    store.delete(gone)
    store.overwrite(damaged, bytes(9 * MIB))

    report = verified(settings, clean=False)
    assert {(v["kind"], key) for v in report["violations"] for key in (gone, damaged) if key in v["detail"]} == {
        ("blob-missing", gone),
        ("blob-damaged", damaged),
    }
    assert report["violation_count"] == 2
    assert report["set_aside"] == {damaged: f"damaged/{damaged}"}

    second = json.loads(output_of(settings, "push", tree, *ABOUT, url=url))
    assert second["package_id"] != first["package_id"]
    assert verified(settings, clean=True)["violations"] == []
    for package in (first, second):
        pulled = tmp_path / package["package_id"]
        output_of(settings, "pull", package["package_id"], pulled, url=url)
        assert {path.name: path.read_bytes() for path in pulled.iterdir()} == {
            path.name: path.read_bytes() for path in tree.iterdir()
        }


def test_packs_heal_as_blobs_of_one_file_do(settings: Settings, url: str | None, tmp_path: Path) -> None:
    tree = tmp_path / "small"
    tree.mkdir()
    for number in range(240):
        (tree / f"{number:03}").write_bytes(random.Random(number).randbytes(50_000))
    first = json.loads(output_of(settings, "push", tree, *ABOUT, url=url))
    store = Objects(settings)
    gone, damaged = store.keys()
    verified(settings, clean=True)
    lost = len(store.read(gone)) // 50_000
    store.delete(gone)
    data = store.read(damaged)
    store.overwrite(damaged, bytes(10) + data[10:])  # of one file; the others in the pack are as they were

    report = verified(settings, clean=False)
    named = [(v["kind"], key) for v in report["violations"] for key in (gone, damaged) if key in v["detail"]]
    assert sorted(named) == [("blob-damaged", damaged), *[("blob-missing", gone)] * lost]
    assert report["violation_count"] == lost + 1
    assert report["set_aside"] == {damaged: f"damaged/{damaged}"}

    second = json.loads(output_of(settings, "push", tree, *ABOUT, url=url))
    assert verified(settings, clean=True)["violations"] == []
    assert {gone, damaged} <= set(store.keys())
    for package in (first, second):
        pulled = tmp_path / package["package_id"]
        output_of(settings, "pull", package["package_id"], pulled, url=url)
        assert {path.name: path.read_bytes() for path in pulled.iterdir()} == {
            path.name: path.read_bytes() for path in tree.iterdir()
        }
