"""Blobs in any store that speaks S3.

`store` is the adapter; `multipart` sends large bodies, `requests` makes single requests.
"""
