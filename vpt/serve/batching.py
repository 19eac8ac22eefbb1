"""Images of many requests in one pass: a bounded number is let in, and runs in batches."""

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

SMOOTHING = 0.2  # weight of the last pass in the seconds of an image


class Busy(Exception):
    """Nothing more can be accepted; `seconds` until that may change."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many images under way: try again in {seconds} s")
        self.seconds = seconds


class Waiting(NamedTuple):
    """An item, when it arrived, and where its result goes."""

    item: Any
    arrived: float
    result: asyncio.Future


class Batcher:
    """Runs items of all requests together, in one thread.

    Attributes:
        images: accepted and not yet answered.
        bytes: of their bodies.
        seconds: of a pass for one image, a moving average.
        passes: so far.
        passed: images of these.
        thread: what runs in it, runs between two batches.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Any]], Sequence[Any]],
        *,
        batch: int,
        latency: float,
        max_images: int,
        max_bytes: int,
    ) -> None:
        self.run, self.batch, self.latency = run, batch, latency
        self.max_images, self.max_bytes = max_images, max_bytes
        self.images = self.bytes = self.passes = self.passed = 0
        self.seconds = 0.0
        self.thread = ThreadPoolExecutor(1, "model")
        self._queue: asyncio.Queue[Waiting] = asyncio.Queue()

    @contextmanager
    def admit(self, images: int, size: int) -> Iterator[Callable[[int], None]]:
        """Room for a request of so many images and bytes at most, held until it is answered.

        Gives a function that takes the number of images it really has, which frees the rest.

        Raises:
            Busy: there is no room.
        """
        if self.images + images > self.max_images or self.bytes + size > self.max_bytes:
            raise Busy(max(1, math.ceil(self.images * self.seconds)))
        held = images
        self.images += images
        self.bytes += size

        def keep(number: int) -> None:
            nonlocal held
            self.images -= held - number
            held = number

        try:
            yield keep
        finally:
            self.images -= held
            self.bytes -= size

    async def __call__(self, item: Any) -> Any:
        """The result of `item`.

        Raises:
            Exception: what `run` gave in its place, or raised for the batch.
        """
        loop = asyncio.get_running_loop()
        waiting = Waiting(item, loop.time(), loop.create_future())
        self._queue.put_nowait(waiting)
        return await waiting.result

    async def serve(self) -> None:
        """Runs batches, until it is cancelled."""
        while True:
            batch = [one for one in await self._collect() if not one.result.done()]
            if batch:
                await self._answer(batch)

    async def _collect(self) -> list[Waiting]:
        """Requests that are there, and, while others are under way, those that come in time."""
        batch = [await self._queue.get()]
        while len(batch) < self.batch:
            if self._queue.empty() and self.images <= len(batch):
                break
            try:
                async with asyncio.timeout_at(batch[0].arrived + self.latency):
                    batch.append(await self._queue.get())
            except TimeoutError:
                break
        return batch

    async def _answer(self, batch: list[Waiting]) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            items = [waiting.item for waiting in batch]
            results = await loop.run_in_executor(self.thread, self.run, items)
        except Exception as error:
            results = [error] * len(batch)
        self._count(loop.time() - started, len(batch))
        for waiting, result in zip(batch, results, strict=True):
            if waiting.result.done():  # nobody waits for it any more
                continue
            if isinstance(result, Exception):
                waiting.result.set_exception(result)
            else:
                waiting.result.set_result(result)

    def _count(self, seconds: float, images: int) -> None:
        self.passes += 1
        self.passed += images
        each = seconds / images
        self.seconds += (each - self.seconds) * (SMOOTHING if self.seconds else 1)
