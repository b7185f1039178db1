"""The embedded log of record: one SQLite file with one partition, shared by the processes of one machine.

`log` reads the file. `writer` appends to it: it runs the log's `sequencer` on `driver`, which caches packages' states
in a `PackageStates`. `writer` also fills a file with events that were made elsewhere. All of these use `file`. This
package imports the log's `port`, `records`, `sequencer` and `state`.
"""

from services.log.sqlite.log import SqliteLog
from services.log.sqlite.writer import SqliteFiller, SqliteWriter

__all__ = ["SqliteFiller", "SqliteLog", "SqliteWriter"]
