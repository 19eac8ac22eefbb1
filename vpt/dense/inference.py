"""Evaluate an artefact of boxes or masks on labelled images, or predict new ones."""

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image

from vpt import artifact, backbones
from vpt.config import BackboneConfig, Strict
from vpt.data.images import read_image
from vpt.dense import artefact
from vpt.dense.canvas import Canvas
from vpt.dense.config import DenseDataConfig, SegmentDataConfig
from vpt.dense.detection import to_image
from vpt.dense.detector import Detector, Objects
from vpt.dense.draw import draw_masks, draw_objects, save_png
from vpt.dense.images import CanvasImages
from vpt.dense.kinds import KINDS
from vpt.dense.metrics import coco_detections
from vpt.dense.segmentation import to_image as to_masks
from vpt.dense.segmenter import Segmenter
from vpt.dense.split import split_images
from vpt.errors import InputError
from vpt.files import write_atomically
from vpt.folder import RunFolder
from vpt.inference import survey
from vpt.progress import Log
from vpt.run import NOTICE
from vpt.settings import apply_overrides, read_yaml, validate


class DetectSettings(Strict):
    """Keys of `vpt eval` of a detector."""

    data: DenseDataConfig
    backbone: BackboneConfig


class SegmentSettings(Strict):
    """Keys of `vpt eval` of a segmenter."""

    data: SegmentDataConfig
    backbone: BackboneConfig


def evaluate(
    path: Path, overrides: Sequence[str] = (), *, every: bool = False, log: Log = print
) -> dict[str, Any]:
    """Metrics of the artefact at `path` on the test images of the split it was trained with.

    Args:
        path: the artefact. Its data root comes from `overrides` or the run's config.yaml beside it.
        overrides: `data.…=` and `backbone.…=`.
        every: test on all images of `data.root`, which must hold none of the training images.
        log: takes lines for the user.

    Raises:
        InputError: as `artefact.load`; data that are not the split the artefact was trained with.
    """
    metadata = artifact.read_metadata(path)
    beside = RunFolder(path.parent).config
    root = OmegaConf.select(read_yaml(beside), "data.root") if beside.is_file() else None
    given = {
        "data": {**metadata["data"], **({"root": root} if root else {})},
        "backbone": artifact.backbone_settings(metadata),
    }
    keys = DetectSettings if metadata["kind"] == "detect" else SegmentSettings
    settings = validate(keys, apply_overrides(keys, given, overrides), where=str(path))
    kind = KINDS[metadata["kind"]]
    source = kind.read(settings.data)
    if source.class_names != metadata["class_names"]:
        raise InputError(
            f"{path}: its classes are {', '.join(metadata['class_names'])}, but the data's "
            f"{', '.join(source.class_names)}: give the same"
        )
    try:
        split = split_images(source.parts, settings.data.shots, settings.data.seed)
    except InputError:  # too few to have been trained on
        split = None
    same = split is not None and split.hash == metadata["split_hash"]
    if every and same:
        raise InputError(f"{path}: some of these images trained it: drop --all")
    if not (every or same):
        raise InputError(
            f"{path}: not the split that it was trained with: give the same data, shots and seed, "
            "or --all if none of these images was trained on"
        )
    test = functools.reduce(lambda one, other: one.join(other), source.parts.values())
    test = test if every else split.test
    for line in source.notes:
        log(f"data: {line}")
    log(f"testing on {len(test)} images")
    backbone = backbones.load(settings.backbone.name, settings.backbone.checkpoint)
    model = artefact.load(path, backbone).fold()
    found = kind.outputs(model, _images(model, test.images), test)
    notice = {"notice": NOTICE} if metadata.get("medical") else {}
    return {**kind.metrics(model, found, test), **notice}


