"""Statements of a state file that take the values of many rows at once.

Python's `sqlite3` gives the interpreter away several times a statement, and in a busy process it comes back only when
other threads have had it: a checkpoint of one statement a row took ten times as long as its work.
"""

from __future__ import annotations

from collections.abc import Callable
from sqlite3 import Connection
from typing import Any

ROWS = 64
"""In one statement; with four columns well below the 999 values that every SQLite takes."""

BYTES = 4 << 20
"""About how many bytes of values wait for their statement."""


class Many:
    """Gathers rows and carries out a statement for many; the last ones with `flush`. Blocks on the file."""

    def __init__(self, connection: Connection, statement: Callable[[str], str], columns: int) -> None:
        """`statement` is given the places of the rows: `(?, ?), (?, ?)` for two of two columns, `?, ?` for one."""
        self._connection = connection
        self._statement = statement
        self._row = f"({', '.join('?' * columns)})" if columns > 1 else "?"
        self._values: list[Any] = []
        self._rows = self._bytes = 0

    def add(self, *row: Any) -> None:
        """One more row. Raises sqlite3.Error of any row so far."""
        self._values += row
        self._rows += 1
        self._bytes += len(row[-1])
        if self._rows >= ROWS or self._bytes >= BYTES:
            self.flush()

    def flush(self) -> None:
        """Carry it out for the rows that wait. Raises sqlite3.Error."""
        if self._rows:
            self._connection.execute(self._statement(", ".join([self._row] * self._rows)), self._values)
            self._values, self._rows, self._bytes = [], 0, 0


class Changes:
    """What a checkpoint changes in the tables of a state file."""

    def __init__(self, connection: Connection) -> None:
        self.packages = Many(connection, "INSERT OR REPLACE INTO packages VALUES {}".format, 2)
        self.commands = Many(connection, "INSERT INTO commands VALUES {}".format, 3)
        self.answers = Many(connection, "INSERT INTO answers VALUES {}".format, 4)
        self.answered = Many(connection, "DELETE FROM commands WHERE package_id IN ({})".format, 1)
        """Packages whose commands are answers by now."""

    def flush(self) -> None:
        """Carry out what waits. Raises sqlite3.Error."""
        for many in (self.packages, self.commands, self.answers, self.answered):
            many.flush()
