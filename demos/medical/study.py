"""One method beside its baselines on one split, and the page that shows how far to trust it."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure
from torch import Tensor

from vpt import artifact
from vpt.config import RunConfig, load_run
from vpt.data.fewshot import Split, split_data
from vpt.data.loaders import ImageDataset
from vpt.data.sources import Source, open_source
from vpt.evaluation.decision import Decision
from vpt.evaluation.evaluate import outputs
from vpt.evaluation.plots import (
    draw_precision_recall,
    draw_reliability,
    draw_risk_coverage,
    draw_roc,
)
from vpt.explain import draw_saliency, explain
from vpt.files import write_atomically
from vpt.folder import RunFolder
from vpt.run import run

DECISION = ["decision.temperature=true", "decision.alpha=0.1", "decision.coverage=0.8"]
SHOWN = 8  # test images in the saliency grid
PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
)


@dataclass(frozen=True)
class Study:
    """A method and its baselines on one split of one data set.

    `settings` are overrides of all their run configurations, `note` what must be said of the data.
    """

    title: str
    folder: Path
    method: str
    baselines: Sequence[str]
    settings: Sequence[str]
    note: str = ""

    def config(self, method: str) -> RunConfig:
        """The run of one method."""
        return load_run(method, [*self.settings, *DECISION, f"out={self.folder / method}"])

    def render(self) -> dict[str, Any]:
        """Values for the page, after the runs that are not finished."""
        results = {}
        for method in (self.method, *self.baselines):
            print(f"{self.title}: {method}", flush=True)
            results[method] = run(self.config(method), resume=True)
        config = self.config(self.method)
        source = open_source(config.data)
        split = split_data(source, config.data)
        model = artifact.load(RunFolder(config.out).prompt)
        decision = Decision(**model.metadata["decision"])
        model = model.fold()
        logits, labels = outputs(model, split.test)
        target = model.target
        raw, calibrated = (
            target.probabilities(logits.double()),
            decision.probabilities(target, logits),
        )
        names = source.class_names
        figures = {
            "ROC curve on the test images.": draw_roc(target, calibrated, labels, names),
            "Precision and recall on the test images.": draw_precision_recall(
                target, calibrated, labels, names
            ),
            "Reliability before and after temperature scaling: on the diagonal, a confidence is a "
            "frequency.": draw_reliability(target, {"before": raw, "after": calibrated}, labels),
            "Error rate among the images that are decided, the least certain being referred.": (
                draw_risk_coverage(calibrated, labels, decision.refer_below)
            ),
        }
        saliency, areas = self._saliency(model, split, calibrated)
        return {
            "title": self.title,
            "note": self.note,
            "method": self.method,
            "config": config,
            "results": results,
            "result": results[self.method],
            "decision": results[self.method]["decision"],
            "wanted": config.decision,
            "calibration": np.bincount(split.calibration.labels, minlength=len(names)),
            "cohort": cohort(source, split),
            "class_names": names,
            "plots": {caption: to_uri(figure) for caption, figure in figures.items()},
            "saliency": to_uri(saliency),
            "areas": areas,
        }

    def _saliency(self, model: Any, split: Split, probabilities: Tensor) -> tuple[Figure, Any]:
        """A grid of test images, the same number of each class, and their deletion areas."""
        labels, rng = split.test.labels, np.random.default_rng(0)
        each = SHOWN // len(model.class_names)
        chosen = [
            index
            for label in np.unique(labels)
            for index in rng.permutation(np.flatnonzero(labels == label))[:each]
        ]
        images = ImageDataset(split.test, model.backbone.preprocess)
        figure = Figure(figsize=(2.2 * len(chosen), 5.3), layout="constrained")
        records = []
        for (above, below), index in zip(figure.subplots(2, len(chosen)).T, chosen, strict=True):
            pixels, label = images[int(index)]
            record, heat = explain(model, torch.from_numpy(pixels))
            records.append(record)
            above.imshow(pixels)
            draw_saliency(below, pixels, heat)
            right = "right" if record["class"] == model.class_names[label] else "WRONG"
            above.set_title(f"is {model.class_names[label]}", fontsize=8)
            confidence = probabilities[index].max()
            below.set_title(f"called {record['class']}\n{confidence:.2f}, {right}", fontsize=8)
            for axes in (above, below):
                axes.set_axis_off()
        figure.suptitle(f"Not for clinical use. {self.note}")
        keys = ("deletion_area", "random_area")
        return figure, {key: np.mean([record[key] for record in records]) for key in keys}


def cohort(source: Source, split: Split) -> list[dict[str, Any]]:
    """A row for each part: images, patients where they are known, and images of each class."""
    parts = {"training": split.train, "calibration": split.calibration, "test": split.test}
    return [
        {
            "part": part,
            "images": len(samples),
            "patients": len(set(samples.patients)) if samples.patients else None,
            "classes": np.bincount(samples.labels, minlength=len(source.class_names)).tolist(),
        }
        for part, samples in parts.items()
    ]


def to_uri(figure: Figure) -> str:
    """A figure as a PNG inside the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_report(studies: Sequence[Study], path: Path) -> Path:
    """Run the studies and write one page of them, which needs no other file."""
    page = PAGES.get_template("page.html").render(studies=[study.render() for study in studies])
    write_atomically(path, page.encode())
    return path
