"""The language of the log: Avro schemas of the event types, their codec, digests, identifiers and Kafka headers.

The events themselves are plain dataclasses, in `artifact_store.events`. No I/O but reading the packaged `.avsc` files.
Imports nothing else of this project but the modules of `artifact_store` that do no I/O. Start reading at `codec.py`.
"""
