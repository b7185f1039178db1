"""A writer's state of its partition's packages, in a disposable file and in snapshots of that file.

Begin with `partition_state`, which the writer uses: packages in memory over `state_file`. `restore` finds the best
state at a take-over, `snapshots` keeps copies in the blob store, and `loss` describes a record that a state has but the
log lacks. Imports `port` and `records` of the log, and nothing of Kafka.
"""
