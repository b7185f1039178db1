"""The core: the rules of the registry. Pure: no I/O, no clock, no random source.

Begin with `decide`: it has the commands that callers send, and turns each into events or a rejection. `state` is what
it decides on: `evolve` gives the state of a package after an event, and `manifest_of` its manifest. `lifecycle` has the
retention classes, `access` the rights of principals, and `wire` encodes commands for other gateways. The rules for
paths, texts and metadata are in `artifact_store.rules`.
"""
