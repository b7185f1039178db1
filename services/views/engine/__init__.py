"""The projection engine: reads batches from the log, decodes them, and applies each in one transaction.

Begin with `catch_up`, which is the whole way in one place: `source` reads and decodes, `checkpoints` say where to go
on, and `apply` writes rows and checkpoint together, around what `parking` sets aside. `generations` build a view
beside the live one, in the tables of `build_tables`, and switch to it.

The engine may import the rest of `services.views` except `digest`, `queries` and `waiting`, which read what it has
written.
"""
