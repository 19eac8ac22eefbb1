"""One run: a configuration in, a folder with the artefact and its metrics out, in four stages."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor

from vpt import artifact, backbones, methods
from vpt.accelerator import processes
from vpt.config import DataConfig, DecisionConfig, RunConfig, load_run, to_yaml
from vpt.data.duplicates import Duplicate, find_duplicates
from vpt.data.fewshot import Split, split_data
from vpt.data.loaders import make_loader
from vpt.data.pixels import Range, choose_range
from vpt.data.sources import Samples, Source, open_source
from vpt.data.survey import Survey, check_images
from vpt.errors import InputError
from vpt.evaluation.decision import Decision, check_decision, fit_decision, resampled_metrics
from vpt.evaluation.evaluate import confusion, predict, test_loader
from vpt.evaluation.plots import draw_confusion
from vpt.files import write_atomically
from vpt.folder import RunFolder, default_folder
from vpt.methods import Method
from vpt.new_classes import check_tests, run_tests
from vpt.progress import Log
from vpt.resources import package_version
from vpt.training import fit as training
from vpt.training.epochs import Record
from vpt.training.features import predict_cached
from vpt.training.fit import find_loss

NOTICE = "Not for clinical use."  # with every result of medical data


@dataclass(frozen=True, eq=False)
class Prepared:
    """Result of `prepare`: what it read and checked, and the model to train."""

    config: RunConfig
    folder: RunFolder
    source: Source
    split: Split
    calibration: Samples | None
    duplicates: list[Duplicate]
    model: Method

    @property
    def details(self) -> dict[str, Any]:
        """Metadata of the artefact. No root: it carries no paths of its images."""
        data = self.config.data.model_dump(exclude={"root", "workers", "duplicates"})
        return {
            "data": data | {"name": self.source.name},
            "templates": self.source.templates,
            "medical": self.source.medical,
            "split_hash": self.split.hash,
            "config_hash": self.config.hash,
            "precision": self.config.train.precision,
        }

    def outputs(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Logits (N, C) and labels of `samples`."""
        precision, folder = self.config.train.precision, self.config.engine.feature_cache
        loader = test_loader(self.model, samples, self.config.data.workers)
        if folder and self.model.frozen_features:
            logits, labels = predict_cached(self.model, loader, precision, folder)
        else:
            logits, labels = predict(self.model, loader, precision)
        if not logits.isfinite().all():  # the very last step may be what breaks the prompt
            raise InputError(f"the logits of {self.folder.prompt} are not finite: lower train.lr")
        return logits, labels


@dataclass(frozen=True, eq=False)
class Tested:
    """Logits and labels of the test images, their metrics, and what else `test` found."""

    logits: Tensor
    labels: Tensor
    metrics: dict[str, Any]
    intervals: dict[str, Any]
    decision: Decision | None


def run(
    config: RunConfig, *, resume: bool = False, log: Log = print, progress: bool = True
) -> dict[str, Any]:
    """Train and evaluate what `config` says; returns the contents of result.json.

    Everything that can be wrong with the input is checked before the first file is written. The
    test images are read for metrics once, after the last epoch.

    Args:
        config: from `vpt.config.load_run`.
        resume: continue an interrupted run in its folder; a finished one is returned as it is.
        log: takes lines for the user.
        progress: show a bar of the epochs.

    Raises:
        InputError: bad input, or a folder that holds another run.
    """
    folder = RunFolder(config.out or default_folder(config))
    result = _finished(folder, config, resume)
    if not result:
        prepared = prepare(config, log)
        history = fit(prepared, log, progress)
        result = write(prepared, history, test(prepared, log))
    run_tests(config, folder, result["accuracy"], log)
    return result


