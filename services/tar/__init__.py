"""Tar archives (POSIX.1-2017 pax, "pax Interchange Format"): read strictly while they stream, and written plainly."""
