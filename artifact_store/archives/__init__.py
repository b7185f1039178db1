"""Transferring many files together: bundles of files, and the tar archives that carry them over HTTP.

Imports `errors`, `rules` and `media_types` of this distribution only. Start reading at `bundle.py`.
"""