def prepare(config: RunConfig, log: Log = print) -> Prepared:
    """Read and check all that a run needs, and attach the method; writes nothing.

    Raises:
        InputError: anything that is wrong with the input.
    """
    folder = RunFolder(config.out or default_folder(config))
    source = open_source(config.data)
    split = split_data(source, config.data)
    source = source.half(config.data.class_half)
    _check_same_split(folder, split)
    survey = check_split_images(split)
    calibration = _calibration(config, source, split)
    methods.check_options(config.method.name, config.method.options)
    for line in [describe(source, split, config.data), *source.notes, *split.notes]:
        log(f"data: {line}")
    grey = _grey_range(survey, split, log)
    duplicates = _duplicates(config, split, grey, log)

    set_seed(config.train.seed)
    log(f"backbone: {config.backbone.name}")
    backbone = backbones.load(config.backbone.name, config.backbone.checkpoint)
    backbone.exact_tokens = config.engine.exact_tokens
    backbone.checkpointing = config.engine.checkpointing
    backbone.preprocess = backbone.preprocess.model_copy(update={"grey_range": grey})
    if not backbone.knows_rows:
        log(f"{config.backbone.name}: blocks of an unknown type, so prompts run as tokens")
    model = methods.attach(
        backbone,
        config.method.name,
        class_names=source.class_names,
        target=source.target,
        **method_options(config, source),
    )
    find_loss(config.train.loss, model)
    check_tests(config, model)
    tunable = num_tunable(model)
    log(f"method: {model.name} on {config.backbone.name}, {tunable:,} tunable parameters")
    return Prepared(config, folder, source, split, calibration, duplicates, model)


def fit(prepared: Prepared, log: Log = print, progress: bool = True) -> list[Record]:
    """Train, or go on from the checkpoint; the artefact and metrics.jsonl follow each epoch.

    Raises:
        InputError: as `vpt.fit`; says which prompt is kept.
    """
    config, folder, model = prepared.config, prepared.folder, prepared.model
    split, source = prepared.split, prepared.source
    processes().wait_for_everyone()  # all have seen whether the folder held a run
    if processes().is_main_process:
        write_atomically(folder.config, to_yaml(config).encode())
        if prepared.duplicates:
            pairs = [pair._asdict() for pair in prepared.duplicates]
            write_atomically(folder.duplicates, _lines(pairs))
    train = make_loader(
        split.train,
        model.backbone.preprocess,
        config.train.batch_size,
        train=True,
        augment="none" if model.solved else source.augment,
        seed=config.train.seed,
        workers=config.data.workers,
    )
    begin = time.perf_counter()
    try:
        history = training.fit(
            model,
            train,
            split.val and test_loader(model, split.val, config.data.workers),
            config.train,
            checkpoint=folder.checkpoint,
            on_epoch=partial(_keep, prepared),
            engine=config.engine,
            progress=progress,
            log=log,
        )
    except InputError as error:
        kept = f"; the prompt of the epoch before is in {folder.prompt}"
        raise InputError(f"{error}{kept if folder.prompt.is_file() else ''}") from None
    log(f"trained in {time.perf_counter() - begin:.0f} s; testing on {len(split.test)} images")
    return history


def test(prepared: Prepared, log: Log = print) -> Tested:
    """Fit the decision that is wanted, and evaluate on the test images.

    Raises:
        InputError: logits that are not finite.
    """
    config, split, source = prepared.config, prepared.split, prepared.source
    target, decision, calibration = prepared.model.target, None, prepared.calibration
    if calibration is not None:
        part = "validation" if split.calibration is None else "calibration"
        log(f"decision: fitted on {len(calibration)} {part} images")
        logits, labels = prepared.outputs(calibration)
        decision = fit_decision(config.decision, target, logits, labels, source.class_names, log)
    logits, labels = prepared.outputs(split.test)
    patients = split.test.patients
    intervals = resampled_metrics(target, logits, labels, source.class_names, patients, decision)
    return Tested(logits, labels, target.metrics(logits, labels), intervals, decision)


