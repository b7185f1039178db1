"""The projection engine: a source reads and decodes batches of the log; `apply` writes each in one transaction.

Begin with `source`: a range of the log, one package of it, or the share that a group assigns. Then read `apply`, which
writes rows, checkpoint and marks of parked packages together, and catches up. `checkpoints` say where a view stands and
whether the log goes on from there. `parking` sets aside what cannot be applied. `generations` build a view beside the
live one, in the tables of `build_tables`, and switch to it.

The engine may import the rest of `services.views` except `digest`, `queries` and `waiting`, which read what it has
written. Each module imports only those before it: `checkpoints`, `build_tables`, `generations`, `source`, `parking`,
`apply`.
"""
