"""The views: tables that are computed from the log, and the questions that they answer.

Begin with `tables`, then `projections/`: a projection is a fold of events into some of the tables. `engine/` applies
the log with it. `queries` reads the registry's tables, `waiting` waits until they have come far enough, and `digest`
compares a view with another. `database` opens PostgreSQL or SQLite, and `bulk` writes many rows to either.

Views import `schemas`, `services.core`, and the log's port, positions and records. Each module imports only those
before it: `tables`, `bulk`, `projections/`, `database`, `engine/`, `digest`, `queries`, `waiting`.
"""
