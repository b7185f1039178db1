"""The registry's operations through a gateway: requests, retries, and bodies that continue after a lost connection.

Imports everything of this distribution except `transfers`. Start reading at `client.py`.
"""
