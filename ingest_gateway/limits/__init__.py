"""Who is let in, and for how long: places for connections, transfers and followers, room for bytes in memory, quotas.

Begin with `admission`. `followers` are clients that stay until the gateway closes. Imports nothing else of the gateway.
"""
