"""Checks of a run's images before it trains."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from vpt.config import DataConfig, DecisionConfig, RunConfig
from vpt.data.duplicates import Duplicate, find_duplicates
from vpt.data.fewshot import Split
from vpt.data.pixels import Range, choose_range
from vpt.data.sources import Samples, Source
from vpt.data.survey import Survey, check_images
from vpt.errors import InputError
from vpt.evaluation.decision import check_decision
from vpt.progress import Log


def check_split_images(split: Split) -> Survey:
    """Decode every image file of the split once, so that a broken one is said before training."""
    parts = [p for p in (split.train, split.val, split.calibration, split.test) if p is not None]
    files = [path for part in parts for path in part.images if isinstance(path, Path)]
    return check_images(files, split.train.windows)


def find_grey_range(survey: Survey, images: Iterable[Any], log: Log) -> Range | None:
    """One range for all grey images with more than 8 bits, chosen from the training images.

    Raises:
        InputError: they have at most 8 bits, but others have values that need a range.
    """
    training = {path for path in images if isinstance(path, Path)}
    grey = choose_range(values for path, values in survey.grey.items() if path in training)
    if grey:
        log(f"grey images: values from {grey[0]:g} to {grey[1]:g}, as the training images have")
    survey.through(grey, log).check()
    return grey


def calibration_samples(config: RunConfig, source: Source, split: Split) -> Samples | None:
    """The calibration images, or without any the validation images, if a decision is wanted."""
    if config.decision == DecisionConfig():
        return None
    samples = split.val if split.calibration is None else split.calibration
    if samples is None:
        raise InputError(
            f"decision: {source.name} has no calibration and no validation images: give "
            "data.calibration=PROPORTION, or add a val part"
        )
    labels = torch.from_numpy(samples.labels)
    check_decision(config.decision, samples.target, labels, source.class_names)
    return samples


def search_duplicates(
    config: RunConfig, split: Split, grey: Range | None, log: Log
) -> list[Duplicate]:
    """Test images that look like training images, unless `data.duplicates` is ignore."""
    wanted = config.data.duplicates or ("stop" if split.train.patients else "warn")
    if wanted == "ignore":
        return []
    pairs = find_duplicates(split, grey)
    if pairs:
        parts = "test and calibration" if split.calibration else "test"
        number = len(split.test) + len(split.calibration or ())
        found = (
            f"{len(pairs)} of {number} {parts} images look like a training image, first "
            f"{pairs[0].test} like {pairs[0].train}"
        )
        if wanted == "stop":
            for pair in pairs:
                log(f"{pair.test} looks like {pair.train}")
            raise InputError(f"{found}: remove them, or give data.duplicates=warn")
        log(f"{found}: see duplicates.jsonl in the run folder")
    return pairs


def describe(source: Source, split: Split, data: DataConfig) -> str:
    """The split in words."""
    shots = f", shots of {data.shots} {data.shots_per}s a class" if data.shots else ""
    patients = f" from {len(set(split.train.patients))} patients" if split.train.patients else ""
    held = f", {len(split.calibration)} calibration" if split.calibration else ""
    val = f", {len(split.val)} validation" if split.val is not None else ""
    return (
        f"{source.name}{shots}, {len(source.class_names)} classes{source.target.wording}, "
        f"{len(split.train)} training"
        f"{patients}{val}{held}, {len(split.test)} test images, split {split.hash}"
    )
