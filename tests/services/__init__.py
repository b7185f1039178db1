"""The real services that tests and `make run` stand on: Kafka, MinIO and PostgreSQL on free loopback ports.

`python -m tests.services start|stop|status|run` handles the one shared set of a checkout (`shared.py`). Fault tests
start private ones, which they may kill and freeze: `KafkaBroker`, `KafkaCluster`, `MinioServer`, `SeaweedServer` and
`PostgresServer`.
Everything here runs on Python's standard library alone.
"""
