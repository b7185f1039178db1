"""The files that `pull` writes: none outside its folder, none named before it is complete, none over another."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from threading import Barrier, Event
from typing import Any
from uuid import UUID, uuid4

import pytest
from blake3 import blake3

from artifact_store import pull
from artifact_store.byte_streams import to_its_end
from artifact_store.canonical import canonical_cbor
from artifact_store.errors import ConflictError, CorruptError
from artifact_store.manifest import ContentAddress
from artifact_store.models import Package
from artifact_store.transfers.parallel import at_once
from artifact_store.transfers.pull import Destination, Landing
from tests import trees


def test_two_files_that_are_one_name_to_the_file_system_do_not_replace_each_other(tmp_path: Path) -> None:
    """As `README` and `readme` are where case does not count; here the same name comes twice."""
    folder = Destination(tmp_path)
    (tmp_path / "a").write_bytes(b"of another pull")
    with pytest.raises(ConflictError, match="one name"):
        folder.write_files([("a", b"1"), ("a", b"2")], replace=True)
    folder.close()
    assert trees.read(tmp_path) == {"a": b"1"}


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_only_one_of_two_pulls_gets_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if links:
        monkeypatch.setattr(Landing, "_there", lambda _: None)  # whoever looks before sees nothing yet
    else:

        def refused(*_: object, **__: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refused)
    one, two = Destination(tmp_path), Destination(tmp_path)
    try:
        one.write_files([("a", b"one")], replace=False)
        with pytest.raises(ConflictError, match="took the place"):
            two.write_files([("a", b"two")], replace=False)
    finally:
        one.close()
        two.close()
    assert trees.read(tmp_path) == {"a": b"one"}


async def test_work_in_threads_is_waited_for_however_often_it_is_cancelled() -> None:
    all_run, running = Barrier(5), set[Event]()

    async def work(given_up: Event) -> None:
        def block() -> None:
            running.add(given_up)
            all_run.wait(20)
            given_up.wait(20)
            running.discard(given_up)

        await to_its_end(block, given_up)

    task = asyncio.gather(at_once([Event() for _ in range(4)], 4, work))
    await asyncio.to_thread(all_run.wait, 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not running


def test_comparing_ends_when_it_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(1 << 20))
    folder, given_up = Destination(tmp_path), Event()
    try:
        digest = blake3(bytes(1 << 20)).digest()
        assert folder.holds("large", 1 << 20, digest, given_up) is True
        given_up.set()
        assert folder.holds("large", 1 << 20, digest, given_up) is False
    finally:
        folder.close()


class Lying:
    """A registry that gives one package with the manifest and bytes of the test's choice."""

    def __init__(self, files: list[dict[str, Any]], content: bytes, *, manifest_of: UUID | None = None) -> None:
        self.package_id = UUID("44444444-4444-4444-8444-444444444444")
        self.content = content
        about = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch", "metadata": {}}
        times = {"created_at": 1, "finalized_at": 2, "status": "finalized"}
        package = {"id": str(manifest_of or self.package_id), **about, **times}
        document = {"manifest_version": 1, "package": package, "files": files, "storage_receipts": []}
        self.manifest = canonical_cbor(document)
        self.address = ContentAddress.of_digest(blake3(self.manifest).digest())

    async def get_package(self, package_id: UUID) -> Package:
        return Package(package_id, "n", "p", "s", "scratch", "finalized", {}, self.address, 3, 1, 2)

    async def get_manifest_bytes(self, package_id: UUID) -> bytes:
        return self.manifest

    async def open_content(self, file_id: UUID, offset: int, length: int) -> AsyncIterator[bytes]:
        async def chunks() -> AsyncIterator[bytes]:
            yield self.content

        return chunks()


def entry(path: Any, content: bytes = b"abc", **changes: Any) -> dict[str, Any]:
    about = {"file_id": str(uuid4()), "relative_path": path, "media_type": "text/plain", "size_bytes": len(content)}
    return {**about, "blake3": blake3(content).hexdigest(), "sha256": "00" * 32, **changes}


async def pull_lies(lying: Lying, folder: Path) -> None:
    registry: Any = lying
    await pull(registry, lying.package_id, folder)


@pytest.mark.parametrize(
    "path", ["../out.txt", "/etc/cron.d/x", "a/../../x", "a//b", "", ".", "a/./b", "x\x00y", "a\nb", 7, None]
)
async def test_a_path_that_would_lead_out_is_refused(tmp_path: Path, path: Any) -> None:
    with pytest.raises(CorruptError):
        await pull_lies(Lying([entry("fine"), entry(path)], b"abc"), tmp_path / "out")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize(
    "changes", [{"size_bytes": -1}, {"size_bytes": "3"}, {"blake3": "00"}, {"blake3": "no hex"}, {"blake3": None}]
)
async def test_an_entry_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptError):
        await pull_lies(Lying([entry("a", **changes)], b"abc"), tmp_path / "out")


async def test_a_path_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="twice"):
        await pull_lies(Lying([entry("a"), entry("a")], b"abc"), tmp_path / "out")


async def test_a_file_that_would_have_to_be_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConflictError, match="'a' and 'a/b/c'"):
        await pull_lies(Lying([entry("a"), entry("a/b/c")], b"abc"), tmp_path / "out")


@pytest.mark.parametrize("content", [b"abd", b"ab", b"abcd", b"", b"x" * 5_000_000])
async def test_bytes_that_are_not_the_manifests_get_no_name(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(CorruptError):
        await pull_lies(Lying([entry("a/b")], content), tmp_path / "out")
    assert trees.read(tmp_path / "out") == {}


async def test_a_manifest_of_another_digest_or_package_is_refused(tmp_path: Path) -> None:
    lying = Lying([entry("a")], b"abc")
    lying.manifest += b"\x00"
    with pytest.raises(CorruptError, match="does not have the address blake3:"):
        await pull_lies(lying, tmp_path / "out")
    with pytest.raises(CorruptError, match="is the one of package"):
        await pull_lies(Lying([entry("a")], b"abc", manifest_of=uuid4()), tmp_path / "out")
