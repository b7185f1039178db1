"""The real services for tests and `make run`: Kafka, MinIO and PostgreSQL on free loopback ports.

`python -m tests.services start|stop|status|run` handles the one shared set of a checkout (`shared.py`). Fault tests
start private ones, which they may kill and freeze: `KafkaBroker`, `KafkaCluster`, `MinioServer`, `SeaweedServer` and
`PostgresServer`. Everything here only needs Python's standard library.
"""
