"""Moving logs: exporting a log to a file, importing the file into a log, and copying one topic to another.

`archive_file` is the archive's format. `export` writes an archive of a log; `load` checks one, fills an empty log with
it, and translates positions of the old log to the new one. `copy` compares two logs and copies one topic to another.
All of it uses the ports of log and blob store; `services.wiring` opens the `LogFiller`.
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
