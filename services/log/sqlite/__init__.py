"""The embedded log of record: one SQLite file with one partition, shared by the processes of one machine.

Reading begins with `log`. Appending begins with `writer`, which runs the log's `sequencer` on `driver`, and keeps what
it knows of packages in a `PackageStates`; it also takes events that were made elsewhere. All work on `file`. Imports
the log's `port`, `records`, `sequencer` and `state`.
"""

from services.log.sqlite.log import SqliteLog
from services.log.sqlite.writer import SqliteFiller, SqliteWriter

__all__ = ["SqliteFiller", "SqliteLog", "SqliteWriter"]
