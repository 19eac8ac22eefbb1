"""From a request's body to the answers of a task: what the server does, without HTTP."""

import asyncio
import logging
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from starlette.datastructures import Headers
from torch import Tensor, nn

from vpt import backbones, methods
from vpt.dense.artefact import Model
from vpt.dense.detector import Detector
from vpt.errors import InputError, close
from vpt.serve.bank import PromptBank, Task
from vpt.serve.batching import Batcher
from vpt.serve.boxes import boxes_of, place
from vpt.serve.limits import Limits, Tenant
from vpt.serve.masks import masks_of, most_pixels, segments
from vpt.serve.tasks import Tasks
from vpt.serve.uploads import Refused, Upload, parse, read_upload

log = logging.getLogger("vpt.serve")


class Item(NamedTuple):
    """An image, and the task that it is for: a name, or class names for zero-shot."""

    task: str | tuple[str, ...]
    pixels: np.ndarray  # uint8 (H, W, 3)


class Service:
    """The tasks of `folder` on `backbone`, of which each request reads a body and gets answers.

    Attributes:
        ready: False once no more requests are wanted.
    """

    def __init__(self, folder: Path, backbone: nn.Module, limits: Limits) -> None:
        self.limits = limits
        self.backbone = backbones.adapt(backbone)
        most = limits.bank_mb and int(limits.bank_mb * 1e6)
        self.bank = PromptBank(self.backbone, max_bytes=most)
        self.preprocess = self.backbone.preprocess
        self.tasks = Tasks(folder, self.bank)
        self.loaded = self.tasks.reload()
        self.batcher = Batcher(
            self.run,
            batch=limits.batch,
            latency=limits.latency_ms / 1000,
            max_images=limits.queue,
            max_bytes=int(limits.bodies_mb * 1e6),
        )
        self.ready = True
        self._decoders = ThreadPoolExecutor(limits.decoders, "decoder")
        self._zero_shot = lru_cache(64)(self._attach_zero_shot)

    def find(self, name: str, tenant: Tenant) -> Task | Model:
        """The task called `name`, if `tenant` sees it; what finds boxes or masks is one by itself.

        Raises:
            Refused: there is none, or it is another tenant's, which reads the same.
        """
        own = self.names(tenant)
        if name not in own:
            known = close(name[:80], own)
            hint = f"; did you mean {known!r}?" if known else ""
            raise Refused(404, f"no such task{hint}")
        return self.tasks.dense.get(name) or self.bank.task(name)

    def version(self, name: str) -> str:
        """The first digits of the artefact's digest; empty for a task that is not there."""
        return self.tasks.versions.get(name, "")

    def names(self, tenant: Tenant) -> list[str]:
        """Tasks that `tenant` sees, sorted."""
        return sorted(filter(tenant.sees, self.tasks.versions))

    async def parse(self, body: bytes, headers: Headers) -> Upload:
        """The images in a body; see `uploads.parse`."""
        return await self._decode(parse, body, headers, self.limits.images)

    async def predict(
        self, upload: Upload, name: str, tenant: Tenant
    ) -> tuple[Task, str, list[Tensor]]:
        """A task, its version, and logits (C,) of each image, all of the same version.

        Images are read again where the task was replaced meanwhile: how they are read belongs to
        it.

        Raises:
            Refused: no such task (any more), or images that can't be read.
        """
        while True:
            version = self.version(name)  # before the task, see `Tasks.refresh`
            task = self.find(name, tenant)
            logits = await self._answers(upload, name, task.metadata)
            if all(found == version for found, _ in logits):
                return task, version, [row for _, row in logits]

    async def find_objects(
        self, upload: Upload, model: Model, threshold: float | None = None
    ) -> list[list[dict[str, Any]]]:
        """Each image's objects or segments, as Hugging Face's servers answer them.

        Images run one after the other, between the batches of classifiers.

        Raises:
            Refused: images that can't be read.
        """
        loop = asyncio.get_running_loop()
        found = []
        thread = self.batcher.thread
        for file in upload.files:
            if isinstance(model, Detector):
                placed = await self._decode(place, model, file)
                found.append(
                    await loop.run_in_executor(thread, boxes_of, model, *placed, threshold)
                )
            else:
                placed = await self._decode(place, model, file, most_pixels(model))
                masked = await loop.run_in_executor(thread, masks_of, model, *placed)
                found.append(await self._decode(segments, model, masked, threshold))
        return found

    async def zero_shot(self, upload: Upload, names: Sequence[str]) -> list[Tensor]:
        """Probabilities (C,) of each image, by texts of the class names.

        Raises:
            Refused: names that are not distinct texts, or too many; images that can't be read; a
                backbone without a text tower.
        """
        if len(names) > self.limits.classes:
            raise Refused(413, f"{len(names)} classes: give at most {self.limits.classes}")
        if any(not isinstance(name, str) or len(name) > 200 for name in names):
            raise Refused(400, "class names: give texts of at most 200 characters")
        try:
            logits = await self._answers(upload, tuple(names), {})
        except InputError as error:
            raise Refused(400, str(error)) from None
        return [row.softmax(-1) for _, row in logits]

    async def reload(self) -> dict[str, Any]:
        """Read the folder again, between two batches; see `Tasks.reload`."""
        loop = asyncio.get_running_loop()
        done = await loop.run_in_executor(self.batcher.thread, self.tasks.reload)
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in done.items())
        log.info("reload: %s", counts)
        return done

    async def warm_up(self) -> None:
        """Run one image, so that its seconds are known before the first request."""
        size = self.preprocess.image_size
        await self.batcher(Item((), np.zeros((size, size, 3), np.uint8)))

    async def _answers(
        self, upload: Upload, task: str | tuple[str, ...], metadata: dict[str, Any]
    ) -> list[tuple[str, Tensor]]:
        arrays = await self._decode(
            lambda: [read_upload(file, self.preprocess, metadata) for file in upload.files]
        )
        return await asyncio.gather(*(self.batcher(Item(task, array)) for array in arrays))

    async def _decode(self, function: Callable[..., Any], *arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoders, function, *arguments)

    @torch.no_grad()
    def run(self, items: Sequence[Item]) -> list[tuple[str, Tensor] | Exception]:
        """(version, logits (C,) in float32 on the CPU) of each item, or why there are none.

        An item that fails takes no other with it.
        """
        pixels = torch.from_numpy(np.stack([item.pixels for item in items]))
        images = self.preprocess.normalize(pixels).to(self.backbone.device)
        try:
            return self._run(items, images)
        except Exception as error:
            if len(items) > 1:
                return [self.run([item])[0] for item in items]
            return [self._retry(items[0], images, error)]

    def _retry(
        self, item: Item, images: Tensor, error: Exception
    ) -> tuple[str, Tensor] | Exception:
        """The result of an item whose artefact's file was exchanged before it was loaded."""
        if isinstance(error, InputError) and isinstance(item.task, str):
            try:
                if self.tasks.refresh(item.task):
                    return self._run([item], images)[0]
            except InputError as again:
                error = again
            log.error("%s", error)  # of the artefact, not the image
            return Refused(503, "the task's artefact can't be loaded", {"Retry-After": "60"})
        if not isinstance(error, Refused | InputError):
            note(error)
        return error

    def _run(self, items: Sequence[Item], images: Tensor) -> list[tuple[str, Tensor]]:
        results: dict[int, tuple[str, Tensor]] = {}
        named = [index for index, item in enumerate(items) if isinstance(item.task, str)]
        names = [items[index].task for index in named]
        if gone := set(names) - self.tasks.versions.keys():
            raise Refused(404, f"no task {', '.join(gone)} any more")
        if names:
            for index, name, row in zip(named, names, self.bank(images[named], names), strict=True):
                results[index] = self.tasks.versions[name], row.float().cpu()
        others = sorted(set(range(len(items))) - set(named))
        if others:
            features = self.backbone(images[others])
            for index, row in zip(others, features, strict=True):
                classes = items[index].task
                logits = self._zero_shot(classes).logits(row[None])[0] if classes else row
                results[index] = "", logits.float().cpu()
        return [results[index] for index in range(len(items))]

    def _attach_zero_shot(self, classes: tuple[str, ...]) -> methods.Method:
        return methods.attach(self.backbone, "zero_shot", class_names=classes).eval().fold()


def note(error: BaseException) -> None:
    """Log an error's type and place: its words may hold what was sent."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    log.error("%s at %s", type(error).__name__, place)
