"""Targets of webhooks: which addresses and URLs are refused, whatever their form."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from artifact_store.errors import InvalidRequestError
from services.webhooks.targets import ForbiddenTargetError, NotSentError, Targets

PRIVATE = (
    *("127.0.0.1", "127.8.8.8", "0.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "100.100.100.200"),
    *("169.254.169.254", "168.63.129.16", "198.18.0.1", "192.0.0.192", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
    *("::1", "::", "fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "2001::1"),
    *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1"),
    *("2002:7f00:1::", "::127.0.0.1", "not an address"),
)
PUBLIC = ("8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8")


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_that_is_not_public_is_refused(address: str) -> None:
    with pytest.raises(ForbiddenTargetError):
        Targets().require(address, "https")


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_reached_by_https_alone(address: str) -> None:
    targets = Targets(("10.0.0.0/8",))
    targets.require(address, "https")
    with pytest.raises(ForbiddenTargetError):
        targets.require(address, "http")


def test_an_allowed_network_is_reached_by_either_and_its_neighbours_by_none() -> None:
    targets = Targets(("10.1.0.0/16", "fd12::/16"))
    for address in ("10.1.2.3", "fd12::1", "::ffff:10.1.2.3"):
        targets.require(address, "https")
        targets.require(address, "http")
    for address in ("10.2.0.1", "127.0.0.1", "fd13::1"):
        with pytest.raises(ForbiddenTargetError):
            targets.require(address, "https")


@pytest.mark.parametrize(
    "url",
    [
        *("http://receiver.example/", "ftp://receiver.example/", "https://", "https:///x", "receiver.example"),
        *("https://user:secret@receiver.example/", "https://receiver.example/#part", "https://receiver.example:0/"),
        *("https://receiver.example:99999/", "https://127.0.0.1/", "https://[::1]/", "https://[::ffff:10.0.0.1]/"),
        *("https://2130706433/", "https://0x7f.1/", "https://127.1/", "https://0177.0.0.1/", "https://127.0.0.1./"),
        *("https://receiver.example/ü", "https://receiver.example/a b", "https://receiver.example\\@10.0.0.1/"),
        *("https://receiver.example/\n", "https://receiver.example/" + "x" * 2_048, "https://[bad/"),
    ],
)
def test_a_url_that_must_not_be_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequestError):
        Targets().check(url)


def test_other_urls_are_taken() -> None:
    for url in ("https://receiver.example/", "https://receiver.example:8443/a?b=c", "https://8.8.8.8/"):
        Targets().check(url)
    Targets(("10.0.0.0/8",)).check("http://receiver.example/")


async def test_a_host_is_refused_when_one_of_its_addresses_is_forbidden() -> None:
    async def both(host: str, port: int) -> Iterable[str]:
        return ["8.8.8.8", "127.0.0.1"]

    async with Targets(look_up=both) as targets:
        with pytest.raises(NotSentError, match=r"127\.0\.0\.1 is no public address"):
            await targets.send("https://receiver.example/", b"", {})


async def test_a_name_of_this_machine_is_looked_up_and_refused() -> None:
    async with Targets() as targets:
        with pytest.raises(NotSentError, match="is no public address"):
            await targets.send("https://localhost/", b"", {})