def predict(
    path: Path,
    images: Sequence[Path],
    out: Path,
    checkpoint: str | None = None,
    log: Log = print,
) -> Iterator[dict[str, Any]]:
    """Objects or masks found in each image file, in order; folders are searched.

    `out` gets each image with it drawn, as PNG. Of boxes, those at or above the artefact's
    threshold; when all are done, `out` has `detections.json`, in COCO's form with scores. Of masks,
    a PNG of their numbers each.

    Args:
        path: the artefact.
        images: files and folders.
        out: a folder.
        checkpoint: the backbone's file of weights, where it is not at its place in training.
        log: takes lines for the user.

    Raises:
        InputError: a folder without images; at the end, files that are missing or no image.
    """
    metadata = artifact.read_metadata(path)
    found = survey(images, metadata, log)
    name = metadata["backbone"]["name"]
    backbone = backbones.load(name, checkpoint) if name and checkpoint else None
    model = artefact.load(path, backbone).fold()
    predictions = _boxes if isinstance(model, Detector) else _masks
    for prediction in predictions(model, found.readable, out):
        yield prediction | ({"notice": NOTICE} if metadata.get("medical") else {})
    found.check()


@torch.no_grad()
def detect(model: Detector, source: CanvasImages, index: int, size: tuple[int, int]) -> Objects:
    """Objects at or above the threshold in one image of `size`, in its pixels."""
    objects = to_image(model(source.batch([index]))[0], source.canvas, size)
    return Objects(*(part[objects.scores >= model.threshold] for part in objects))


def _images(model: Detector | Segmenter, files: Sequence[Path]) -> CanvasImages:
    height, width = model.maps.size
    return CanvasImages(files, Canvas(width, height), model.maps.method.backbone)


def _opened(source: CanvasImages, out: Path) -> Iterator[tuple[int, Path, Image.Image, Path]]:
    """Number, file and pixels of each image, and where it is drawn."""
    grey = source.backbone.preprocess.grey_range
    for index, file in enumerate(source.files):
        yield index, file, read_image(file, grey=grey), out / f"{index + 1:04}-{file.stem}.png"


def _boxes(model: Detector, files: Sequence[Path], out: Path) -> Iterator[dict[str, Any]]:
    source, names = _images(model, files), model.class_names
    kept, described = [], []
    for index, file, image, drawn in _opened(source, out):
        shown = detect(model, source, index, image.size)
        kept.append(shown)
        width, height = image.size
        described.append(
            {"id": index + 1, "file_name": str(file), "width": width, "height": height}
        )
        draw_objects(image, shown, names, drawn)
        rows = zip(*(part.tolist() for part in shown), strict=True)
        objects = [
            {"class": names[label], "score": score, "box": box} for box, label, score in rows
        ]
        yield {"path": str(file), "objects": objects, "drawn": str(drawn)}
    rows = coco_detections(kept, range(len(kept)))
    content = {
        "images": described,
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, 1)],
        "annotations": [
            {"id": number, **row, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
            for number, row in enumerate(rows, 1)
        ],
    }
    write_atomically(out / "detections.json", json.dumps(content, indent=1).encode())


@torch.no_grad()
def _masks(model: Segmenter, files: Sequence[Path], out: Path) -> Iterator[dict[str, Any]]:
    source = _images(model, files)
    for index, file, image, drawn in _opened(source, out):
        logits = model(source.batch([index]))[0]
        masked = to_masks(model, logits, source.canvas, image.size)
        numbers = masked.classes if masked.numbers is None else masked.numbers
        mask = drawn.with_name(f"{drawn.stem}-mask.png")
        few = numbers.max() < 256
        save_png(Image.fromarray(numbers.astype(np.uint8 if few else np.uint16)), mask)
        draw_masks(image, numbers, drawn)
        proportions = {
            name: float((masked.classes == number).mean())
            for number, name in enumerate(model.class_names, 1)
        }
        counted = {"count": len(masked.scores)} if model.instances else {}
        yield {
            "path": str(file),
            "proportions": proportions,
            **counted,
            "mask": str(mask),
            "drawn": str(drawn),
        }
