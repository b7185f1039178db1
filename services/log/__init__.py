"""The log of record: ports, two adapters that fulfil them, and what both are made of.

Begin with `port`: `Log` reads and `CommandWriter` appends. `kafka/` and `sqlite/` are the adapters. `records` says what
a record is. `sequencer/` takes requests in and answers them, and `state/` keeps what a writer knows of its packages.

Imports `artifact_store`, `schemas` and `services.core`. Within: `port`, `records` ← `state` ← `sequencer` ← `kafka`.
"""
