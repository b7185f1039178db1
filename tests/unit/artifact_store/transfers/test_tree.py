"""What a push accepts from a folder, what it refuses before anything is created, and what its state keeps."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from artifact_store.errors import InvalidPathError, InvalidRequestError
from artifact_store.media_types import guess_media_type
from artifact_store.transfers.push import default_folder, push_state
from artifact_store.transfers.tree import walk


def test_files_come_by_the_bytes_of_their_paths(tmp_path: Path) -> None:
    for name in ("b", "a/z", "a.b", "ü", "Z", "a b", "%41", "#"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
    (tmp_path / "empty folder").mkdir()
    found = walk(tmp_path)
    assert [file.relative_path for file in found] == ["#", "%41", "Z", "a b", "a.b", "a/z", "b", "ü"]
    assert [file.stamp.size_bytes for file in found] == [1, 3, 1, 3, 3, 3, 1, 2]


def test_a_single_file_is_called_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(b"1")
    (tmp_path / "link.csv").symlink_to("one.txt")
    assert [file.relative_path for file in walk(tmp_path / "one.txt")] == ["one.txt"]
    assert [file.relative_path for file in walk(tmp_path / "link.csv")] == ["link.csv"]


def test_a_link_to_a_file_in_the_tree_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "target").write_bytes(b"content")
    (tmp_path / "link").symlink_to("sub/target")
    assert {file.relative_path: Path(file.path).read_bytes() for file in walk(tmp_path)} == {
        "link": b"content",
        "sub/target": b"content",
    }


def make_bad(tree: Path, kind: str) -> None:
    match kind:
        case "a link that leaves the tree":
            (tree.parent / "outside").write_bytes(b"secret")
            (tree / "bad").symlink_to("../outside")
        case "a link to a folder":
            (tree / "folder").mkdir()
            (tree / "bad").symlink_to("folder")
        case "a link to nothing":
            (tree / "bad").symlink_to("nowhere")
        case "a link to itself":
            (tree / "bad").symlink_to("bad")
        case "a pipe":
            os.mkfifo(tree / "bad")
        case "a socket":
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(os.path.relpath(tree / "bad"))  # the full path may be longer than a socket's can be


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("a link that leaves the tree", "leaves the tree"),
        ("a link to a folder", "link to a folder"),
        ("a link to nothing", "link to nothing"),
        ("a link to itself", "link to nothing"),
        ("a pipe", "not a regular file"),
        ("a socket", "not a regular file"),
    ],
)
def test_what_is_no_file_of_the_tree_is_refused_by_name(tmp_path: Path, kind: str, words: str) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "good").write_bytes(b"x")
    make_bad(tree, kind)
    with pytest.raises(InvalidRequestError, match=rf"(?s)nothing was created.*/bad: .*{words}"):
        walk(tree)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"caf\xe9", r"caf\\xe9"),
        ("cafe\u0301".encode(), "cafe"),
        (b"line\nbreak", r"line\\nbreak"),
        (b"\x1b[31m", r"\\x1b"),
        (b"\x7f", r"\\x7f"),
    ],
)
def test_a_name_that_is_no_relative_path_is_refused_and_shown_without_harm(
    tmp_path: Path, name: bytes, shown: str
) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"x")
    with pytest.raises(InvalidPathError, match=shown) as caught:
        walk(tmp_path)
    assert str(caught.value).replace("\n", "").isprintable()


def test_many_bad_names_are_not_all_listed(tmp_path: Path) -> None:
    for number in range(25):
        (tmp_path / f"bad\t{number}").write_bytes(b"")
    with pytest.raises(InvalidPathError, match="and 15 more"):
        walk(tmp_path)


def test_nothing_to_push_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="nothing to push"):
        walk(tmp_path / "not there")
    with pytest.raises(InvalidRequestError, match="cannot be pushed: File name too long"):
        walk(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("name", "media_type"),
    [
        ("a/b.csv", "text/csv"),
        ("x.JSON", "application/json"),
        ("logs.tar.gz", "application/gzip"),
        ("noextension", "application/octet-stream"),
        (".html", "application/octet-stream"),
        ("a.unheard-of", "application/octet-stream"),
    ],
)
def test_media_types_are_guessed_from_names(name: str, media_type: str) -> None:
    assert guess_media_type(name) == media_type


ABOUT = {"name": "n", "path": "/tree"}


def test_an_interrupted_push_is_found_again_and_a_finished_one_is_not(tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt), push_state(tmp_path, ABOUT) as first:
        first.began = True
        raise KeyboardInterrupt
    with push_state(tmp_path, ABOUT) as second:
        assert second.resumed
        assert second.push_id == first.push_id
        assert second.command_id("create") == first.command_id("create")
        second.done = True
    with push_state(tmp_path, ABOUT) as third:
        assert not third.resumed
        assert third.push_id != first.push_id
    assert list(tmp_path.iterdir()) == []


def test_another_push_and_a_fresh_one_begin_anew(tmp_path: Path) -> None:
    with push_state(tmp_path, ABOUT) as first:
        first.began = True
    with push_state(tmp_path, {**ABOUT, "name": "m"}) as other:
        assert not other.resumed
    with push_state(tmp_path, ABOUT, fresh=True) as fresh:
        assert not fresh.resumed
        assert fresh.push_id != first.push_id


def test_equal_pushes_at_one_time_are_two_pushes(tmp_path: Path) -> None:
    with push_state(tmp_path, ABOUT) as first, push_state(tmp_path, ABOUT) as second:
        assert first.push_id != second.push_id
        assert not second.resumed


def test_a_state_that_was_cut_off_is_a_new_push(tmp_path: Path) -> None:
    with push_state(tmp_path, ABOUT) as first:
        first.began = True
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:9])
    with push_state(tmp_path, ABOUT) as second:
        assert not second.resumed


def test_a_full_disk_spoils_no_push_that_was_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with push_state(tmp_path, {"tree": "a"}) as first:
        first.began = True

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with push_state(tmp_path, {"tree": "a"}) as again:
            assert (again.resumed, again.push_id) == (True, first.push_id)
            again.began = True
        with push_state(tmp_path, {"tree": "b"}) as other:
            assert not other.kept
    with push_state(tmp_path, {"tree": "a"}) as once_more:
        assert (once_more.resumed, once_more.push_id) == (True, first.push_id)


def test_without_a_place_to_keep_it_a_push_goes_on_but_cannot_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with push_state(tmp_path / "file" / "below", ABOUT) as state:
        assert not state.kept
    deep: dict[str, object] = {}
    for _ in range(2_000):  # more than Python's JSON writes; what the registry says of it is told
        deep = {"a": deep}
    with push_state(tmp_path, deep) as state:
        assert not state.kept


def test_a_state_file_that_has_gone_spoils_no_push(tmp_path: Path) -> None:
    with push_state(tmp_path, ABOUT) as state:
        (path,) = tmp_path.iterdir()
        path.unlink()
        state.began = state.done = True


def test_a_state_file_that_cannot_be_removed_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refused)
        with push_state(tmp_path, ABOUT) as first:
            first.began = first.done = True
    with push_state(tmp_path, ABOUT) as second:
        assert not second.resumed


def test_without_a_home_no_state_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert default_folder() is None
