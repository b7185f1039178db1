"""A tree comes back as it was; a failed transfer can be run again; a lying manifest writes nothing out of place."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from artifact_store import Pushed, pull, push
from artifact_store.byte_streams import from_any
from artifact_store.errors import (
    AnswerExpiredError,
    ConflictError,
    CorruptError,
    IllegalPackageStateError,
    InvalidPathError,
    PackageNotFoundError,
    UnavailableError,
)
from artifact_store.manifest import ContentAddress
from artifact_store.models import Declared, File, Page
from artifact_store.registry import Registry
from artifact_store.transfers.push import FEWEST_FILES, Batch, Held, PushState, hold
from artifact_store.transfers.tree import walk
from services.config import Settings
from services.core import decide
from services.registry import open_registry
from tests import trees

TREE = {
    "a b.txt": b"with a space",
    "läs/mig ✓.txt": "håll i hatten".encode(),
    "%41": b"no letter A",
    "#hash?query&x=1+2;": b"odd",
    "empty": b"",
    "deep/" + "/".join("abcdefgh") + "/leaf.json": b"{}",
    "large.bin": bytes(range(251)) * 20_000,
    "exactly one chunk": bytes(1 << 20),
}


@pytest.fixture
async def registry(embedded_settings: Settings) -> AsyncIterator[Registry]:
    async with open_registry(embedded_settings) as opened:
        yield opened


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write(tmp_path / "tree", TREE)
    return tmp_path / "tree"


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


async def pushed(registry: Registry, tree: Path, **more: Any) -> Pushed:
    return await push(registry, tree, name="n", producer="p", subject="s", retention_class="scratch", **more)


async def test_a_tree_comes_back_as_it_went_in(registry: Registry, tree: Path, tmp_path: Path) -> None:
    done = await pushed(registry, tree, metadata={"a": 1})
    assert (done.files, done.size_bytes) == (len(TREE), sum(map(len, TREE.values())))
    assert done.sequence == len(TREE) + 2
    assert done.manifest_digest is not None
    by_id = await pull(registry, done.package_id, tmp_path / "by id")
    by_address = await pull(registry, done.manifest_digest, tmp_path / "by address")
    assert trees.read(tmp_path / "by id") == trees.read(tmp_path / "by address") == TREE
    assert by_id == by_address
    assert by_id.size_bytes == done.size_bytes
    file = await registry.get_file_at(done.package_id, "a b.txt")
    assert (file.media_type, file.sha256) == ("text/plain", hashlib.sha256(TREE["a b.txt"]).digest())


async def test_a_tree_that_the_caller_has_walked_is_not_walked_again(
    registry: Registry, tree: Path, tmp_path: Path
) -> None:
    files = walk(tree)
    (tree / "later").write_bytes(b"not seen by the walk")
    done = await pushed(registry, tree, files=files)
    await pull(registry, done.package_id, tmp_path / "back")
    assert trees.read(tmp_path / "back") == TREE


async def test_an_empty_folder_is_an_empty_package(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    done = await pushed(registry, tmp_path / "nothing")
    assert (done.files, done.sequence) == (0, 2)
    await pull(registry, done.package_id, tmp_path / "out")
    assert trees.read(tmp_path / "out") == {}


async def test_a_bad_name_is_refused_before_a_package_is_created(registry: Registry, tree: Path) -> None:
    (tree / "bad\tname").write_bytes(b"")
    with pytest.raises(InvalidPathError):
        await pushed(registry, tree)
    assert [event async for event in registry.read_events()] == []


class Failing:
    """A registry of which some ingests fail, and which counts what was sent."""

    def __init__(self, registry: Registry, failing: str) -> None:
        self._registry = registry
        self.failing = failing
        self.sent: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._registry, name)

    async def ingest(self, package_id: UUID, relative_path: str, *arguments: Any, **more: Any) -> Any:
        if relative_path == self.failing:
            raise UnavailableError("out of reach")
        self.sent.append(relative_path)
        return await self._registry.ingest(package_id, relative_path, *arguments, **more)


async def interrupted(registry: Registry, tree: Path) -> tuple[PushState, str]:
    """The state of a push that failed on its large file, with which it is resumed; a file that it has sent."""
    failing: Any = Failing(registry, "large.bin")
    state = PushState(uuid4(), resumed=False, kept=True)
    with pytest.raises(UnavailableError):
        await pushed(failing, tree, state=state, concurrency=1)
    return PushState(state.push_id, resumed=True, kept=True), failing.sent[0]


async def test_an_interrupted_push_sends_only_what_is_missing(registry: Registry, tree: Path, tmp_path: Path) -> None:
    failing: Any = Failing(registry, "large.bin")
    state = PushState(uuid4(), resumed=False, kept=True)
    with pytest.raises(UnavailableError):
        await pushed(failing, tree, state=state, concurrency=1)
    assert state.began
    assert not state.done
    before = set(failing.sent)
    assert 0 < len(before) < len(TREE)
    failing.sent, failing.failing = [], ""
    again = PushState(state.push_id, resumed=True, kept=True)
    done = await pushed(failing, tree, state=again)
    assert again.done
    assert set(failing.sent) == set(TREE) - before
    assert done.sequence == len(TREE) + 2
    await pull(registry, done.package_id, tmp_path / "out")
    assert trees.read(tmp_path / "out") == TREE


async def test_a_push_whose_last_answer_was_lost_gives_the_first_answer(registry: Registry, tree: Path) -> None:
    push_id = uuid4()
    first = await pushed(registry, tree, state=PushState(push_id, resumed=False, kept=True))
    second = await pushed(registry, tree, state=PushState(push_id, resumed=True, kept=True))
    assert first == second


@pytest.mark.parametrize("change", ["changed", "gone"])
async def test_a_push_is_not_resumed_with_another_tree(registry: Registry, tree: Path, change: str) -> None:
    state, sent = await interrupted(registry, tree)
    path = tree / sent
    path.unlink()
    if change == "changed":
        path.write_bytes(b"something else")
    with pytest.raises(ConflictError, match="interrupted push has sent"):
        await pushed(registry, tree, state=state)


class Lagging:
    """A registry whose view shows no file until something was asked for that has it brought to the log's end."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.behind = True
        self.away = False
        self.before_finalizing: Callable[[UUID], Awaitable[Any]] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._registry, name)

    async def get_manifest_bytes(self, package_id: UUID) -> bytes:
        if self.away:
            raise UnavailableError("no database")
        self.behind = False
        return await self._registry.get_manifest_bytes(package_id)

    async def list_files(self, package_id: UUID, **more: Any) -> Page[File]:
        return Page((), None) if self.behind else await self._registry.list_files(package_id, **more)

    async def finalize(self, package_id: UUID, *arguments: Any, **more: Any) -> Any:
        if self.before_finalizing is not None:
            await self.before_finalizing(package_id)
        return await self._registry.finalize(package_id, *arguments, **more)


