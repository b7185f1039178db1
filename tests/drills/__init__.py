"""Drills: each makes one failure on the real product, as an operator would meet it, and mends it by the runbook.

`drills` is the table of failures, `scene` what an operator sees, `carry_out` how one drill is run.
`python -m tests.drills [NAME…]` runs some of them; `make endurance` runs all. `make test` runs five on a smaller
installation, with rules that fire sooner.
"""
