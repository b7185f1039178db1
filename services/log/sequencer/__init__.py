"""From a request to its answer: the queue, the jobs beside it, and what callers are told.

Begin with `queue`. `background` does what takes long with large packages, in threads of their own; `answers` has
errors and deadlines. Imports the log's `port` and `state`, and nothing of Kafka.
"""
