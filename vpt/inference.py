"""Evaluate an artefact on labelled images, or predict new ones."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from vpt import artifact, backbones
from vpt.config import BackboneConfig, DataConfig, Strict
from vpt.data.fewshot import absent_classes, split_data
from vpt.data.search import list_images
from vpt.data.sources import Samples, Source, open_source
from vpt.data.survey import Survey, survey_images
from vpt.errors import InputError
from vpt.evaluation.decision import Decision, resampled_metrics
from vpt.evaluation.evaluate import outputs
from vpt.folder import RunFolder
from vpt.methods import Method
from vpt.new_classes import evaluate_on
from vpt.progress import Log
from vpt.run import NOTICE
from vpt.settings import apply_overrides, override, read_yaml, validate


class Settings(Strict):
    """Keys of `vpt eval`."""

    data: DataConfig
    backbone: BackboneConfig


def evaluate(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    every: bool = False,
    other_classes: bool = False,
    log: Log = print,
) -> dict[str, Any]:
    """Metrics of the artefact at `path` on the held-out images of the split it was trained with.

    Args:
        path: the artefact. Its data root comes from `overrides` or the run's config.yaml beside it.
        overrides: `data.…=` and `backbone.…=`.
        every: test on all images of `data.root`, which must hold none of the training images.
        other_classes: on the classes of the data that `overrides` mean: see `evaluate_on`.
        log: takes lines for the user.

    Raises:
        InputError: as `artifact.load`; data that is not the split the artefact was trained with.
    """
    _, metadata = artifact.read(path)
    beside = RunFolder(path.parent).config
    root = OmegaConf.select(read_yaml(beside), "data.root") if beside.is_file() else None
    own = {**metadata.get("data", {}), "root": root}
    if other_classes and any(key.startswith(("data.root=", "data.name=")) for key in overrides):
        own = {}  # another data set
    settings = {"data": own, "backbone": artifact.backbone_settings(metadata)}
    settings = validate(Settings, apply_overrides(Settings, settings, overrides), where=str(path))
    if other_classes:
        backbone = backbones.load(settings.backbone.name, settings.backbone.checkpoint)
        return evaluate_on(path, settings.data, backbone, log=log)
    whole = open_source(settings.data, among=metadata["class_names"] if every else None)
    source = whole.half(settings.data.class_half)
    differing = set(source.class_names) ^ set(metadata["class_names"])
    if differing:
        raise InputError(
            f"{path}: its classes are not the data's: {', '.join(sorted(differing)[:5])} in one of "
            "them only: give --other-classes to test it on classes that it was not trained on"
        )
    if source.class_names != metadata["class_names"]:
        raise InputError(
            f"{path}: the data has its classes in another order: "
            f"give {override('data.classes', metadata['class_names'])}"
        )
    tests = _test_samples(whole, settings.data, metadata, path, every)
    files = [path for test in tests for path in test.images if isinstance(path, Path)]
    grey = metadata["preprocess"].get("grey_range")
    survey_images(files, settings.data.windows).through(grey, log).check()
    for line in [*source.notes, *absent_classes(source, tests)]:
        log(f"data: {line}")
    log(f"testing on {sum(map(len, tests))} images")
    backbone = backbones.load(settings.backbone.name, settings.backbone.checkpoint)
    model = artifact.load(path, backbone)
    precision = metadata.get("precision", "auto")
    tested = [outputs(model, test, precision) for test in tests]
    logits, labels = (torch.cat(parts) for parts in zip(*tested, strict=True))
    patients = [patient for test in tests for patient in test.patients or []] or None
    decision = Decision(**metadata["decision"]) if "decision" in metadata else None
    names = source.class_names
    return {
        **model.target.metrics(logits, labels),
        **resampled_metrics(model.target, logits, labels, names, patients, decision),
        **({"notice": NOTICE} if metadata.get("medical") else {}),
    }


def _test_samples(
    source: Source, data: DataConfig, metadata: dict[str, Any], path: Path, every: bool
) -> list[Samples]:
    """The test part of the split that the artefact was trained with, or `every` image."""
    if every:
        _check_unseen(source, data, metadata, path)
        return list(source.half(data.class_half).parts.values())
    split = split_data(source, data)
    if split.hash != metadata.get("split_hash"):
        raise InputError(
            f"{path}: trained with split {metadata.get('split_hash')}, but this data gives "
            f"{split.hash}: give the same data, shots and seed, or --all if none of these "
            "images was trained on"
        )
    return [split.test]


def _check_unseen(source: Source, data: DataConfig, metadata: dict[str, Any], path: Path) -> None:
    """Refuses the very data that the artefact was trained on as new test data."""
    try:
        split = split_data(source, data)
    except InputError:  # too few images to have been trained on
        return
    if split.hash == metadata.get("split_hash"):
        raise InputError(
            f"{path}: {len(split.train)} of these images trained it: drop --all to test on the "
            f"other {len(split.test)}"
        )


def load(
    path: Path, checkpoint: str | None = None, class_names: Sequence[str] | None = None
) -> Method:
    """The model of the artefact at `path`, its backbone's weights from `checkpoint` where given.

    With `class_names` in place of its own, where they are.

    Raises:
        InputError: as `artifact.load`.
    """
    _, metadata = artifact.read(path)
    name = metadata["backbone"]["name"]
    backbone = backbones.load(name, checkpoint) if name and checkpoint else None
    return artifact.load(path, backbone, class_names)


def survey(paths: Sequence[Path], metadata: dict[str, Any], log: Log) -> Survey:
    """The image files that `paths` mean, for the artefact of `metadata`; says what is wrong.

    Raises:
        InputError: a folder without images, or no file that can be read.
    """
    found = survey_images(list_images(paths, log), metadata.get("data", {}).get("windows"))
    found = found.through(metadata["preprocess"].get("grey_range"), log)
    if not found.readable:
        found.check()
    for path, reason in found.broken.items():
        log(f"{path}: left out, it can't be read ({reason})")
    return found


def predict(
    path: Path,
    images: Sequence[Path],
    checkpoint: str | None = None,
    class_names: Sequence[str] | None = None,
    log: Log = print,
) -> Iterator[dict[str, Any]]:
    """The decision on each image file, in order; folders are searched. See `Decision.describe`.

    Files that cannot be read are left out, and named by an error after the last decision.

    Args:
        path: the artefact.
        images: files and folders.
        checkpoint: the backbone's file of weights, where it is not at its place in training.
        class_names: in place of those it was trained on.
        log: takes lines for the user.

    Raises:
        InputError: a folder without images; `class_names` of an artefact whose prompt belongs to
            its own; at the end, files that are missing or no image.
    """
    _, metadata = artifact.read(path)
    found = survey(images, metadata, log)
    files = found.readable
    model = load(path, checkpoint, class_names).fold()
    names = [str(file) for file in files]
    windows = metadata.get("data", {}).get("windows")
    labels = model.target.blank(len(files), len(model.class_names))
    samples = Samples(files, labels, names, windows=windows, target=model.target)
    logits, _ = outputs(model, samples, metadata.get("precision", "auto"))
    decision = Decision(**model.metadata.get("decision", {}))
    notice = {"notice": NOTICE} if metadata.get("medical") else {}
    for file, row in zip(files, logits, strict=True):
        yield {
            "path": str(file),
            **decision.describe(model.target, row, model.class_names),
            **notice,
        }
    found.check()
