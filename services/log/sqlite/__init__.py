"""The embedded log of record: one SQLite file with one partition, shared by the processes of one machine.

Reading begins with `log`, appending with `writer`; both work on `file`. Imports the log's `port` and `records`.
"""

from services.log.sqlite.log import SqliteLog
from services.log.sqlite.writer import SqliteWriter

__all__ = ["SqliteLog", "SqliteWriter"]
