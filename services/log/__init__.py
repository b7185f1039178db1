"""The log of record: ports, two adapters that implement them, and the code that both adapters share.

Begin with `port`: `Log` reads and `CommandWriter` appends. `kafka/` and `sqlite/` are the adapters. `records` says what
a record is. `sequencer/` takes requests and answers them, and `state/` keeps a writer's state of its packages.

Imports `artifact_store`, `schemas` and `services.core`. Within: `port`, `records` ← `state` ← `sequencer` ← `kafka`.
"""
