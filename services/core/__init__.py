"""The core: the rules of the registry. Pure: no I/O, no clock, no random source.

Begin with `commands`, what callers ask for. `decide` turns a command into events or rejects it, and `evolve` gives the
state of a package after an event; `state` is what both work on. `lifecycle` has the retention classes, `limits` the
sizes and times that `decide` enforces, `access` who may do what. `freezing` builds the manifest, and `wire` encodes
commands for other gateways. What a path, a text or metadata may contain is in `artifact_store.rules`.
"""
