"""The projection engine: a source reads and decodes batches of the log; `apply` writes each in one transaction.

Its words:

- To *fold* events is to write the rows that they mean. To *apply* a batch is to fold it and move the *checkpoint*, the
  position of the view, in the same transaction.
- The checkpoint's *guard* lets a batch through only if the view stands where the batch begins.
- A *generation* is one set of a view's rows, folded from the log's start. Readers see the *live* generation. Another
  one, a *build*, may be folded beside it and then replace it.
- A *parked* package is one that the view has stopped following, at its *mark*.

Begin with `source`: it reads a range of the log, one package of it, or the partitions that a group assigns. Then read
`apply`, which writes rows, checkpoint and marks in one transaction, catches up, and retries parked packages.
`checkpoints` stores a view's position and checks that the log continues from there. `generations` builds a view beside
the live one, in the tables of `build_tables`, and switches to it.

The engine may import the rest of `services.views` except `digest`, `queries`, `lookups` and `waiting`, which read what
it has written. Each module imports only those before it: `checkpoints`, `build_tables`, `generations`, `source`,
`apply`.
"""
