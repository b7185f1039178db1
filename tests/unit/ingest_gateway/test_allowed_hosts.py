"""Which hosts and origins are allowed: a stranger's page must not send to a gateway of this machine."""

from __future__ import annotations

import pytest

from ingest_gateway.protocol.connections import AllowedHosts
from ingest_gateway.protocol.http_errors import ForeignOriginError, MalformedHttpError, UnknownHostError

LOCAL = ("localhost", "LOCALHOST:8080", "127.0.0.1:8080", "[::1]:8080", "[::1]", "127.0.0.1", "192.0.2.7:80")
REBOUND = (
    "evil.example",
    "evil.example:8080",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "",
    "x@localhost",
)


@pytest.mark.parametrize("host", LOCAL)
def test_loopback_is_reached_by_its_own_names_and_by_addresses(host: str) -> None:
    AllowedHosts().check([host], [])


@pytest.mark.parametrize("host", REBOUND)
def test_a_name_that_a_stranger_lets_resolve_to_loopback_is_refused(host: str) -> None:
    with pytest.raises(UnknownHostError, match="ARTIFACT_STORE_ALLOWED_HOSTS"):
        AllowedHosts().check([host], [])


def test_a_name_of_a_proxy_in_front_is_allowed_when_it_is_set() -> None:
    origins = AllowedHosts(["Registry.Example", "other.example:8443"])
    for host in ("registry.example", "registry.example:443", "other.example:8443", "localhost:1"):
        origins.check([host], [])
    with pytest.raises(UnknownHostError):
        origins.check(["other.example"], [])


def test_other_interfaces_take_any_name_until_some_are_set() -> None:
    AllowedHosts(loopback=False).check(["gateway.svc"], [])
    with pytest.raises(UnknownHostError):
        AllowedHosts(["registry.example"], loopback=False).check(["gateway.svc"], [])


@pytest.mark.parametrize("loopback", [True, False])
@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:3000", "http://[", ""])
def test_a_page_of_another_site_may_not_send(origin: str, loopback: bool) -> None:
    with pytest.raises(ForeignOriginError):
        AllowedHosts(loopback=loopback).check(["localhost:8080"], [origin])


def test_the_gateways_own_pages_and_those_of_allowed_hosts_may_send() -> None:
    AllowedHosts().check(["localhost:8080"], ["http://localhost:8080"])
    AllowedHosts(["registry.example"]).check(["127.0.0.1:8080"], ["https://registry.example"])


def test_two_values_are_none() -> None:
    for hosts, origins in ((["localhost", "evil.example"], []), (["localhost"], ["http://localhost", "http://evil"])):
        with pytest.raises(MalformedHttpError):
            AllowedHosts().check(hosts, origins)
