"""Metrics of detections: COCO's by faster-coco-eval; free response, counts, and intervals."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from vpt.data.boxes import BoxedImages
from vpt.dense.detector import Objects
from vpt.errors import InputError
from vpt.evaluation.bootstrap import intervals

IOUS = np.linspace(0.5, 0.95, 10)
FALSE_POSITIVES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)  # an image (LUNA16)
_RECALLS = torch.linspace(0, 1, 101, dtype=torch.float64)
_SIZES = ("all", "small", "medium", "large")  # COCO's: below 32², below 96², above, in pixels


class Matches(NamedTuple):
    """Detections of one class in all images, best first.

    Attributes:
        scores: (D,).
        image: (D,), its number.
        hit: (10, D), True where it found an object at each of IOUS.
        positives: (images,), objects of the class in each image.
    """

    scores: Tensor
    image: Tensor
    hit: Tensor
    positives: Tensor


def require_coco() -> Any:
    """The package faster_coco_eval.

    Raises:
        InputError: it is not installed.
    """
    try:
        import faster_coco_eval
    except ImportError:
        raise InputError(
            "metrics of boxes need faster-coco-eval: pip install 'visual-prompt-tuning[dense]'"
        ) from None
    return faster_coco_eval


def detection_metrics(
    found: Sequence[Objects],
    truth: BoxedImages,
    class_names: Sequence[str],
    threshold: float,
    max_detections: int,
) -> dict[str, Any]:
    """Metrics of detections in the images of `truth`, in their pixels; None where undefined.

    `ap` (IoU .5 to .95), `ap50`, `ap75`, `ar` and `by_size` are COCO's, `per_class` has them and,
    of boxes at or above `threshold`, precision, recall, F1 at IoU .5 and the counting error, the
    mean absolute difference of an image's counts. `froc` is the sensitivity at so many false
    positives an image, the mean over classes. 95 % intervals resample patients, else images.
    """
    matches = match(found, truth, len(class_names))
    count = len(truth)
    coco = _coco(found, truth, class_names, max_detections)
    once = torch.ones(1, count, dtype=torch.float64)
    froc = torch.stack([sensitivities(each, once)[0] for each in matches]).nanmean(0)

    def statistic(weights: Tensor) -> Tensor:
        weights = weights.double()
        aps = torch.stack([average_precisions(each, weights) for each in matches])  # (C, R, T)
        curves = torch.stack([sensitivities(each, weights) for each in matches])
        columns = aps.mean(2).nanmean(0), aps[:, :, 0].nanmean(0), curves.nanmean(0).mean(1)
        return torch.stack([*columns, *aps[:, :, 0]], 1)

    bounds = intervals(statistic, count, truth.patients)
    per_class = {}
    counting = []
    for label, (name, each) in enumerate(zip(class_names, matches, strict=True)):
        shown = each.scores >= threshold
        hits, number = int(each.hit[0][shown].sum()), int(each.positives.sum())
        counts = torch.bincount(each.image[shown], minlength=count)
        error = (counts - each.positives).abs().double().mean().item()
        counting.append(error)
        per_class[name] = {
            "ap": coco["classes"][label][0],
            "ap50": coco["classes"][label][1],
            "ap50_interval": bounds[3 + label],
            "precision": _ratio(hits, int(shown.sum())),
            "recall": _ratio(hits, number),
            "f1": _ratio(2 * hits, int(shown.sum()) + number),
            "counting_error": error,
            "objects": number,
        }
    names = [f"{value:g}" for value in FALSE_POSITIVES]
    return {
        "ap": coco["ap"],
        "ap_interval": bounds[0],
        "ap50": coco["ap50"],
        "ap50_interval": bounds[1],
        "ap75": coco["ap75"],
        "ar": coco["ar"],
        "by_size": coco["sizes"],
        "froc": {**dict(zip(names, froc.tolist(), strict=True)), "mean": froc.mean().item()},
        "froc_interval": bounds[2],
        "counting_error": sum(counting) / len(counting),
        "threshold": threshold,
        "per_class": per_class,
        "num_test": count,
    }


def choose_threshold(found: Sequence[Objects], truth: BoxedImages, num_classes: int) -> float:
    """The score, in hundredths, with the best mean F1 of the classes at IoU .5; .5 without any."""
    best = (0.0, 0.5)
    matches = match(found, truth, num_classes)
    for threshold in np.arange(0.02, 1, 0.01).round(2).tolist():
        scores = []
        for each in matches:
            shown = each.scores >= threshold
            total = int(shown.sum() + each.positives.sum())
            if each.positives.sum():
                scores.append(2 * int(each.hit[0][shown].sum()) / total)
        if scores and np.mean(scores) > best[0]:
            best = (float(np.mean(scores)), threshold)
    return best[1]


def match(found: Sequence[Objects], truth: BoxedImages, num_classes: int) -> list[Matches]:
    """Detections paired with objects, class by class, as COCO does.

    Best first, each takes the free object of its class that it overlaps most, at least by the IoU.
    """
    parts: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(num_classes)]
    positives = torch.zeros(num_classes, len(truth), dtype=torch.int64)
    for number, objects in enumerate(found):
        boxes, labels = torch.from_numpy(truth.boxes[number]), truth.labels[number]
        scores, order = objects.scores.cpu().double().sort(descending=True, stable=True)
        own, kinds = objects.boxes.cpu()[order], objects.labels.cpu()[order]
        for label in range(num_classes):
            chosen = kinds == label
            objects_of = boxes[torch.from_numpy(labels == label)]
            positives[label, number] = len(objects_of)
            hit = pair(box_iou(own[chosen], objects_of).numpy())
            images = torch.full((int(chosen.sum()),), number)
            parts[label].append((scores[chosen], images, torch.from_numpy(hit)))
    matches = []
    for label, rows in enumerate(parts):
        scores, image = (torch.cat([row[i] for row in rows]) for i in (0, 1))
        hit = torch.cat([row[2] for row in rows], 1)
        order = scores.sort(descending=True, stable=True).indices
        matches.append(Matches(scores[order], image[order], hit[:, order], positives[label]))
    return matches


def pair(overlaps: np.ndarray) -> np.ndarray:
    """Hits (10, D) of IoUs (D, objects), detections best first."""
    detections, objects = overlaps.shape
    hit = np.zeros((len(IOUS), detections), bool)
    free = np.ones((len(IOUS), objects), bool)
    if objects:
        rows = np.arange(len(IOUS))
        for number, row in enumerate(overlaps):
            best = np.where(free, row, -1)
            chosen = best.argmax(1)
            hit[:, number] = best[rows, chosen] >= IOUS
            free[rows, chosen] &= ~hit[:, number]
    return hit


def average_precisions(matches: Matches, weights: Tensor) -> Tensor:
    """Average precision (R, 10) at each IoU, images drawn as often as weights (R, images) say.

    At 101 recalls, of the best precision at that recall or above; NaN without objects.
    """
    drawn = weights[:, matches.image]
    total = (weights * matches.positives).sum(1, keepdim=True)
    seen = drawn.cumsum(1).clamp(min=1e-9)
    found = []
    for hit in matches.hit:
        hits = (drawn * hit).cumsum(1)
        if not hits.shape[1]:
            found.append(torch.where(total[:, 0] > 0, 0.0, torch.nan).double())
            continue
        precision = (hits / seen).flip(1).cummax(1).values.flip(1)
        recall = (hits / total.clamp(min=1e-9)).contiguous()
        place = torch.searchsorted(recall, _RECALLS.expand(len(recall), -1).contiguous() - 1e-12)
        reached = place < recall.shape[1]
        values = precision.gather(1, place.clamp(max=recall.shape[1] - 1)) * reached
        found.append(torch.where(total[:, 0] > 0, values.mean(1), torch.nan))
    return torch.stack(found, 1)


def sensitivities(matches: Matches, weights: Tensor) -> Tensor:
    """Sensitivity (R, 7) at IoU .5 where at most FALSE_POSITIVES an image are allowed."""
    drawn, hit = weights[:, matches.image], matches.hit[0]
    total = (weights * matches.positives).sum(1, keepdim=True)
    false = (drawn * ~hit).cumsum(1) / weights.sum(1, keepdim=True)
    hits = torch.nn.functional.pad((drawn * hit).cumsum(1), (1, 0))
    allowed = torch.tensor(FALSE_POSITIVES, dtype=torch.float64).expand(len(weights), -1)
    place = torch.searchsorted(false.contiguous(), allowed.contiguous() + 1e-12, right=True)
    return torch.where(total > 0, hits.gather(1, place) / total, torch.nan)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _coco(
    found: Sequence[Objects], truth: BoxedImages, class_names: Sequence[str], most: int
) -> dict[str, Any]:
    """AP, AP50, AP75, AR, AP by size, and (AP, AP50) by class, by faster-coco-eval."""
    package = require_coco()
    reference = package.COCO(coco_truth(truth, class_names))
    detections = coco_detections(found, range(len(truth)))
    if not detections:
        nothing = dict.fromkeys(_SIZES[1:])
        return {**dict.fromkeys(("ap", "ap50", "ap75", "ar"), 0.0), "sizes": nothing,
                "classes": [(0.0, 0.0)] * len(class_names)}  # fmt: skip
    judge = package.COCOeval_faster(reference, reference.loadRes(detections), "bbox")
    judge.params.maxDets = [1, 10, most]
    judge.evaluate()
    judge.accumulate()
    precision, recall = judge.eval["precision"], judge.eval["recall"]  # (T, R, C, sizes, 3)
    every = precision[:, :, :, 0, -1]
    sizes = {name: _mean(precision[:, :, :, i, -1]) for i, name in enumerate(_SIZES) if i}
    classes = [(_mean(every[:, :, c]), _mean(every[0, :, c])) for c in range(len(class_names))]
    return {
        "ap": _mean(every),
        "ap50": _mean(every[0]),
        "ap75": _mean(every[5]),
        "ar": _mean(recall[:, :, 0, -1]),
        "sizes": sizes,
        "classes": classes,
    }


def _mean(values: np.ndarray) -> float | None:
    known = np.asarray(values)[np.asarray(values) > -1]  # -1: no object of this kind
    return float(known.mean()) if known.size else None


def coco_truth(truth: BoxedImages, class_names: Sequence[str]) -> dict[str, Any]:
    """The images' objects as COCO's JSON has them; ids count from 1."""
    annotations = [
        {"image_id": number, "category_id": int(label) + 1, "bbox": _sides(box), "iscrowd": 0,
         "area": float((box[2] - box[0]) * (box[3] - box[1]))}
        for number, (boxes, labels) in enumerate(zip(truth.boxes, truth.labels, strict=True), 1)
        for box, label in zip(boxes, labels, strict=True)
    ]  # fmt: skip
    return {
        "info": {},
        "images": [
            {"id": number, "file_name": name, "width": size[0], "height": size[1]}
            for number, (name, size) in enumerate(zip(truth.names, truth.sizes, strict=True), 1)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(class_names, 1)],
        "annotations": [{"id": i, **each} for i, each in enumerate(annotations, 1)],
    }


def coco_detections(found: Sequence[Objects], images: Sequence[int]) -> list[dict[str, Any]]:
    """Detections as COCO's results have them; the ids of images and classes count from 1."""
    return [
        {"image_id": number + 1, "category_id": int(label) + 1, "bbox": _sides(box),
         "score": float(score)}
        for number, objects in zip(images, found, strict=True)
        for box, label, score in zip(*(part.cpu().numpy() for part in objects), strict=True)
    ]  # fmt: skip


def _sides(box: np.ndarray) -> list[float]:
    left, top, right, bottom = (float(value) for value in box)
    return [left, top, right - left, bottom - top]
