"""One broker behind proxies, for tests that control the network between it and its clients."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.faults.proxy import Network, ProxiedCluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxiedCluster]:
    """A broker of the module's own."""
    with ProxiedCluster(tmp_path_factory.mktemp("kafka"), brokers=1) as started:
        yield started


@pytest.fixture
async def network(cluster: ProxiedCluster) -> AsyncIterator[Network]:
    """The proxies before it, of the test's own."""
    async with cluster.network() as network:
        yield network
