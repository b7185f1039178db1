"""From a request to its answer: requests wait in a queue, are decided in batches, appended, and answered.

Both logs append through it. Begin with `partition_writer`, the thread that does this for one partition. `queue` holds
what waits, and `driver` is what a log must do: give a lease of the partition and append under it. `background` does
what takes long with large packages, in threads of their own; `answers` has errors and deadlines. Imports the log's
`port`, `records` and `state`, and nothing of Kafka or SQLite.
"""
