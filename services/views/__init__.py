"""The views: tables that are computed from the log, and the queries on them.

Begin with `tables`, then `projections/`: a projection is a fold of events into some of the tables. `engine/` applies
the log with it. `queries` reads the tables, `lookups` joins concurrent queries for single files into one, `waiting`
waits until the registry view has come far enough, and `digest` computes a digest by which views are compared.
`database` opens PostgreSQL or SQLite, and `bulk` writes many rows to either.

Views import `schemas`, `services.core`, and the log's port, positions and records. Each module imports only those
before it: `tables`, `bulk`, `projections/`, `database`, `engine/`, `digest`, `queries`, `waiting`.
"""
