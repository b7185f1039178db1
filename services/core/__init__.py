"""The core: the rules of the registry. Pure: no I/O, no clock, no random source.

Begin with `decide`: the commands, what callers ask for, and which events each becomes or why it is rejected. `state` is
what it decides on: `evolve` gives the state of a package after an event, and `manifest_of` its manifest. `lifecycle`
has the retention classes, `access` who may do what, and `wire` encodes commands for other gateways. What a path, a text
or metadata may contain is in `artifact_store.rules`.
"""
