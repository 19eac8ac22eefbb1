"""`vpt bench recipe`: seconds of the default recipe, and how many passes of its images they are."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from vpt.accelerator import make_accelerator
from vpt.backbones.base import Backbone
from vpt.config import load_run
from vpt.data.loaders import make_loader
from vpt.evaluation.evaluate import EVAL_BATCH
from vpt.run import Prepared, fit, prepare

PASSES = 3  # timed, of which the fastest counts


def bench(overrides: Sequence[str], shots: Sequence[int]) -> None:
    """Print the time of `vpt train vpt_deep` at each number of images a class.

    It is that of `fit`: neither are images read and checked in it nor the test images predicted.
    The unit is a forward pass of the training images through the backbone without prompts, decoded
    before, in this process. Beside it stand the passes by count, which no other process disturbs.
    """
    print(
        f"{'images':>6} {'classes':>7} {'pass':>9} {'training':>9} {'passes':>7} {'forward':>8} "
        f"{'backward':>8}  decided"
    )
    for count in shots:
        config = load_run("vpt_deep", [*overrides, f"data.shots={count}"])
        with TemporaryDirectory() as folder:
            config = config.model_copy(update={"out": Path(folder) / "run"})
            prepared = prepare(config, log=lambda line: None)
            unit = pass_seconds(prepared)
            count = count_images(prepared.model.backbone)
            begin = time.perf_counter()
            history = fit(prepared, log=lambda line: None, progress=False)
            seconds = time.perf_counter() - begin
        images, classes = len(prepared.split.train), len(prepared.source.class_names)
        decided = "trained" if "loss" in history[-1] else "left as it starts"
        print(
            f"{images:6} {classes:7} {unit:7.3f} s {seconds:7.1f} s {seconds / unit:7.0f} "
            f"{count['forward'] / images:8.0f} {count['backward'] / images:8.0f}  {decided}",
            flush=True,
        )


def count_images(backbone: Backbone) -> Counter[str]:
    """How many images go through `backbone` from now on, `forward` and `backward`."""
    count, pool = Counter(), backbone.pool

    def counted(tokens: torch.Tensor) -> torch.Tensor:
        count["forward"] += len(tokens)
        count["backward"] += len(tokens) * tokens.requires_grad
        return pool(tokens)

    backbone.pool = counted
    return count


@torch.no_grad()
def pass_seconds(prepared: Prepared) -> float:
    """Seconds of a pass of the decoded training images through the bare backbone."""
    accelerator = make_accelerator(prepared.config.train.precision)
    backbone = prepared.model.backbone.to(accelerator.device).eval()
    loader = make_loader(prepared.split.train, backbone.preprocess, EVAL_BATCH)
    seconds = []
    for _ in range(PASSES + 1):  # the first one decodes
        begin = time.perf_counter()
        for images, _ in loader:
            with accelerator.autocast():
                features = backbone(images.to(accelerator.device))
        features.sum().item()  # waits for a GPU
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])