async def test_what_was_sent_and_is_gone_is_noticed_though_the_view_lags(registry: Registry, tree: Path) -> None:
    state, sent = await interrupted(registry, tree)
    (tree / sent).unlink()
    lagging: Any = Lagging(registry)
    with pytest.raises(ConflictError, match="no longer exists"):
        await pushed(lagging, tree, state=state)


async def test_a_push_goes_on_only_where_it_is_known_what_was_sent(registry: Registry, tree: Path) -> None:
    state, _ = await interrupted(registry, tree)
    events = [event async for event in registry.read_events()]
    lagging: Any = Lagging(registry)
    lagging.away = True
    with pytest.raises(UnavailableError, match=r"cannot be listed now: no database"):
        await pushed(lagging, tree, state=state)
    assert [event async for event in registry.read_events()] == events
    lagging.away = False
    assert (await pushed(lagging, tree, state=state)).files == len(TREE)


async def test_what_an_earlier_run_sent_and_arrives_late_is_told(registry: Registry, tree: Path) -> None:
    state, _ = await interrupted(registry, tree)
    lagging: Any = Lagging(registry)

    async def arrives(package_id: UUID) -> None:
        await registry.ingest(package_id, "late", "text/plain", from_any(b"late"), "ada", declared=Declared())

    lagging.before_finalizing = arrives
    with pytest.raises(CorruptError, match=rf"{len(TREE) + 1} files where the tree has {len(TREE)}"):
        await pushed(lagging, tree, state=state)


