"""Benchmarks: ratios, each measured in one run against a baseline that is tuned as well as ours.

`python -m benchmarks [NAME…]` needs the services of `make services`; docs/benchmarks.md says how to read the figures.
"""
