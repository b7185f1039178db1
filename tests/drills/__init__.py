"""Drills: each causes one failure of the real product, as an operator would meet it, and mends it by the runbook.

`drills` is the table of failures, `scene` has an operator's view, `carry_out` runs one drill. `python -m tests.drills
[NAME…]` runs some of them; `make endurance` runs all. `make test` runs five on a smaller installation, with rules that
fire sooner.
"""
