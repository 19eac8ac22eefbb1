"""Stages of a run on boxes."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from vpt.data.boxes import BoxData, BoxedImages, read_boxes
from vpt.dense.canvas import Canvas
from vpt.dense.config import DenseDataConfig, DetectConfig
from vpt.dense.detector import Detector, Objects
from vpt.dense.diagnose import diagnose
from vpt.dense.images import CanvasImages, Flip, MapSource
from vpt.dense.metrics import (
    choose_threshold,
    coco_detections,
    coco_truth,
    detection_metrics,
    require_coco,
)
from vpt.dense.pyramid import Maps
from vpt.dense.split import Split
from vpt.errors import InputError

# in a run folder: those of the test images, as COCO's results, which number the images from 1 in
# the order of `images` in the other file
DETECTIONS, TEST = "detections.json", "test.json"


class Detection:
    """Boxes: a Detector, average precision."""

    def read(self, data: DenseDataConfig) -> BoxData:
        """The data set; refuses before anything else what can't be measured in the end."""
        require_coco()
        return read_boxes(data.root, data.patients)

    def check(self, split: Split) -> None:
        """Refuse parts from which nothing can be learned, or of which nothing can be measured."""
        mends = {"train": "raise data.shots, or label more", "test": "label some"}
        for part, mend in mends.items():
            images = getattr(split, part)
            if not any(len(boxes) for boxes in images.boxes):
                raise InputError(f"no box in the {len(images)} images of the {part} part: {mend}")

    def describe(self, images: BoxedImages, class_names: list[str]) -> str:
        """The training images' objects in words."""
        counts = zip(class_names, images.class_counts(len(class_names)), strict=True)
        return "boxes to train on: " + ", ".join(f"{name} {count}" for name, count in counts)

    def diagnose(
        self, images: BoxedImages, canvas: Canvas, patch: int, class_names: list[str], fixed: bool
    ) -> tuple[dict[str, Any], list[str]]:
        """The data's diagnosis for result.json, and lines for the user."""
        found, lines = diagnose(images, canvas, patch, class_names, fixed)
        return {"matchable": found}, lines

    def model(self, maps: Maps, class_names: list[str], config: DetectConfig) -> Detector:
        """The model to train."""
        return Detector(maps, class_names, config.detect)

    def targets(
        self, images: BoxedImages, canvas: Canvas, device: torch.device
    ) -> Callable[[int, Flip], Objects]:
        """Index and flip → the objects on the canvas."""

        def objects(index: int, flip: Flip) -> Objects:
            boxes = images.boxes[index] * canvas.scale(images.sizes[index])
            if flip.horizontal:
                boxes = (canvas.width, 0, canvas.width, 0) - boxes * (1, -1, 1, -1)
                boxes = boxes[:, [2, 1, 0, 3]]
            if flip.vertical:
                boxes = (0, canvas.height, 0, canvas.height) - boxes * (-1, 1, -1, 1)
                boxes = boxes[:, [0, 3, 2, 1]]
            labels = torch.from_numpy(images.labels[index]).to(device)
            rows = torch.from_numpy(boxes.astype(np.float32)).to(device)
            return Objects(rows, labels, torch.ones(len(labels)))

        return objects

    def outputs(self, model: Detector, images: CanvasImages, truth: BoxedImages) -> list[Objects]:
        """Detections in the images, in their own pixels."""
        batches = MapSource(model.maps, images).all()
        found = [each for maps in batches for each in model.detect(maps)]
        pairs = zip(found, truth.sizes, strict=True)
        return [to_image(each, images.canvas, size) for each, size in pairs]

    def decide(self, model: Detector, found: list[Objects], truth: BoxedImages) -> None:
        """Choose the model's threshold on validation images."""
        model.threshold = choose_threshold(found, truth, len(model.class_names))

    def metrics(self, model: Detector, found: list[Objects], truth: BoxedImages) -> dict[str, Any]:
        """Metrics of result.json."""
        most = model.options.max_detections
        return detection_metrics(found, truth, model.class_names, model.threshold, most)

    def files(self, model: Detector, found: list[Objects], truth: BoxedImages) -> dict[str, bytes]:
        """Further files of a run folder."""
        detections = coco_detections(found, range(len(truth)))
        contents = {DETECTIONS: detections, TEST: coco_truth(truth, model.class_names)}
        return {name: json.dumps(content).encode() for name, content in contents.items()}


def to_image(objects: Objects, canvas: Canvas, size: tuple[int, int]) -> Objects:
    """Detections on the canvas as those in an image of `size`; none in the canvas's rest."""
    width, height = size
    limit = torch.tensor([width, height, width, height], dtype=torch.float32)
    boxes = (objects.boxes.cpu() / torch.from_numpy(canvas.scale(size))).clamp(min=0)
    boxes = torch.minimum(boxes, limit)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return Objects(boxes[kept], objects.labels.cpu()[kept], objects.scores.cpu()[kept])