async def test_a_pull_tells_what_programs_read_unasked(registry: Registry, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for path in (".env", "a/.GIT/config", "a/.GIT/hooks/x", "sub/.envrc", "Makefile", ".environment", "git/config"):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(b"x")
    package = (await pushed(registry, source)).package_id
    pulled = await pull(registry, package, tmp_path / "target")
    assert pulled.read_by_programs == (".env", "a/.GIT", "sub/.envrc")
    assert (tmp_path / "target/.env").read_bytes() == b"x"


async def test_an_open_package_cannot_be_pulled(registry: Registry, tree: Path, tmp_path: Path) -> None:
    done = await pushed(registry, tree, finalize=False)
    assert done.manifest_digest is None
    assert done.sequence == len(TREE) + 1
    with pytest.raises(IllegalPackageStateError, match="open"):
        await pull(registry, done.package_id, tmp_path / "out")
    with pytest.raises(PackageNotFoundError):
        await pull(registry, ContentAddress.of_digest(bytes(32)), tmp_path / "out")


async def test_what_is_there_and_equal_is_kept(registry: Registry, tree: Path, tmp_path: Path) -> None:
    done = await pushed(registry, tree)
    out = tmp_path / "out"
    await pull(registry, done.package_id, out)
    (out / "empty").unlink()
    (out / "mine").write_bytes(b"not of the package")
    stamp = (out / "large.bin").stat().st_mtime_ns
    again = await pull(registry, done.package_id, out)
    assert again.kept == len(TREE) - 1
    assert (out / "large.bin").stat().st_mtime_ns == stamp
    assert trees.read(out) == {**TREE, "mine": b"not of the package"}


async def test_what_is_there_and_different_is_replaced_only_by_force(
    registry: Registry, tree: Path, tmp_path: Path
) -> None:
    done = await pushed(registry, tree)
    out = tmp_path / "out"
    write(out, {"a b.txt": b"with a spice"})
    with pytest.raises(ConflictError, match=r"nothing was written.*a b\.txt"):
        await pull(registry, done.package_id, out)
    assert trees.read(out) == {"a b.txt": b"with a spice"}
    await pull(registry, done.package_id, out, force=True)
    assert trees.read(out) == TREE


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("link", ["a b.txt", "deep", "läs"])
async def test_nothing_is_written_through_a_link(
    registry: Registry, tree: Path, tmp_path: Path, link: str, force: bool
) -> None:
    done = await pushed(registry, tree)
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / link).symlink_to(elsewhere)
    with pytest.raises(ConflictError):
        await pull(registry, done.package_id, out, force=force)
    assert trees.read(elsewhere) == {}


@pytest.mark.parametrize("small", [0, FEWEST_FILES])
async def test_a_package_with_a_file_in_the_place_of_a_folder_is_pulled_with_that_file_renamed(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    files = {f"small/{number}": b"%d" % number for number in range(small)}
    files |= {"a": b"1", "a/b": b"2", "a/b/c": b"3", "a/b.file": b"4", "a-b": b"5", "z/a": b"6"}
    package_id = await registry.create_package("n", "p", "s", "scratch")
    with monkeypatch.context() as before_the_rule:
        before_the_rule.setattr(decide, "_check_tree", lambda *_: None)
        for path, content in files.items():
            await registry.ingest_file(package_id, path, "text/plain", content)
    await registry.finalize_package(package_id)
    out = tmp_path / "out"
    with pytest.raises(ConflictError, match=r"nothing was written.*'a' and 'a/b'.*--rename.*'a\.file'"):
        await pull(registry, package_id, out)
    assert not out.exists()
    done = await pull(registry, package_id, out, rename=True)
    assert done.renamed == {"a": "a.file", "a/b": "a/b.file-2"}
    expected = {"a.file": b"1", "a/b.file-2": b"2", **{path: files[path] for path in files if path not in done.renamed}}
    assert trees.read(out) == expected
    again = await pull(registry, package_id, out, rename=True)
    assert (again.kept, again.renamed) == (len(files), done.renamed)


def many(folder: Path, count: int = 1_200, seed: int = 0) -> dict[str, bytes]:
    """A tree of so many small files, some of them equal, empty or deep, and two large ones."""
    files = {f"{n % 7}/{n:05}.txt": b"%d" % (n % 900 + seed) * (n % 50) for n in range(count)}
    files |= {"large": bytes(range(256)) * 4_000, "zz/" + "d/" * 60 + "leaf": b"deep"}
    write(folder, files)
    return files


class Forgetful:
    """A registry that answers no command of a package any more, as a writer does a day after its finalization."""

    def __init__(self, registry: Registry, package_id: UUID) -> None:
        self._registry = registry
        self._package_id = package_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self._registry, name)

    async def create(self, *_: Any, **__: Any) -> Any:
        raise AnswerExpiredError("long ago", facts={"package_id": str(self._package_id)})

    finalize = ingest = ingest_named = ingest_files = create


async def test_a_push_that_was_interrupted_long_ago_finds_the_package_that_it_had_finalized(
    registry: Registry, tree: Path
) -> None:
    began = uuid4()
    first = await pushed(registry, tree, state=PushState(began, resumed=False, kept=False))
    late: Any = Forgetful(registry, first.package_id)
    assert await pushed(late, tree, state=PushState(began, resumed=True, kept=False)) == first
    write(tree, {"new": b"was not there then"})
    with pytest.raises(AnswerExpiredError):
        await pushed(late, tree, state=PushState(began, resumed=True, kept=False))
    with pytest.raises(AnswerExpiredError):
        await pushed(late, tree)


