"""The names of principals in events."""

from __future__ import annotations

import hashlib
import os
import pwd
import re

from artifact_store.registry import ANYONE
from artifact_store.rules import MAX_TEXT_CHARACTERS, holds_control
from services.config import Settings

_EMAIL = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s]+")


def actor_of(alias: str, subject: str) -> str:
    """The name of a principal in events: `alias:subject`, the same for every token of the subject.

    Some subjects are replaced by their digest, as `alias:~` and 64 hex digits: those that are too long or contain
    control characters, and e-mail addresses, which must not get into a log that forgets nothing.
    """
    actor = f"{alias}:{subject}"
    plain = (
        subject
        and not subject.startswith("~")
        and len(actor) <= MAX_TEXT_CHARACTERS
        and not holds_control(subject)
        and not _EMAIL.fullmatch(subject)
    )
    return actor if plain else f"{alias}:~{hashlib.sha256(subject.encode(errors='surrogatepass')).hexdigest()}"


def local_actor() -> str:
    """The user of this process."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's user often has no name
        name = str(os.getuid())
    return actor_of("local", name)


def actor_here(settings: Settings, named: str | None) -> str:
    """The actor of a command: the named one, or otherwise this user. A gateway determines the sender itself."""
    return named or (local_actor() if settings.url is None else ANYONE)
