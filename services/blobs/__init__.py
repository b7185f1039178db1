"""Blobs: immutable objects, written once, read by key, offset and length, in an S3 bucket or a folder.

Begin with `port`, which says what a store must do. `local` and `s3/` are its two adapters. On both, `intake` reads and
checks incoming bodies, and `verified_reads` checks what is read. `packs` puts many small files into one blob, and
`resumable/` holds uploads that span requests. Imports `services.core` and nothing that knows the log or the views.
"""
