"""`python -m tests.services`: start, stop and show the services of this checkout, or run a command on them."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from types import FrameType
from typing import NoReturn

from tests.services import shared
from tests.services.install import java, kafka_jars, minio_binary, postgres_binaries, seaweed_binary
from tests.services.process import ServiceError


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 done, 1 a service is missing or does not run, or that of the command that was run."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)  # so that `run` stops what it started
    try:
        match options.action:
            case "install":
                java(), kafka_jars(), minio_binary(), postgres_binaries(), seaweed_binary()
            case "start":
                shared.start(durable=options.durable, store=options.store)
                _show()
            case "stop":
                shared.stop()
            case "status":
                return 0 if _show() else 1
            case "run":
                return _run(options.command, durable=options.durable, store=options.store)
    except ServiceError as error:
        print(f"services: {error}", file=sys.stderr)  # noqa: T201  the command's output
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.services", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("install", help="fetch and build what the services are made of, start nothing")
    start = actions.add_parser("start", help="start what does not run, write var/services.env, print the endpoints")
    actions.add_parser("stop", help="end what runs, delete its data and var/state")
    actions.add_parser("status", help="print the endpoints; exit code 1 when one does not run")
    run = actions.add_parser("run", help="start what does not run, run a command, stop it all if it was started here")
    run.add_argument("command", nargs="+", metavar="COMMAND", help="after --")
    for parser_with_choice in (start, run):
        parser_with_choice.add_argument("--durable", action="store_true", help="PostgreSQL forces its writes to disk")
        parser_with_choice.add_argument("--store", choices=shared.STORES, help="the object store of a new set (minio)")
    return parser


def _show() -> bool:
    """Print the endpoints, without secrets; whether all run."""
    endpoints = shared.status()
    for name, endpoint in endpoints.items():
        print(f"{name:9} {endpoint or 'does not run'}")  # noqa: T201  the command's output
    if all(endpoints.values()):
        print(f"settings  {shared.ENVIRONMENT_FILE.relative_to(shared.ROOT)}")  # noqa: T201  the command's output
    return all(endpoints.values())


def _run(command: list[str], *, durable: bool, store: shared.Store | None) -> int:
    """Leaves alone what ran before. An interrupt or SIGTERM goes to the command, once, and it decides when it ends."""
    fresh = shared.start(durable=durable, store=store)
    try:
        # In a process group of its own: a terminal's Ctrl-C would reach it a second time otherwise.
        with subprocess.Popen(command, process_group=0) as child:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda received, _: child.send_signal(received))
            status = child.wait()
        return 128 - status if status < 0 else status
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # stopping is not interrupted half-way
        if fresh:
            shared.stop()


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
