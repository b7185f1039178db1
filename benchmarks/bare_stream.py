"""The baseline of `fan-out`,in a separate process: an aiohttp server that only writes bytes that are ready.

`python -m benchmarks.bare_stream PORT FILE`. The file holds, in CBOR, the chunks of each kind of reader. `GET /KIND` is
a reader, and gets its chunks once `POST /go` has come.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import cbor2
import uvloop
from aiohttp import web


def app(chunks: list[list[bytes]]) -> web.Application:
    """The server of these chunks, by number of the kind."""
    begins = asyncio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b":\n\n")
        await begins.wait()
        for chunk in chunks[int(request.match_info["kind"])]:
            await response.write(chunk)
        await response.write_eof()
        return response

    async def go(_: web.Request) -> web.Response:
        begins.set()
        return web.Response()

    made = web.Application()
    made.add_routes([web.get("/{kind:\\d+}", stream), web.post("/go", go)])
    return made


async def main(port: int, chunks: list[list[bytes]]) -> None:
    """Serve until the process is stopped."""
    runner = web.AppRunner(app(chunks), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    print("serving", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), cbor2.loads(Path(sys.argv[2]).read_bytes())))
