"""The gateway: the HTTP interface of the registry, and the cooperation of gateways that share a Kafka log.

Begin with `app`, which takes one request from its head to its answer, and with one handler in `routes`.

- `app`, `gateway`: the table of routes and the errors; the state that the handlers of one gateway share.
- `server`, `siblings`: a gateway as a process, and as several processes behind one address.
- `admission`: the limits for requests: places, room for bytes in memory, quotas, followers.
- `event_tail`, `health`, `http_metrics`: answers for followers of events, probes and Prometheus.
- `routes/` answers requests, `protocol/` is HTTP, `peers/` talks to other gateways.

May import `schemas` and `services`. Within it:
`admission`, `peers` ← `gateway` ← `protocol` ← `routes` ← `app` ← `server`.
"""
