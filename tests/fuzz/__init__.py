"""Fuzzing of every decoder for bytes from others.

Begin with `decoders`, which lists them. `python -m tests.fuzz [NAME…]` (`make fuzz`) tries them one after the other,
guided by the branches that an input reaches, and keeps inputs that reach new branches in `var/fuzz`.
`tests/unit/test_fuzz.py` tries random inputs.
"""