class Counting:
    """A registry that counts what is sent and what is named, and fails once after so many bundles."""

    def __init__(self, registry: Registry, failing_after: int = 1_000_000) -> None:
        self._registry = registry
        self.bundles = 0
        self.alone: list[str] = []
        self.named = 0
        self._left = failing_after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._registry, name)

    async def ingest_files(self, *arguments: Any, **more: Any) -> Any:
        if not self._left:
            raise UnavailableError("out of reach")
        self._left -= 1
        self.bundles += 1
        return await self._registry.ingest_files(*arguments, **more)

    async def ingest(self, package_id: UUID, relative_path: str, *arguments: Any, **more: Any) -> Any:
        self.alone.append(relative_path)
        return await self._registry.ingest(package_id, relative_path, *arguments, **more)

    async def ingest_named(self, package_id: UUID, files: Any, *arguments: Any, **more: Any) -> Any:
        self.named += len(files)
        return await self._registry.ingest_named(package_id, files, *arguments, **more)


async def test_small_files_go_in_bundles_and_come_back(registry: Registry, tmp_path: Path) -> None:
    files = many(tmp_path / "tree")
    counting: Any = Counting(registry)
    done = await pushed(counting, tmp_path / "tree")
    assert (counting.bundles, counting.alone, counting.named) == (2, ["large"], 0)
    assert (done.files, done.sequence) == (len(files), len(files) + 2)
    await pull(registry, done.package_id, tmp_path / "out")
    assert trees.read(tmp_path / "out") == files


@pytest.mark.slow
async def test_the_first_batch_is_read_alone_so_that_it_can_go_at_once(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = many(tmp_path / "tree", 2_500)
    calls, another, beside_first = count(), threading.Event(), []

    def watched(batch: Batch) -> Held:
        if next(calls):
            another.set()
        else:
            beside_first.append(another.wait(0.1))
        return hold(batch)

    monkeypatch.setattr("artifact_store.transfers.push.hold", watched)
    assert (await pushed(registry, tmp_path / "tree")).files == len(files)
    assert (beside_first, another.is_set()) == ([False], True)


async def test_the_same_tree_again_moves_no_bytes(registry: Registry, tmp_path: Path) -> None:
    files = many(tmp_path / "tree")
    await pushed(registry, tmp_path / "tree")
    counting: Any = Counting(registry)
    done = await pushed(counting, tmp_path / "tree")
    assert (counting.bundles, counting.alone, counting.named) == (0, [], len(files))
    await pull(registry, done.package_id, tmp_path / "out")
    assert trees.read(tmp_path / "out") == files


@pytest.mark.slow
async def test_a_push_of_bundles_goes_on_where_it_was(registry: Registry, tmp_path: Path) -> None:
    files = many(tmp_path / "tree")
    state = PushState(uuid4(), resumed=False, kept=True)
    failing: Any = Counting(registry, failing_after=1)
    with pytest.raises(UnavailableError):
        await pushed(failing, tmp_path / "tree", state=state, concurrency=1)
    again: Any = Counting(registry)
    resumed = PushState(state.push_id, resumed=True, kept=True)
    done = await pushed(again, tmp_path / "tree", state=resumed)
    assert again.bundles == 1
    await pull(registry, done.package_id, tmp_path / "out")
    assert trees.read(tmp_path / "out") == files


async def test_a_changed_tree_is_not_taken_for_the_interrupted_one(registry: Registry, tmp_path: Path) -> None:
    many(tmp_path / "tree")
    state = PushState(uuid4(), resumed=False, kept=True)
    failing: Any = Counting(registry, failing_after=1)
    with pytest.raises(UnavailableError):
        await pushed(failing, tmp_path / "tree", state=state, concurrency=1)
    many(tmp_path / "tree", seed=5)
    with pytest.raises(ConflictError):
        await pushed(registry, tmp_path / "tree", state=PushState(state.push_id, resumed=True, kept=True))


async def test_a_damaged_pack_is_not_named_again(
    registry: Registry, tmp_path: Path, embedded_settings: Settings
) -> None:
    many(tmp_path / "tree", count=20)
    await pushed(registry, tmp_path / "tree")
    for path in (tmp_path / "blobs").rglob("*"):
        if path.is_file():
            path.write_bytes(b"!" + path.read_bytes()[1:])
    counting: Any = Counting(registry)
    await pushed(counting, tmp_path / "tree")
    assert (counting.bundles, counting.alone) == (1, ["large"])
