"""The core: commands, decide, evolve and the rules they check. Pure: no I/O, no clock, no random source."""
