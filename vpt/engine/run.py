"""One run: a configuration in, a folder with the artefact and its figures out."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor

from vpt import artifact, backbones, methods
from vpt.config import DataConfig, DecisionConfig, RunConfig, load_run, to_yaml
from vpt.data.duplicates import Duplicate, find_duplicates
from vpt.data.fewshot import Split, split_data
from vpt.data.loaders import make_loader
from vpt.data.pixels import Range, choose_range
from vpt.data.sources import Samples, Source, open_source
from vpt.data.survey import Survey, check_images
from vpt.engine.accelerator import processes
from vpt.engine.decision import check_decision, fit_decision, resampled_figures
from vpt.engine.evaluate import EVAL_BATCH, confusion, predict
from vpt.engine.figures import draw_confusion
from vpt.engine.progress import Log
from vpt.engine.train import Record, check_loss, fit
from vpt.errors import InputError

NOTICE = "Not for clinical use."  # with every result of medical data


@dataclass(frozen=True)
class RunFolder:
    """Where a run leaves its files."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON record an epoch."""
        return self.path / "metrics.jsonl"

    @property
    def prompt(self) -> Path:
        """The artefact."""
        return self.path / "prompt.safetensors"

    @property
    def duplicates(self) -> Path:
        """One JSON record a test image that looks like a training image; there only if any does."""
        return self.path / "duplicates.jsonl"

    @property
    def failure(self) -> Path:
        """Why a suite could not do the run, in one line; there only if its last attempt failed."""
        return self.path / "failure.txt"

    @property
    def result(self) -> Path:
        """The figures; there only when the run is finished."""
        return self.path / "result.json"

    @property
    def checkpoint(self) -> Path:
        """State to resume from; there only while the run is not finished."""
        return self.path / "checkpoint.pt"

    @property
    def confusion(self) -> Path:
        """The confusion matrix on the test images."""
        return self.path / "confusion.png"


def run(
    config: RunConfig, *, resume: bool = False, log: Log = print, progress: bool = True
) -> dict[str, Any]:
    """Train and evaluate what `config` says; returns the contents of result.json.

    Everything that can be wrong with the input is checked before the first file is written. The
    test images are read for figures once, after the last epoch.

    Args:
        config: from `vpt.config.load_run`.
        resume: continue an interrupted run in its folder; a finished one is returned as it is.
        log: takes lines for the user.
        progress: show a bar of the epochs.

    Raises:
        InputError: bad input, or a folder that holds another run.
    """
    folder = RunFolder(config.out or default_folder(config))
    if finished := _finished(folder, config, resume):
        return finished
    source = open_source(config.data)
    split = split_data(source, config.data)
    _check_same_split(folder, split)
    survey = check_split_images(split)
    calibration = _calibration(config, source, split)
    methods.check_options(config.method.name, config.method.options)
    log(f"data: {describe(source, split, config.data)}")
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
    check_loss(config.train.loss, model)
    tunable = sum(p.numel() for p in model.tunable_parameters().values())
    kept = model.artifact_tensors()
    stored = sum(p.numel() for name, p in model.named_parameters() if name in kept)
    log(f"method: {model.name} on {config.backbone.name}, {tunable:,} tunable parameters")

    details = {
        # no root: an artefact carries no paths of its images
        "data": config.data.model_dump(exclude={"root", "workers", "duplicates"})
        | {"name": source.name},
        "templates": source.templates,
        "medical": source.medical,
        "split_hash": split.hash,
        "config_hash": config.hash,
        "precision": config.train.precision,
    }
    processes().wait_for_everyone()  # all have seen whether the folder held a run
    main = processes().is_main_process
    if main:
        artifact.write_atomically(folder.config, to_yaml(config).encode())
        if duplicates:
            lines = "".join(f"{json.dumps(pair._asdict())}\n" for pair in duplicates)
            artifact.write_atomically(folder.duplicates, lines.encode())

    def keep(history: list[Record]) -> None:
        artifact.save(model, folder.prompt, **details)
        lines = "".join(f"{json.dumps(record)}\n" for record in history)
        artifact.write_atomically(folder.metrics, lines.encode())

    def loader(samples: Samples, train: bool = False) -> Any:
        return make_loader(
            samples,
            backbone.preprocess,
            config.train.batch_size if train else EVAL_BATCH,
            train=train,
            augment=source.augment if train and not model.solved else "none",
            seed=config.train.seed,
            workers=config.data.workers,
        )

    def outputs(samples: Samples) -> tuple[Tensor, Tensor]:
        logits, labels = predict(model, loader(samples), config.train.precision)
        if not logits.isfinite().all():  # the very last step may be what breaks the prompt
            raise InputError(f"the logits of {folder.prompt} are not finite: lower train.lr")
        return logits, labels

    begin = time.perf_counter()
    try:
        history = fit(
            model,
            loader(split.train, train=True),
            loader(split.val) if split.val is not None else None,
            config.train,
            checkpoint=folder.checkpoint,
            on_epoch=keep,
            engine=config.engine,
            progress=progress,
            log=log,
        )
    except InputError as error:
        kept = f"; the prompt of the epoch before is in {folder.prompt}"
        raise InputError(f"{error}{kept if folder.prompt.is_file() else ''}") from None
    train_seconds = sum(record["seconds"] for record in history)
    log(f"trained in {time.perf_counter() - begin:.0f} s; testing on {len(split.test)} images")

    decision = None
    if calibration is not None:
        part = "validation" if split.calibration is None else "calibration"
        log(f"decision: fitted on {len(calibration)} {part} images")
        decision = fit_decision(
            config.decision, model.target, *outputs(calibration), source.class_names, log
        )
        details["decision"] = decision.model_dump()
    logits, labels = outputs(split.test)
    figures = model.target.metrics(logits, labels)
    result = {
        **figures,
        **resampled_figures(
            model.target, logits, labels, source.class_names, split.test.patients, decision
        ),
        **({"notice": NOTICE} if source.medical else {}),
        "tunable_parameters": tunable,
        "stored_parameters": stored,  # of the artefact, whether a step trains them or not
        "trained": "loss" in history[-1],  # False: solved, or left as it starts
        "train_seconds": train_seconds,
        "method": model.name,
        "backbone": config.backbone.name,
        "fingerprint": model.backbone.fingerprint()[:16],
        "data": source.name,
        "shots": config.data.shots,
        "shots_per": config.data.shots_per,
        "num_train": len(split.train),
        "seed": config.data.seed,
        "config_hash": config.hash,
        "split_hash": split.hash,
        "version": artifact.package_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    if main:
        keep(history)
        artifact.save(model, folder.prompt, **details, figures=figures)
        artifact.write_atomically(folder.result, json.dumps(result, indent=2).encode())
        if source.target.exclusive:
            matrix, note = confusion(logits, labels), NOTICE if source.medical else ""
            draw_confusion(matrix, source.class_names, folder.confusion, note)
        folder.checkpoint.unlink(missing_ok=True)
    return result


def default_folder(config: RunConfig) -> Path:
    """runs/METHOD-DATA-SHOTSshot-seedSEED."""
    data = config.data.name or (config.data.root.stem if config.data.root else "data")
    shots = "all" if config.data.shots is None else f"{config.data.shots}shot"
    return Path("runs") / f"{config.method.name}-{data}-{shots}-seed{config.data.seed}"


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
            "data.calibration=SHARE, or add a val part"
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
