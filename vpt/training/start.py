"""Where a run starts: at another artefact's prompts, chosen on the training images if need be."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpt.accelerator import Precision, make_accelerator
from vpt.artifact import start_from
from vpt.config import RunConfig
from vpt.data.sources import Samples
from vpt.digests import AUTO, sources, stored_digest
from vpt.errors import InputError
from vpt.evaluation.evaluate import test_loader
from vpt.methods import Method
from vpt.progress import Log
from vpt.training.features import image_features
from vpt.training.training_set import Batches

PENALTIES = tuple(10.0**power for power in range(-2, 7))  # of the ridge, features standardised
NONE = "none"  # the method's own start, among those to choose from


def start(model: Method, config: RunConfig, samples: Samples, log: Log) -> dict[str, Any]:
    """Start `model` from what `init_from` means; names the artefact for its own one's metadata.

    Returns:
        `sha256` of the artefact, None where none was chosen; where there was a choice also its
        `name`, and `held_out_accuracy` of each.

    Raises:
        InputError: as `artifact.start_from`; nothing to choose from, or no way to.
    """
    paths = sources(config.init_from)
    if not config.init_from.startswith(AUTO):
        start_from(model, paths[0])
        log(f"starts from {paths[0]}")
        return {"sha256": stored_digest(paths[0])}
    found = held_out(model, paths, samples, config.train.precision, log)
    best = choose(found)
    log(
        f"init_from: leave-one-out accuracy on {len(samples)} training images "
        + ", ".join(f"{name} {accuracy:.1%}" for name, (accuracy, _) in found.items())
        + f": starts from {best}"
    )
    path = None if best == NONE else _by_name(paths)[best]
    if path:
        start_from(model, path)
    digest = path and stored_digest(path)
    accuracies = {name: accuracy for name, (accuracy, _) in found.items()}
    return {"sha256": digest, "name": best, "held_out_accuracy": accuracies}


def choose(found: dict[str, tuple[float, float]]) -> str:
    """The name of the best of `held_out`, ties to the lower error, then to the first.

    With one image a class nothing can be held out, all accuracies are 0, and it is the first: none.
    """

    def rank(name: str) -> tuple[float, float]:
        accuracy, error = found[name]
        return accuracy, -error if accuracy else 0.0

    return max(found, key=rank)


def held_out(
    model: Method, paths: Sequence[Path], samples: Samples, precision: Precision, log: Log
) -> dict[str, tuple[float, float]]:
    """Leave-one-out accuracy and mean squared error of a ridge, by the artefact started from.

    The ridge is fitted to features of `samples`, the truth as 1 and -1: first of the model as it
    is, called none. Artefacts that do not fit are left out, with a line. It takes one forward pass
    of `samples` for each; `model` is left as it was.

    Raises:
        InputError: a method whose prompts change no image features; no artefact fits.
    """
    if model.frozen_features:
        raise InputError(
            f"init_from=auto: chooses by image features, which {model.name} leaves alone: name the "
            "artefact"
        )
    own = {name: tensor.clone() for name, tensor in model.artifact_tensors().items()}
    accelerator, batches = make_accelerator(precision), Batches(test_loader(model, samples))
    found = {}
    for name, path in {NONE: None, **_by_name(paths)}.items():
        try:
            if path:
                start_from(model, path)
        except InputError as error:
            log(f"init_from: left out: {error}")
            continue
        seen = image_features(model, batches, accelerator)
        truth = model.target.truth(seen.labels, len(model.class_names))
        logits, error = held_out_fit(seen.inputs, truth)
        correct = model.target.num_correct(logits, seen.labels)
        found[name] = (correct / len(samples)).item(), error
        model.load_state_dict(own, strict=False)
    if len(found) == 1:
        raise InputError("init_from=auto: no artefact of the folder fits: name one, or drop it")
    return found


def held_out_fit(features: Tensor, truth: Tensor) -> tuple[Tensor, float]:
    """Leave-one-out predictions of a ridge regression, and their error.

    Closed form (Allen 1974, PRESS): the residuals of the fit to all, over 1 - leverage. Of
    PENALTIES the one with the least squared error.

    Args:
        features: (N, dim); standardised here.
        truth: bool (N, C), fitted as 1 and -1, so that 0 is between.

    Returns:
        Fits (N, C), and their mean squared error.
    """
    x, y = features.double(), 2.0 * truth.double() - 1
    x = (x - x.mean(0)) / x.std(0, correction=0).clamp_min(1e-12)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    centred = y - y.mean(0)
    fits = []
    for penalty in PENALTIES:
        kept = s**2 / (s**2 + penalty)
        leverage = 1 / len(x) + (u**2 @ kept)[:, None]
        residuals = (centred - u @ (kept[:, None] * (u.T @ centred))) / (1 - leverage)
        fits.append((y - residuals, residuals.square().mean().item()))
    return min(fits, key=lambda fit: fit[1])


def _by_name(paths: Sequence[Path]) -> dict[str, Path]:
    """Artefacts called by their files, or those of runs by their folders."""
    return {p.parent.name if p.name == "prompt.safetensors" else p.stem: p for p in paths}
