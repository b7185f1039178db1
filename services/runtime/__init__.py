"""What every process of the product needs: its children, the clock, addresses, locks, and the trace of a request.

Imports `artifact_store` alone. Begin where you need to: no module here knows another one's work.
"""
