"""The registry's operations through a gateway: requests, retries, and bodies that go on where a connection was lost.

Imports everything of this distribution but `transfers`. Start reading at `client.py`.
"""
