"""Who is let in, and for how long: places for connections, transfers and followers, and room for bytes in memory.

Begin with `admission`. `followers` are clients that stay until the gateway closes. Imports nothing else of the gateway.
"""
