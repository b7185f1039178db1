"""Addresses to listen on: `HOST:PORT`, parsed in the same way for every setting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from artifact_store.rules import check_host, is_loopback, parse_number

_LAST_PORT = 65_535


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """A host and port to listen on; port 0 takes a free port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `HOST:PORT`, with an IPv6 address in brackets. Raises ValueError."""
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        number = parse_number(port)
        if not host or number is None or number > _LAST_PORT:
            raise ValueError("it must be HOST:PORT, such as 127.0.0.1:9464 or [::1]:9464")
        check_host(host)
        return cls(host, number)

    def of_process(self, number: int) -> ListenAddress:
        """The address of one of several processes, counted from 0: they take consecutive ports."""
        return ListenAddress(self.host, self.port + number if self.port else 0)

    @property
    def is_loopback(self) -> bool:
        """Whether it can only be reached from this machine."""
        return is_loopback(self.host)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
