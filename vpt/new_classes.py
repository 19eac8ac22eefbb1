"""Test an artefact where it was not trained: on other classes, or on another data set."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vpt import artifact, backbones
from vpt.accelerator import processes
from vpt.config import DataConfig, RunConfig
from vpt.data.fewshot import split_data
from vpt.data.images import Samples
from vpt.data.sources import Source, open_source
from vpt.data.survey import survey_images
from vpt.errors import InputError
from vpt.evaluation.decision import resampled_metrics
from vpt.evaluation.evaluate import predict, test_loader
from vpt.files import write_atomically
from vpt.folder import RunFolder
from vpt.methods import Method
from vpt.progress import Log
from vpt.settings import validate
from vpt.training.features import predict_cached


def test_data(config: RunConfig) -> dict[str, DataConfig]:
    """The data of each of the run's `tests`.

    Raises:
        InputError: an unknown key or a value out of its range.
    """
    own = config.data.model_dump()
    return {
        name: validate(
            DataConfig, keys if keys.keys() & {"name", "root"} else own | keys, f"tests.{name}"
        )
        for name, keys in config.tests.items()
    }


def check_tests(config: RunConfig, model: Method) -> None:
    """Refuses tests that the trained `model` could not be put to.

    Raises:
        InputError: as `test_data` and `open_source`; other classes than what it learned belongs to.
    """
    for name, data in test_data(config).items():
        names = open_source(data).half(data.class_half).class_names
        if not model.takes_names and not set(names) <= set(model.class_names):
            raise InputError(
                f"tests.{name}: what {model.name} learned belongs to its own classes: drop the "
                "test, or take a method whose context all classes share, such as coop"
            )


def run_tests(config: RunConfig, folder: RunFolder, accuracy: float, log: Log) -> None:
    """Write the metrics of each of the run's `tests` that is not done into `folder`.

    That of new classes has the harmonic mean with the run's own `accuracy`, of base classes.
    """
    todo = [
        (name, data) for name, data in test_data(config).items() if not folder.test(name).is_file()
    ]
    if not todo:
        return
    backbone = backbones.load(config.backbone.name, config.backbone.checkpoint)
    for name, data in todo:
        log(f"tests.{name}: without training")
        found = evaluate_on(folder.prompt, data, backbone, config.engine.feature_cache, log)
        if data.class_half == "new":
            total = accuracy + found["accuracy"]
            found["harmonic_mean"] = 2 * accuracy * found["accuracy"] / total if total else 0.0
        if processes().is_main_process:
            write_atomically(folder.test(name), json.dumps(found, indent=2).encode())


def evaluate_on(
    path: Path,
    data: DataConfig,
    backbone: nn.Module | None = None,
    feature_cache: Path | None = None,
    log: Log = print,
) -> dict[str, Any]:
    """Metrics of the artefact at `path` on the test images of `data`, of its classes.

    Where the artefact knows all of them, among their logits; else their names take the place of
    its own, in the templates of `data` if those it was trained with were the data's too. The test
    images are the test part; of data without one all, or with `class_half` what its split leaves.

    Raises:
        InputError: as `open_source`; other classes than what the artefact learned belongs to.
    """
    _, metadata = artifact.read(path)
    source = open_source(data)
    tests = _test_samples(source, data)
    source = source.half(data.class_half)
    files = [file for test in tests for file in test.images if isinstance(file, Path)]
    grey = metadata["preprocess"].get("grey_range")
    survey_images(files, data.windows).through(grey, log).check()
    known, names = metadata["class_names"], source.class_names
    columns: Any = slice(None)
    if set(names) <= set(known):
        model = artifact.load(path, backbone)
        columns = [known.index(name) for name in names]
    else:
        follows = metadata["options"].get("templates") == metadata.get("templates")
        templates = source.templates if follows else None
        model = artifact.load(path, backbone, class_names=names, templates=templates)
    model, precision = model.fold(), metadata.get("precision", "auto")
    tested = []
    for test in tests:
        loader = test_loader(model, test, data.workers)
        if feature_cache and model.frozen_features:
            tested.append(predict_cached(model, loader, precision, feature_cache))
        else:
            tested.append(predict(model, loader, precision))
    logits, labels = (torch.cat(parts) for parts in zip(*tested, strict=True))
    logits = logits[:, columns]
    patients = [patient for test in tests for patient in test.patients or []] or None
    return {
        **model.target.metrics(logits, labels),
        **resampled_metrics(model.target, logits, labels, names, patients, None),
        "data": source.name,
        "class_half": data.class_half,
        "num_classes": len(names),
    }


def _test_samples(source: Source, data: DataConfig) -> Sequence[Samples]:
    if data.class_half:
        return [split_data(source, data).test]
    return [source.parts["test"]] if "test" in source.parts else list(source.parts.values())
