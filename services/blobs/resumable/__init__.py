"""Uploads over several requests, on any blob store: begin with `uploads`; `states` keeps their states in the store."""
