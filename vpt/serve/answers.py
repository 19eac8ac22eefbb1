"""Predictions of a task as JSON values."""

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from vpt.dense.artefact import Model
from vpt.dense.detector import Detector
from vpt.dense.model import Dense
from vpt.evaluation.decision import Decision
from vpt.run import NOTICE
from vpt.serve.bank import Task
from vpt.serve.boxes import Found
from vpt.serve.masks import Segment
from vpt.serve.uploads import Refused

TOP = 5  # classes that Hugging Face's servers answer


class Label(BaseModel):
    """A class and its probability, as Hugging Face's image classification answers it."""

    label: str
    score: float


class Prediction(BaseModel):
    """The decision on one image; further keys as `vpt predict --json` prints them."""

    model_config = ConfigDict(extra="allow")
    predictions: list[Label]
    probabilities: dict[str, float]
    set: list[str] | None = None
    refer: bool | None = None


class Objects(BaseModel):
    """The objects in one image."""

    objects: list[Found]


class Segments(BaseModel):
    """The segments of one image."""

    segments: list[Segment]


class Answer(BaseModel):
    """Predictions of one version of a task, in the order of the images."""

    task: str
    version: str
    calibrated: bool
    images: list[Prediction] | list[Objects] | list[Segments]
    notice: str | None = None


class Described(BaseModel):
    """A task."""

    task: str
    version: str
    method: str
    target: str
    class_names: list[str]
    calibrated: bool
    notice: str | None = None


def describe(name: str, task: Task | Model, version: str) -> dict[str, Any]:
    """A task, as `Described`."""
    if isinstance(task, Dense):
        return {
            "task": name,
            "version": version,
            "method": task.metadata["method"],
            "target": "boxes" if isinstance(task, Detector) else "masks",
            "class_names": task.class_names,
            **_common(task),
        }
    return {
        "task": task.name,
        "version": version,
        "method": task.metadata["method"],
        "target": task.target.name,
        "class_names": list(task.class_names),
        **_common(task),
    }


def answer(task: Task, version: str, logits: list[Tensor]) -> dict[str, Any]:
    """Predictions from logits (C,) of each image, as `Answer`."""
    decision = _decision(task)
    predictions = []
    for row in logits:
        described = decision.describe(task.target, row, task.class_names)
        predictions.append({"predictions": ranked(described["probabilities"]), **described})
    return {"task": task.name, "version": version, **_common(task), "images": predictions}


def answer_objects(
    name: str, model: Model, version: str, found: list[list[dict[str, Any]]]
) -> dict[str, Any]:
    """Objects or segments of each image, as `Answer`."""
    key = "objects" if isinstance(model, Detector) else "segments"
    images = [{key: each} for each in found]
    return {"task": name, "version": version, **_common(model), "images": images}


def labels(task: Task, logits: Tensor, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Hugging Face's answer, from logits (C,) of an image: the `top_k` classes, best first.

    Scores are the task's probabilities, or `function_to_apply` of the logits.

    Raises:
        Refused: parameters of another kind.
    """
    functions = {
        "softmax": lambda x: x.softmax(-1),
        "sigmoid": torch.sigmoid,
        "none": lambda x: x,
        None: lambda x: _decision(task).probabilities(task.target, x[None])[0],
    }
    name, top = parameters.get("function_to_apply"), parameters.get("top_k")
    if not isinstance(name, str | None) or name not in functions:
        raise Refused(400, "function_to_apply: softmax, sigmoid or none")
    if top is not None and (not isinstance(top, int) or top < 1):
        raise Refused(400, "top_k: give a number from 1")
    scores = functions[name](logits.double()).tolist()
    return ranked(dict(zip(task.class_names, scores, strict=True)))[: top or TOP]


def ranked(scores: dict[str, float]) -> list[dict[str, Any]]:
    """Scores of classes as Hugging Face's list, best first."""
    best = sorted(scores.items(), key=lambda pair: -pair[1])
    return [{"label": name, "score": score} for name, score in best]


def _common(task: Task | Model) -> dict[str, Any]:
    notice = {"notice": NOTICE} if task.metadata.get("medical") else {}
    calibrated = isinstance(task, Task) and _decision(task).temperature != 1
    return {"calibrated": calibrated, **notice}


def _decision(task: Task) -> Decision:
    return task.decision or Decision()
