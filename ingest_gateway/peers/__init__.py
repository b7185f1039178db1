"""Communication between gateways that share a Kafka log: commands go to the owner of their partition, bytes never do.

Begin with `membership`, which joins the group of writers. `forwarding` asks the owner, `internal_listener` answers
when this gateway is the owner; the two agree on paths and messages. Imports nothing else of the gateway.
"""
