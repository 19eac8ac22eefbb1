"""An open-loop load generator for HTTP: requests leave at their times, whatever comes back.

It needs the standard library alone, so that its process costs the server's cores nothing.
"""

import asyncio
import os
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Reply(NamedTuple):
    """Responses of a load.

    Attributes:
        status: 0 where there was no whole answer.
        body: of the answer.
        seconds: from the time at which the request had to leave.
        finished: seconds since the first one.
    """

    status: int
    body: bytes
    seconds: float
    finished: float


def load(
    port: int, requests: Sequence[bytes], rate: float | None, core: int | None = None, seed: int = 0
) -> list[Reply]:
    """Replies to `requests` (whole HTTP messages), sent by a process of its own.

    Args:
        port: of this machine.
        requests: in the order of sending.
        rate: a second, at random times (a Poisson process); None: all at once.
        core: the process runs on this one.
        seed: of the times.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(_load, port, requests, rate, core, seed).result()


def _load(
    port: int, requests: Sequence[bytes], rate: float | None, core: int | None, seed: int
) -> list[Reply]:
    if core is not None:
        os.sched_setaffinity(0, {core})
    return asyncio.run(_send_all(port, requests, rate, random.Random(seed)))


async def _send_all(
    port: int, requests: Sequence[bytes], rate: float | None, rng: random.Random
) -> list[Reply]:
    loop = asyncio.get_running_loop()
    start = due = loop.time()
    idle: list[Connection] = []
    tasks = []
    for request in requests:
        due += rng.expovariate(rate) if rate else 0
        await asyncio.sleep(due - loop.time())
        tasks.append(asyncio.create_task(_send(port, request, due, start, idle)))
    replies = await asyncio.gather(*tasks)
    for _, writer in idle:
        writer.close()
    return replies


async def _send(
    port: int, request: bytes, due: float, start: float, idle: list[Connection]
) -> Reply:
    loop = asyncio.get_running_loop()
    status, body = 0, b""
    for fresh in (False, True):  # the server may have closed an idle connection
        connection = None
        try:
            if not idle or fresh:
                fresh, connection = True, await asyncio.open_connection("127.0.0.1", port)
            else:
                connection = idle.pop()
            status, body, keep = await _exchange(connection, request)
            (idle.append if keep else _close)(connection)
            break
        except (OSError, asyncio.IncompleteReadError):
            if connection:
                _close(connection)
            if fresh:
                break
    now = loop.time()
    return Reply(status, body, now - due, now - start)


async def _exchange(connection: Connection, request: bytes) -> tuple[int, bytes, bool]:
    """Status and body of the answer, and whether the connection stays."""
    reader, writer = connection
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    _, _, after = head.partition(b"content-length:")
    body = await reader.readexactly(int(after.split(b"\r\n")[0]))
    return int(head.split()[1]), body, b"connection: close" not in head


def _close(connection: Connection) -> None:
    connection[1].close()
