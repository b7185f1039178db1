"""Excludes following events from the generated requests, because it never ends."""

from __future__ import annotations

from typing import Any

import schemathesis


@schemathesis.hook
def filter_case(_context: schemathesis.HookContext, case: schemathesis.Case[Any]) -> bool:
    """Whether to send this request."""
    return (case.query or {}).get("follow") not in (True, "true")


@schemathesis.serializer("application/offset+octet-stream")
def as_bytes(_context: schemathesis.SerializationContext, value: Any) -> bytes:
    """A piece of an upload: any bytes will do."""
    return value if isinstance(value, bytes) else str(value).encode()
