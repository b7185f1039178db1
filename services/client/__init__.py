"""The client library: the registry over HTTP, and whole trees pushed into packages and pulled out of them."""

from services.client.pull import Pulled, pull
from services.client.push import Pushed, push
from services.client.registry import GatewayRegistry
from services.client.retries import RetryPolicy
from services.client.sources import BodySource, BytesSource, FileSource

__all__ = [
    "BodySource",
    "BytesSource",
    "FileSource",
    "GatewayRegistry",
    "Pulled",
    "Pushed",
    "RetryPolicy",
    "pull",
    "push",
]
