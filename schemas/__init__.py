"""The language of the log: event types, their Avro schemas, the codec, canonical forms and digests.

No I/O beyond reading the packaged `.avsc` files, and no import of anything else of this project.
"""
