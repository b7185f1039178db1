"""Uploads that span requests, on any blob store: begin with `uploads`, whose records in the store are in `states`."""
