"""The embedded log of record: one SQLite file with one partition, shared by the processes of one machine."""

from services.log.sqlite.log import SqliteLog
from services.log.sqlite.writer import SqliteWriter

__all__ = ["SqliteLog", "SqliteWriter"]
