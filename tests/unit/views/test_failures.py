"""Errors of database drivers become errors that say what to do; bugs of our own pass unchanged."""

from __future__ import annotations

import asyncpg
import pytest

from artifact_store.errors import UnavailableError
from services.views.database import database_errors


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.InternalClientError("cannot switch to state 21; another operation (2) is in progress"),
        asyncpg.InterfaceError("cannot perform operation: another operation is in progress"),
        asyncpg.InterfaceError("connection is closed"),
        ConnectionResetError(104, "Connection reset by peer"),
    ],
)
def test_a_connection_that_broke_at_any_step_is_a_reason_to_try_again(error: Exception) -> None:
    with pytest.raises(UnavailableError), database_errors():
        raise error


def test_a_mistake_of_our_own_is_not_taken_for_trouble_of_the_database() -> None:
    with pytest.raises(asyncpg.InterfaceError, match="prepared"), database_errors():
        raise asyncpg.InterfaceError("a prepared statement was used wrongly")
