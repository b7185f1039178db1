"""The documents' examples that tests run: each has `<!-- run: NAME -->` on the line before it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def every_block(page: str) -> list[tuple[str, str]]:
    """All fenced blocks of a page, each with the line before it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^([^\n]*)\n```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def blocks(page: str) -> dict[str, str]:
    """The examples of a page, by name."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return dict(re.findall(r"<!-- run: (\w+) -->\n```\w+\n(.*?)```", text, re.DOTALL))
