"""Webhooks: subscriptions, and the process that sends events to their URLs. Begin with `subscriptions.py`: it defines
what a subscription is, and the tables. `deliverer.py` is the process: it reads the log once for all subscriptions and
gives each event to an `Outbox` (`outbox.py`) per subscription, which keeps the order per package, retries, and parks.
`messages.py` makes bodies and signatures. `targets.py` decides where requests may go, and sends them.

The tables are in the views' database and belong to no projection: no replay touches them. Everything here may import
`services.views`, `services.registry.origins`, `services.identity` and the log's port; never a gateway or a projector.
"""
