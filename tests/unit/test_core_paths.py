"""Relative paths: what is taken, and which rule each other path breaks."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.paths import MAX_PATH_BYTES, check_path, check_paths
from services.errors import InvalidPathError


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
