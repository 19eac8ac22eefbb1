"""Evaluate an artefact of boxes on labelled images, or predict new ones."""

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vpt import artifact, backbones
from vpt.config import BackboneConfig, Strict, validate
from vpt.data.images import read_image
from vpt.dense import artefact
from vpt.dense.canvas import Canvas
from vpt.dense.config import DenseDataConfig
from vpt.dense.detection import Detection, to_image
from vpt.dense.detector import Detector, Objects
from vpt.dense.draw import draw_objects
from vpt.dense.images import CanvasImages
from vpt.dense.metrics import coco_detections
from vpt.dense.split import split_images
from vpt.errors import InputError
from vpt.files import write_atomically
from vpt.folder import RunFolder
from vpt.inference import survey
from vpt.progress import Log
from vpt.run import NOTICE
from vpt.settings import apply_overrides, read_yaml


class Settings(Strict):
    """Keys of `vpt eval`."""

    data: DenseDataConfig
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
    settings = {
        "data": {**metadata["data"], **({"root": root} if root else {})},
        "backbone": artifact.backbone_settings(metadata),
    }
    settings = validate(Settings, apply_overrides(Settings, settings, overrides), where=str(path))
    kind = Detection()
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
    if every == same:
        raise InputError(
            f"{path}: "
            + ("some of these images trained it: drop --all" if every else
               "not the split that it was trained with: give the same data, shots and seed, or "
               "--all if none of these images was trained on")
        )  # fmt: skip
    test = functools.reduce(lambda one, other: one.join(other), source.parts.values())
    test = test if every else split.test
    for line in source.notes:
        log(f"data: {line}")
    log(f"testing on {len(test)} images")
    model = artefact.load(
        path, backbones.load(settings.backbone.name, settings.backbone.checkpoint)
    )
    model = model.fold()
    images = CanvasImages(test.images, canvas_of(model), model.maps.method.backbone)
    metrics = kind.metrics(model, kind.outputs(model, images, test), test)
    return {**metrics, **({"notice": NOTICE} if metadata.get("medical") else {})}


def canvas_of(model: Detector) -> Canvas:
    """The canvas of the model's images."""
    height, width = model.maps.size
    return Canvas(width, height)


def predict(
    path: Path,
    images: Sequence[Path],
    out: Path,
    checkpoint: str | None = None,
    log: Log = print,
) -> Iterator[dict[str, Any]]:
    """The objects found in each image file, in order; folders are searched.

    Those at or above the artefact's threshold. When all are done, `out` holds `detections.json`,
    in COCO's form with scores, and each image with its boxes drawn, as PNG.

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
    files, names = found.readable, model.class_names
    source = CanvasImages(files, canvas_of(model), model.maps.method.backbone)
    notice = {"notice": NOTICE} if metadata.get("medical") else {}
    grey = metadata["preprocess"].get("grey_range")
    kept, sizes = [], []
    for index, file in enumerate(files):
        image = read_image(file, grey=tuple(grey) if grey else None)
        objects = to_image(model(source.batch([index]))[0], source.canvas, image.size)
        shown = Objects(*(part[objects.scores >= model.threshold] for part in objects))
        kept.append(shown)
        sizes.append(image.size)
        drawn = out / f"{index + 1:04}-{file.stem}.png"
        draw_objects(image, shown, names, drawn)
        rows = zip(*(part.tolist() for part in shown), strict=True)
        yield {
            "path": str(file),
            "objects": [
                {"class": names[label], "score": score, "box": box} for box, label, score in rows
            ],
            "drawn": str(drawn),
            **notice,
        }
    content = _coco(files, sizes, names, kept)
    write_atomically(out / "detections.json", json.dumps(content, indent=1).encode())
    found.check()


def _coco(
    files: Sequence[Path],
    sizes: Sequence[tuple[int, int]],
    names: Sequence[str],
    found: list[Objects],
) -> dict[str, Any]:
    rows = coco_detections(found, range(len(files)))
    return {
        "images": [
            {"id": number, "file_name": str(file), "width": size[0], "height": size[1]}
            for number, (file, size) in enumerate(zip(files, sizes, strict=True), 1)
        ],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, 1)],
        "annotations": [
            {"id": number, **row, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
            for number, row in enumerate(rows, 1)
        ],
    }
