"""What a writer knows of its partition's packages, kept in a disposable file and in snapshots of that file.

Begin with `partition_state`, which the writer uses: packages in memory over `state_file`. `restore` finds the best
state at a take-over, `snapshots` keeps copies in the blob store, and `loss` is what a state proves when the log lacks
its last record. Imports `port` and `records` of the log, and nothing of Kafka.
"""
