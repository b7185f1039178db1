"""The language of the log: Avro schemas of the event types, their codec, digests, identifiers and Kafka headers.

The events themselves are plain dataclasses in `artifact_store.events`. The only I/O is reading the packaged `.avsc`
files. Of this project, it imports only those modules of `artifact_store` that do no I/O. Begin with `codec`.
"""
