"""The guides' links work, so that nobody follows them to a file or name that has moved."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.documents import every_block

ROOT = Path(__file__).parents[3]
GUIDES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))
BY_FILE = ("CONTRIBUTING.md", "docs/life-of-an-event.md")
"""The guides that name files in full, or from `services/` on."""


def text_of(guide: str) -> str:
    return (ROOT / guide).read_text(encoding="utf-8")


@pytest.mark.parametrize("guide", GUIDES)
def test_links_lead_to_files_that_are_there(guide: str) -> None:
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text_of(guide))
    assert [link for link in links if not ((ROOT / guide).parent / link).exists()] == []


@pytest.mark.parametrize("guide", BY_FILE)
def test_files_that_are_named_are_there(guide: str) -> None:
    named = re.findall(r"`(\w[\w/.-]*/(?:[\w.-]+\.\w+)?)`", text_of(guide))
    assert len(named) > 20
    assert [name for name in named if not any((root / name).exists() for root in (ROOT, ROOT / "services"))] == []


def test_every_number_of_a_format_is_where_the_table_says() -> None:
    rows = re.findall(r"^\| [^|]* \| ([^|]*) in `([\w/.]+\.py)` \| ", text_of("CONTRIBUTING.md"), re.MULTILINE)
    numbers = [(name, file) for names, file in rows for name in re.findall(r"`([A-Z_]+)`", names)]
    assert len(numbers) >= 8
    assert [(name, file) for name, file in numbers if not re.search(rf"\b{name}\b", text_of(file))] == []


_GUIDE = "docs/operating.md"
_RUN_BY = ("tests/integration/test_operating_guide.py", "tests/chart/test_operating.py", "tests/chart/test_cluster.py")
_MOST_EXEMPT = 10


def test_every_block_of_the_operating_guide_is_run_or_says_why_not() -> None:
    found = [re.fullmatch(r"<!-- (run|not run): (.+) -->", line) for line, _ in every_block(_GUIDE)]
    assert len(found) > 10
    assert None not in found
    exempt = [mark[2] for mark in found if mark is not None and mark[1] == "not run"]
    named = {mark[2] for mark in found if mark is not None and mark[1] == "run"}
    assert len(exempt) <= _MOST_EXEMPT, exempt
    assert len(named) == len(found) - len(exempt), "two blocks have one name"
    tests = "".join(text_of(file) for file in _RUN_BY)
    assert {name for name in named if f'"{name}"' not in tests} == set()
