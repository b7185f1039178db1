"""The folder of a pull: names that it takes for one, names that it does not take, what stands where a file should."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from threading import Event
from typing import Any
from uuid import uuid4

import pytest
from blake3 import blake3

from services.client import destination, pull, push
from services.client.destination import Destination
from services.client.pull import _check_files
from services.config import Settings
from services.errors import ConflictError
from services.manifest import ManifestFile
from services.registry import Registry, open_registry


@pytest.fixture
async def registry(embedded_settings: Settings) -> AsyncIterator[Registry]:
    async with open_registry(embedded_settings) as opened:
        yield opened


class Caseless:
    """The system's calls, in which case does not count for names in a folder."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        return os.open(path if dir_fd is None else path.lower(), flags, mode, dir_fd=dir_fd)

    def stat(self, path: str, **options: Any) -> os.stat_result:
        return os.stat(path.lower(), **options)  # noqa: PTH116 - the call itself is stood in for

    def link(self, source: str, target: str, **options: Any) -> None:
        os.link(source.lower(), target.lower(), **options)

    def rename(self, source: str, target: str, **options: Any) -> None:
        os.rename(source.lower(), target.lower(), **options)  # noqa: PTH104 - as above

    def unlink(self, path: str, **options: Any) -> None:
        os.unlink(path.lower(), **options)


@pytest.fixture
def caseless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(destination, "os", Caseless())


async def pushed(registry: Registry, folder: Path, files: dict[str, bytes]) -> Any:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    done = await push(registry, folder, name="n", producer="p", subject="s", retention_class="scratch")
    return done.package_id


@pytest.mark.usefixtures("caseless")
@pytest.mark.parametrize("there", ["README", "readme"])
async def test_a_file_that_was_kept_is_not_replaced_by_one_of_the_same_name(
    registry: Registry, tmp_path: Path, there: str
) -> None:
    files = {"README": b"upper", "readme": b"lower"}
    package_id = await pushed(registry, tmp_path / "tree", files)
    out = tmp_path / "out"
    out.mkdir()
    (out / "readme").write_bytes(files[there])
    with pytest.raises(ConflictError, match="one name in this folder"):
        await pull(registry, package_id, out, force=True)
    assert [(path.name, path.read_bytes()) for path in out.iterdir()] == [("readme", files[there])]


async def test_one_of_two_names_of_a_kept_file_is_replaced(registry: Registry, tmp_path: Path) -> None:
    files = {"a": b"one", "b": b"two"}
    package_id = await pushed(registry, tmp_path / "tree", files)
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_bytes(b"one")
    (out / "b").hardlink_to(out / "a")
    assert (await pull(registry, package_id, out, force=True)).kept == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files


def test_a_folder_in_the_place_of_a_file_is_named_and_closed_again(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    folder = Destination(tmp_path)
    try:
        opened = set(Path("/dev/fd").iterdir())
        for _ in range(3):
            with pytest.raises(ConflictError, match="'a' is there and no regular file"):
                folder.holds("a", 1, bytes(32), Event())
        assert set(Path("/dev/fd").iterdir()) == opened
    finally:
        folder.close()


@pytest.mark.parametrize("path", ["x" * 256, "é" * 128, "x" * 300 + "/below", "a/" + "x" * 256 + "/below"])
async def test_a_name_that_is_too_long_for_the_folder_is_refused_before_anything_is_written(
    registry: Registry, tmp_path: Path, path: str
) -> None:
    package_id = await registry.create_package("n", "p", "s", "scratch")
    for name in ("a/b", path):
        await registry.ingest_file(package_id, name, "text/plain", b"bytes")
    await registry.finalize_package(package_id)
    with pytest.raises(ConflictError, match="longer name") as caught:
        await pull(registry, package_id, tmp_path / "out")
    assert repr(path) in caught.value.detail
    assert list((tmp_path / "out").iterdir()) == []


def entries(*paths: str) -> list[ManifestFile]:
    return [ManifestFile(uuid4(), path, "text/plain", 0, blake3().hexdigest(), "00" * 32) for path in paths]


@pytest.mark.parametrize("paths", [("f", "f-x", "f/x"), ("f/x", "f-x", "f"), ("a/f", "a/f.txt", "a/f/x/y", "a/f0")])
def test_a_file_above_another_is_found_whatever_stands_between_them(paths: tuple[str, ...]) -> None:
    with pytest.raises(ConflictError, match="no folder can hold them both"):
        _check_files(entries(*paths))
