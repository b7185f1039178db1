"""Standard input, output and error of a command that was started without one of them (`<&-`, `>&-`, `2>&-`)."""

from __future__ import annotations

import os
import sys

_INPUT, _OUTPUT, _ERROR = range(3)


def open_missing_streams() -> None:
    """Open /dev/null in place of each standard stream that is closed.

    Otherwise the next file or socket gets its number, and what is printed goes there; libuv aborts. What is written is
    gone then; reading fails, since an end at once would be recorded as a file without bytes.
    """
    for number in (_INPUT, _OUTPUT, _ERROR):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_WRONLY)  # gets the least number that is free, which is this one
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = os.fdopen(_INPUT, closefd=False, encoding="utf-8")
    if sys.stdout is None:
        sys.stdout = os.fdopen(_OUTPUT, "w", closefd=False, encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = os.fdopen(_ERROR, "w", closefd=False, encoding="utf-8", errors="backslashreplace")