def write(prepared: Prepared, history: list[Record], tested: Tested) -> dict[str, Any]:
    """Write the artefact and the files of a finished run; returns the contents of result.json."""
    config, folder, model = prepared.config, prepared.folder, prepared.model
    source, split, kept = prepared.source, prepared.split, model.artifact_tensors()
    result = {
        **tested.metrics,
        **tested.intervals,
        **({"notice": NOTICE} if source.medical else {}),
        "tunable_parameters": num_tunable(model),
        # of the artefact, whether a step trains them or not
        "stored_parameters": sum(p.numel() for n, p in model.named_parameters() if n in kept),
        "trained": "loss" in history[-1],  # False: fitted at once, or left as it starts
        "train_seconds": sum(record["seconds"] for record in history),
        "method": model.name,
        "backbone": config.backbone.name,
        "fingerprint": model.backbone.fingerprint()[:16],
        "data": source.name,
        "left_out": source.left_out,
        "shots": config.data.shots,
        "shots_per": config.data.shots_per,
        "num_train": len(split.train),
        "seed": config.data.seed,
        "config_hash": config.hash,
        "split_hash": split.hash,
        "version": package_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    if not processes().is_main_process:
        return result
    details = {"figures": tested.metrics}
    if tested.decision is not None:
        details["decision"] = tested.decision.model_dump()
    _keep(prepared, history, **details)
    write_atomically(folder.result, json.dumps(result, indent=2).encode())
    if source.target.exclusive:
        matrix = confusion(tested.logits, tested.labels)
        note = NOTICE if source.medical else ""
        draw_confusion(matrix, source.class_names, folder.confusion, note)
    folder.checkpoint.unlink(missing_ok=True)
    return result


def num_tunable(model: Method) -> int:
    """Number of values that train."""
    return sum(p.numel() for p in model.tunable_parameters().values())


def _keep(prepared: Prepared, history: list[Record], **details: Any) -> None:
    artifact.save(prepared.model, prepared.folder.prompt, **prepared.details, **details)
    write_atomically(prepared.folder.metrics, _lines(history))


def _lines(records: Sequence[dict[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(record)}\n" for record in records).encode()


def method_options(config: RunConfig, source: Source) -> dict[str, Any]:
    """The method's options; templates, where it takes them, are the data's unless given."""
    options = config.method.options
    if "templates" in methods.find(config.method.name).Options.model_fields:
        options = {"templates": source.templates, **options}
    return options


def check_split_images(split: Split) -> Survey:
    """Decode every image file of the split once, so that a broken one is said before training."""
    parts = [p for p in (split.train, split.val, split.calibration, split.test) if p is not None]
    files = [path for part in parts for path in part.images if isinstance(path, Path)]
    return check_images(files, split.train.windows)


def _grey_range(survey: Survey, split: Split, log: Log) -> Range | None:
    """One range for all grey images with more than 8 bits, chosen from the training images.

    Raises:
        InputError: they have at most 8 bits, but others have values that need a range.
    """
    training = {path for path in split.train.images if isinstance(path, Path)}
    grey = choose_range(values for path, values in survey.grey.items() if path in training)
    if grey:
        log(f"grey images: values from {grey[0]:g} to {grey[1]:g}, as the training images have")
    survey.through(grey, log).check()
    return grey


def _calibration(config: RunConfig, source: Source, split: Split) -> Samples | None:
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


def _duplicates(config: RunConfig, split: Split, grey: Range | None, log: Log) -> list[Duplicate]:
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


def _check_same_split(folder: RunFolder, split: Split) -> None:
    """Refuses to resume on other images: what was trained on might become test images."""
    if folder.prompt.is_file():
        _, metadata = artifact.read(folder.prompt)
        if metadata.get("split_hash") != split.hash:
            raise InputError(
                f"{folder.path}: its images changed since it was interrupted (split "
                f"{metadata.get('split_hash')}, now {split.hash}): give another out=DIR"
            )


def _finished(folder: RunFolder, config: RunConfig, resume: bool) -> dict[str, Any] | None:
    """The result of the same run if it is finished and `resume`; refuses to overwrite any run."""
    if not folder.config.is_file():
        return None
    before = load_run(str(folder.config))
    if not resume:
        state = "finished" if folder.result.is_file() else "interrupted"
        raise InputError(
            f"{folder.path}: holds a run that is {state}: give --resume, or another out=DIR"
        )
    if before.hash != config.hash:
        raise InputError(
            f"{folder.path}: holds a run with other settings ({before.hash}, not {config.hash}): "
            "give another out=DIR"
        )
    return json.loads(folder.result.read_text()) if folder.result.is_file() else None
