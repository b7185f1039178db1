"""Access: patterns, grants and the scope of a right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.access import EVERYWHERE, Grant, Packages, Principal, Right, Scope, all_rights, matches


@pytest.mark.parametrize(
    ("pattern", "value", "expected"),
    [
        ("*", "", True),
        ("*", "any\ntext", True),
        ("team-*", "team-a", True),
        ("team-*", "team-", True),
        ("team-*", "a-team-a", False),
        ("team-*", "TEAM-a", False),
        ("*/main", "org/repo/main", True),
        ("a*c", "abc\n", False),
        ("a.c", "abc", False),
        ("[ab]", "a", False),
        ("", "", True),
        ("", "a", False),
    ],
)
def test_a_star_stands_for_any_text_and_all_else_for_itself(pattern: str, value: str, expected: bool) -> None:
    assert matches(pattern, value) is expected


def matches_simply(pattern: str, value: str) -> bool:
    """The same, as slow as it is plain."""
    if not pattern or not value:
        return set(pattern) <= {"*"} and not value
    if pattern[0] == "*":
        return matches_simply(pattern[1:], value) or matches_simply(pattern, value[1:])
    return pattern[0] == value[0] and matches_simply(pattern[1:], value[1:])


@given(st.text("ab*", max_size=7), st.text("ab", max_size=7))
def test_many_stars_mean_what_one_does(pattern: str, value: str) -> None:
    assert matches(pattern, value) is matches_simply(pattern, value)


def test_an_unfavourable_text_takes_no_time() -> None:
    assert not matches("*a" * 8 + "*c", "a" * 100_000)


def test_a_grant_needs_both_its_producer_and_its_subject() -> None:
    packages = Packages(("team-a", "team-b"), ("images-*",))
    assert packages.include("team-b", "images-1")
    assert not packages.include("team-c", "images-1")
    assert not packages.include("team-a", "reports")


def test_a_scope_does_not_join_the_producers_of_one_grant_with_the_subjects_of_another() -> None:
    principal = Principal(
        "ci:job",
        (
            Grant(frozenset({Right.READ}), Packages(("a",), ("x",))),
            Grant(frozenset({Right.READ, Right.WRITE}), Packages(("b",), ("y",))),
        ),
    )
    read = principal.scope(Right.READ)
    assert read.includes("a", "x")
    assert read.includes("b", "y")
    assert not read.includes("a", "y")
    assert not principal.scope(Right.WRITE).includes("a", "x")
    assert not principal.scope(Right.OPERATE)
    assert not principal.may(Right.OPERATE)
    assert principal.may(Right.WRITE)


def test_only_a_grant_on_all_producers_and_all_subjects_is_everywhere() -> None:
    assert EVERYWHERE.everywhere
    assert all_rights("local:me").scope(Right.OPERATE).everywhere
    assert not Scope((Packages(("*",), ("x",)), Packages(("a",), ("*",)))).everywhere
    assert not Scope(()).everywhere
