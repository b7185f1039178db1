"""Fuzzing of every decoder of bytes that others send.

Begin with `decoders`, which lists what is tried. `python -m tests.fuzz [NAME…]` (`make fuzz`) tries them one after the
other, guided by the branches that an input reaches, and keeps what reached new ones in `var/fuzz`.
`tests/unit/test_fuzz.py` tries random inputs.
"""
