"""Logs that travel: a log as one file, that file as a log again, and one topic as the copy of another.

`archive_file` is the archive's format. `export` writes an archive of a log; `load` checks one, fills an empty log with
it, and says where positions of the old log lie in the new one. `copy` compares two logs and copies one topic to
another. All of it works on the ports of log and blob store; `services.wiring` opens what fills a log.
"""

from services.archive.archive_file import Archive, Contents
from services.archive.copy import Comparison, compare_logs, copy_log
from services.archive.export import export_log
from services.archive.load import Loaded, check_archive, import_archive, translate

__all__ = [
    "Archive",
    "Comparison",
    "Contents",
    "Loaded",
    "check_archive",
    "compare_logs",
    "copy_log",
    "export_log",
    "import_archive",
    "translate",
]
