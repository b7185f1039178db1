"""What every process of the product needs: child processes, clocks, addresses, locks, TLS, metrics, logs and traces.

Imports only `artifact_store`. Read the module that you need: they do not build on each other.
"""
