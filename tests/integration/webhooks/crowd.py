"""A process of receivers: healthy ones, which record how late each event arrives, and some that fail or hang.

    python -m tests.integration.webhooks.crowd

Prints its port. `POST /healthy/NUMBER` accepts, `/fails` answers 500, `/hangs` never answers. `GET /delays` gives the
delays in µs since the previous `GET /delays`, of healthy receivers with numbers from `first` on.
"""

from __future__ import annotations

import asyncio
import json
import time
from datetime import datetime

from aiohttp import web


def main() -> None:
    asyncio.run(serve())


async def serve() -> None:
    delays: list[tuple[int, int]] = []

    async def accept(request: web.Request) -> web.Response:
        event = json.loads(await request.read())
        created = datetime.fromisoformat(event["time"]).timestamp() * 1_000_000
        delays.append((int(request.match_info["number"]), int(time.time_ns() // 1000 - created)))
        return web.Response()

    async def fail(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=500)

    async def hang(_: web.Request) -> web.Response:
        await asyncio.Event().wait()
        return web.Response()

    async def tell(request: web.Request) -> web.Response:
        first = int(request.query["first"])
        found = [delay for number, delay in delays if number >= first]
        if "clear" in request.query:
            delays.clear()
        return web.json_response(found)

    app = web.Application()
    app.router.add_post("/healthy/{number}", accept)
    app.router.add_post("/fails", fail)
    app.router.add_post("/hangs", hang)
    app.router.add_get("/delays", tell)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=2048).start()
    print(runner.addresses[0][1], flush=True)  # noqa: T201 - what the test reads
    await asyncio.Event().wait()


if __name__ == "__main__":
    main()
