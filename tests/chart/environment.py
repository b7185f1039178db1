"""The environment with which a container of the chart would start, computed as the kubelet does."""

from __future__ import annotations

import re
from typing import Any

POD_ADDRESS = "10.1.2.3"
SECRET = "from-an-existing-secret"


def environment(container: dict[str, Any], documents: list[dict[str, Any]]) -> dict[str, str]:
    """Names and values; a value from a Secret is `SECRET`, or an empty JSON object for the Kafka options.

    Raises KeyError for a ConfigMap that the chart does not hold, or a field of the pod other than its address.
    """
    maps = {document["metadata"]["name"]: document["data"] for document in documents if document["kind"] == "ConfigMap"}
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        found.update(maps[source["configMapRef"]["name"]])
    for entry in container["env"]:
        found[entry["name"]] = _value(entry, found)
    return found


def secret_names(container: dict[str, Any]) -> set[str]:
    """The variables of a container whose values come from a Secret."""
    return {entry["name"] for entry in container["env"] if "secretKeyRef" in entry.get("valueFrom", {})}


def _value(entry: dict[str, Any], before: dict[str, str]) -> str:
    if "value" in entry:
        # A reference sees only what stands before it; an unknown one is left as it is.
        return re.sub(r"\$\((\w+)\)", lambda match: before.get(match[1], match[0]), entry["value"])
    if "secretKeyRef" in entry["valueFrom"]:
        return "{}" if entry["name"].endswith("_KAFKA_OPTIONS") else SECRET
    return {"status.podIP": POD_ADDRESS}[entry["valueFrom"]["fieldRef"]["fieldPath"]]
