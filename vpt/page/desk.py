"""The page's work, without the page: predicts with a task's prompt, compares, trains."""

import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from vpt import artifact
from vpt.backbones.base import Backbone
from vpt.config import load_run
from vpt.errors import InputError
from vpt.evaluation.decision import Decision
from vpt.explain import draw_saliency, saliency
from vpt.folder import RunFolder
from vpt.methods import attach
from vpt.run import NOTICE, run
from vpt.serve.bank import PromptBank, Task
from vpt.serve.tasks import Tasks
from vpt.serve.uploads import Refused, read_upload

ZERO_SHOT = "zero-shot"
LEAST = 2  # images a class: one trains, one tests


class Shown(NamedTuple):
    """A task's prediction on an image."""

    probabilities: dict[str, float]
    verdict: str  # in Markdown
    heat: Image.Image
    facts: str  # in Markdown


class Desk:
    """Tasks of a folder on one backbone.

    Attributes:
        folder: holds NAME.safetensors of each task; gets those that are trained here.
        scratch: for what is needed while one trains; emptied after.
        refused: tasks that can't be taken, and why.
    """

    def __init__(self, folder: Path, scratch: Path, backbone: Backbone) -> None:
        self.folder, self.scratch, self.backbone = folder, scratch, backbone
        self.bank = PromptBank(backbone)
        self._tasks = Tasks(folder, self.bank)
        self.refused = self._tasks.reload()["refused"]

    @property
    def names(self) -> list[str]:
        """Tasks, sorted."""
        return sorted(self.bank)

    def others(self, name: str) -> list[str]:
        """Alternatives to `name`: other tasks, and on a CLIP hand-written texts."""
        zero_shot = [ZERO_SHOT] if hasattr(self.backbone, "encode_texts") else []
        return zero_shot + [other for other in self.names if other != name]

    def show(self, file: str | Path, name: str, other: str | None = None) -> Shown:
        """Prediction of `name`, or of `other` in its place, on an image file.

        Compared with `name`, zero-shot is of its class names.

        Raises:
            InputError: not an image.
        """
        task = self.bank.task(name if other in (None, ZERO_SHOT) else other)
        preprocess = self.backbone.preprocess
        pixels = self._read(file, task.metadata)
        images = preprocess.normalize(torch.from_numpy(pixels)).to(self.backbone.device)[None]
        if other == ZERO_SHOT:
            model = attach(self.backbone, "zero_shot", class_names=task.class_names).eval().fold()
            decision, logits, facts = Decision(), model(images)[0].detach().cpu(), "No prompt."
        else:
            decision, (logits, facts) = task.decision or Decision(), self._ask(task.name, images)
            model = artifact.load(self._path(task.name), self.backbone).fold()
        described = decision.describe(task.target, logits, task.class_names)
        best = int(logits.argmax())
        heat = _draw(pixels, saliency(model, images[0], best).cpu())
        return Shown(described["probabilities"], _verdict(task, decision, described), heat, facts)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _read(self, file: str | Path, metadata: Mapping[str, Any]) -> np.ndarray:
        """The cropped image in `file`, uint8 (H, W, 3)."""
        try:
            return read_upload(Path(file).read_bytes(), self.backbone.preprocess, metadata)
        except Refused as error:
            raise InputError(f"{Path(file).name}: {error.line}") from None

    def _ask(self, name: str, images: Tensor) -> tuple[Tensor, str]:
        """Logits (C,) of one image, and what the prompt weighs and its change took."""
        begin = time.perf_counter()
        self.bank.load(name)
        loaded = time.perf_counter()
        (logits,) = self.bank(images, [name])
        took = time.perf_counter() - loaded
        size = self._path(name).stat().st_size
        return logits.float().cpu(), (
            f"Prompt {size / 1000:,.0f} kB, ready in {1000 * (loaded - begin):.1f} ms; "
            f"image {1000 * took:.0f} ms."
        )

    def train(
        self, name: str, classes: Mapping[str, Sequence[str | Path]], say: Callable[[str], None]
    ) -> str:
        """Train a task on image files of each class and use it at once; returns what it reached.

        Of each class a quarter of the images, at least one, is kept to test it.

        Raises:
            InputError: a name that is taken or no name of a file; fewer than two classes, or images
                of a class; as `vpt.run.run`.
        """
        name = name.strip()
        for text in (name, *classes):
            if not re.fullmatch(r"[^\W_][^/\\\0\n]{0,60}", text) or text == ZERO_SHOT:
                raise InputError(f"{text!r}: give a short name that starts with a letter or digit")
        if name in self.bank:
            raise InputError(f"{name}: there is a prompt of this name: give another")
        if len(classes) < 2:
            raise InputError("add at least two classes, with images of each")
        fewest = min(classes, key=lambda each: len(classes[each]))
        count = len(classes[fewest])
        if count < LEAST:
            raise InputError(f"{fewest}: {count} images: give at least {LEAST} of each class")
        for file in chain.from_iterable(classes.values()):
            self._read(file, {})
        root = self.scratch / "images"
        try:
            for number, (label, files) in enumerate(classes.items()):
                (root / label).mkdir(parents=True)
                for place, file in enumerate(files):
                    shutil.copy(file, root / label / f"{number}-{place}{Path(file).suffix}")
            made_on = self.backbone.config
            keys = [f"backbone.name={made_on.name}", f"data.root={root}", "data.duplicates=ignore"]
            keys += [f"backbone.checkpoint={made_on.checkpoint}"] if made_on.checkpoint else []
            keys += [f"data.shots={count - max(1, count // 4)}", f"out={self.scratch / 'run'}"]
            config = load_run("auto", keys)
            result = run(config, log=say, progress=False)
            shutil.copy(RunFolder(config.out).prompt, self.folder / f".{name}.new")
            (self.folder / f".{name}.new").replace(self._path(name))
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)
        self._tasks.reload()
        right, tested = round(result["accuracy"] * result["num_test"]), result["num_test"]
        return (
            f"{result['method']}: {right} of {tested} images that did not train it are right. "
            f"With so few this says little."
        )


def _verdict(task: Task, decision: Decision, described: Mapping[str, Any]) -> str:
    lines = [f"**{described['class']}**" if "class" in described else ""]
    if described.get("refer"):
        lines.append("**refer**: too uncertain, a person should look")
    elif "refer" in described:
        lines.append("certain enough to decide")
    if "called" in described:
        lines.append(f"above their threshold: {', '.join(described['called']) or 'none'}")
    if "set" in described:
        lines.append(f"set: {', '.join(described['set']) or 'none'}")
    lines.append("calibrated" if decision.temperature != 1 else "not calibrated")
    if task.metadata.get("medical"):
        lines.append(f"**{NOTICE}**")
    return " · ".join(filter(None, lines))


def _draw(pixels: np.ndarray, heat: Tensor) -> Image.Image:
    figure = Figure(figsize=(3, 3))
    axes = figure.add_axes((0, 0, 1, 1))
    draw_saliency(axes, pixels, heat)
    axes.set_axis_off()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
