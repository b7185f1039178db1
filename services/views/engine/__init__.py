"""The projection engine: a source reads and decodes batches of the log; `apply` writes each in one transaction.

Its words:

- To *fold* events is to write the rows that they mean. To *apply* a batch is to fold it and move the *checkpoint*, the
  position of the view, in the same transaction.
- The checkpoint's *guard* lets a batch through only if the view stands where the batch begins.
- A *generation* is one set of a view's rows, folded from the log's start. Readers see the *live* one. Another one, a
  *build*, may be folded beside it and then take its place.
- A *parked* package is one that the view has stopped following, at its *mark*.

Begin with `source`: a range of the log, one package of it, or the share that a group assigns. Then read `apply`, which
writes rows, checkpoint and marks together, and catches up. `checkpoints` say where a view stands and whether the log
goes on from there. `parking` sets aside what cannot be applied. `generations` build a view beside the live one, in the
tables of `build_tables`, and switch to it.

The engine may import the rest of `services.views` except `digest`, `queries` and `waiting`, which read what it has
written. Each module imports only those before it: `checkpoints`, `build_tables`, `generations`, `source`, `parking`,
`apply`.
"""
