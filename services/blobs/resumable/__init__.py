"""Uploads that span requests, on any blob store: begin with `uploads`; `states` keeps their state in the store."""
