"""Relative paths: which are accepted, and which rule each other path breaks."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifact_store.errors import InvalidPathError
from artifact_store.rules import MAX_PAIRS, MAX_PATH_BYTES, add_folders, check_path, check_paths, unportable


@pytest.mark.parametrize(
    "path", ["a", "a/b/c.txt", "...", ".hidden", "a b", "é/ü", "a\\b", "%2e%2e/x", "x" * 1024, "日本/語"]
)
def test_ordinary_paths_are_taken(path: str) -> None:
    check_path(path)


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("", "empty"),
        ("/etc/passwd", "begin with"),
        ("a//b", "segment"),
        ("a/", "segment"),
        (".", "segment"),
        ("a/./b", "segment"),
        ("..", "segment"),
        ("a/../b", "segment"),
        ("a\x00b", "control"),
        ("a\nb", "control"),
        ("a\x7f", "control"),
        ("a\x9f", "control"),
        ("\ud800", "surrogate"),
        ("e\u0301", "NFC"),
        ("x" * 1025, "1,024"),
        ("é" * 513, "1,024"),
    ],
)
def test_every_other_path_is_refused_by_the_rule_it_breaks(path: str, rule: str) -> None:
    with pytest.raises(InvalidPathError, match=rule):
        check_path(path)
    with pytest.raises(InvalidPathError, match=rule):
        check_paths(["a", path, "b/c"])


@given(st.lists(st.text(st.sampled_from("a./\n é\u0301"), max_size=4)))
def test_many_paths_are_taken_if_each_of_them_is(paths: list[str]) -> None:
    try:
        for path in paths:
            check_path(path)
    except InvalidPathError as error:
        with pytest.raises(InvalidPathError, match=error.detail):
            check_paths(paths)
    else:
        check_paths(paths)


@given(st.text())
def test_a_path_that_is_taken_stays_inside_and_round_trips(path: str) -> None:
    try:
        check_path(path)
    except InvalidPathError:
        return
    assert len(path.encode()) <= MAX_PATH_BYTES
    assert unicodedata.normalize("NFC", path) == path
    assert not {"", ".", ".."} & set(path.split("/"))


@pytest.mark.parametrize(
    ("files", "clashing"),
    [
        (["a", "b/a", "c/b"], []),
        (["README", "readme"], [("README", "readme")]),
        (["a", "A", "b", "B"], [("a", "A"), ("b", "B")]),
        (["src/x", "Src/y"], []),  # one folder on such a system, and both files in it
        (["src/x", "Src/X"], [("src/x", "Src/X")]),
        (["LIB", "lib/a", "lib/b"], [("LIB", "lib")]),
        (["stra\u00dfe", "STRASSE"], [("stra\u00dfe", "STRASSE")]),
        (["\ufb01le", "file"], [("\ufb01le", "file")]),
        (["\uff21", "a"], [("\uff21", "a")]),
        (["\u0130", "i\u0307x"], []),
        (["\uac00", "\u3131"], []),
    ],
)
def test_paths_that_differ_only_by_case_or_unicode_form_are_found(
    files: list[str], clashing: list[tuple[str, str]]
) -> None:
    folders: set[str] = set()
    add_folders(folders, files)
    found = unportable(files, folders)
    assert (found.number, list(found.pairs)) == (len(clashing), clashing)


def test_many_clashing_paths_are_counted_and_the_first_are_named() -> None:
    files = [f"{number}/{name}" for number in range(30) for name in ("a", "A", "\u00e4", "\u00c4")]
    found = unportable(files, [])
    assert found.number == 60
    assert found.pairs[:3] == (("0/a", "0/A"), ("0/\u00e4", "0/\u00c4"), ("1/a", "1/A"))
    assert len(found.pairs) == MAX_PAIRS
