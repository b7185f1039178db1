"""The gateway: the HTTP interface of the registry, and how gateways that share a Kafka log work together.

Begin with `app`, which takes one request from its head to its answer, and with one handler in `routes`.

- `app`, `gateway`: the table of routes and the errors; what the handlers of one gateway share.
- `server`, `siblings`: a gateway as a process, and as several processes behind one address.
- `admission`: who is let in, and for how long: places, room for bytes in memory, quotas, followers.
- `event_tail`, `health`, `http_metrics`: what followers of events, probes and Prometheus ask for.
- `routes/` answers requests, `protocol/` is HTTP, `peers/` talks to other gateways.

May import `schemas` and `services`. Within it:
`admission`, `peers` ← `gateway` ← `protocol` ← `routes` ← `app` ← `server`.
"""
