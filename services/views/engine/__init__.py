"""The projection engine: reads batches from the log, decodes them, and applies each in one transaction.

Begin with `apply`, which takes what `source` reads and decodes, and writes rows and checkpoint together. `checkpoints`
say where to go on, and `parking` sets aside what cannot be applied. `generations` build a view beside the live one,
in the tables of `build_tables`, and switch to it.

The engine may import the rest of `services.views` except `digest`, `queries` and `waiting`, which read what it has
written.
"""
