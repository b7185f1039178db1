"""Places and room of a gateway: who gets them, their return, and the limits of the system."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifact_store.errors import PushBackError
from ingest_gateway.admission import Places, Room, TooManyAtOnceError
from ingest_gateway.protocol.connections import client_of


@given(limit=st.integers(1, 9), moves=st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60))
def test_no_more_are_taken_than_there_are_and_none_has_more_than_half(
    limit: int, moves: list[tuple[str, bool]]
) -> None:
    refused = Counter[str]()
    places = Places("seats", limit, lambda what, times: refused.update({what: times}))
    assert refused == {"seats": 0}
    taken: Counter[str] = Counter()
    for client, comes in moves:
        if not comes:
            if taken[client]:
                places.give(client)
                taken[client] -= 1
            continue
        try:
            places.take(client)
        except TooManyAtOnceError:
            assert taken[client] == max(1, limit // 2)
            assert refused.pop("seats") == 1
        except PushBackError:
            assert taken.total() == limit
            assert refused.pop("seats") == 1
        else:
            taken[client] += 1
            assert taken.total() <= limit
            assert taken[client] <= max(1, limit // 2)
        assert len(places) == taken.total()
    assert refused.total() == 0


def test_room_comes_back_whole_and_is_never_more_than_there_is() -> None:
    room = Room("JSON", 10)
    for _ in range(3):
        with room.share("a") as one, room.share("b") as two, room.share("c") as three:
            one(4)
            two(5)
            with pytest.raises(PushBackError):
                three(2)
            three(1)


def test_no_client_has_more_than_half_of_the_room() -> None:
    refused = Counter[str]()
    room = Room("JSON", 10, lambda what, times: refused.update({what: times}))
    with room.share("a") as one, room.share("a") as two, room.share("b") as three:
        one(3)
        with pytest.raises(TooManyAtOnceError):
            two(3)
        two(2)
        three(5)
    assert refused == {"JSON": 1}
    with room.share("a") as one:
        one(5)


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "forwarded", "connections"),
    [
        (1024, 4096, 2048, 0, 2048),
        (1024, 1024, 2048, 0, 512),
        (600, 1000, 2048, 0, 488),
        (4096, 4096, 100, 0, 100),
        (64, 64, 9, 0, 1),
        (1024, 8192, 2048, 2048, 2048),
        (1024, 4096, 2048, 2000, 1792),
        (4096, 4096, 2048, 1000, 2048),
        (1024, 1024, 2048, 2048, 256),
        (64, 64, 9, 2048, 1),
    ],
)
def test_connections_leave_descriptors_for_the_rest(
    soft: int, hard: int, wanted: int, forwarded: int, connections: int
) -> None:
    code = (
        "import resource; from ingest_gateway.admission import connections_within; "
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard})); "
        f"print(connections_within({wanted}, {forwarded}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == connections


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
    ],
)
def test_all_ipv6_addresses_of_a_site_count_as_one_client(address: str, counted: str) -> None:
    connection: Any = SimpleNamespace(peername=(address, 1, 0, 0))
    assert client_of(connection) == counted
