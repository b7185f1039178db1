"""Trace context: the `traceparent` of the request at hand, from the HTTP header to the headers of its records."""

from __future__ import annotations

import re
from contextvars import ContextVar

TRACEPARENT: ContextVar[str | None] = ContextVar("traceparent", default=None)
"""That of the request that this task works for; None when it came without one."""

_FORM = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def traceparent(header: str | None) -> str | None:
    """The header's value when it is one (W3C Trace Context, version 00), else None: a broken one is ignored."""
    return header if header is not None and _FORM.fullmatch(header) else None
