"""One run: a configuration in, a folder with the artefact and its metrics out, in four stages."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor

from vpt import artifact, auto, backbones, methods
from vpt.accelerator import processes
from vpt.auto import Candidate
from vpt.backbones import Backbone
from vpt.checks import (
    calibration_samples,
    check_split_images,
    describe,
    find_grey_range,
    search_duplicates,
)
from vpt.config import RunConfig, load_run, to_yaml
from vpt.data.duplicates import Duplicate
from vpt.data.fewshot import Split, split_data
from vpt.data.sources import Samples, Source, open_source
from vpt.errors import InputError
from vpt.evaluation.decision import Decision, fit_decision, resampled_metrics
from vpt.evaluation.evaluate import confusion, test_loader
from vpt.evaluation.plots import draw_confusion
from vpt.files import write_atomically
from vpt.folder import RunFolder, check_cache, default_folder
from vpt.losses import Loss
from vpt.methods import Method
from vpt.new_classes import check_tests, run_tests
from vpt.progress import Log
from vpt.resources import package_version
from vpt.training import fit as training
from vpt.training.epochs import Record
from vpt.training.features import predict_cached
from vpt.training.fit import find_loss
from vpt.training.setup import attach, training_loader
from vpt.training.start import start

NOTICE = "Not for clinical use."  # with every result of medical data


@dataclass(frozen=True, eq=False)
class Prepared:
    """Result of `prepare`: what it read and checked, and the model to train.

    Attributes:
        setting: of the method that trains: `config`, or the chosen candidate's.
        model: of an auto run the first candidate's until one is chosen.
        candidates: of an auto run.
    """

    config: RunConfig
    folder: RunFolder
    source: Source
    split: Split
    calibration: Samples | None
    duplicates: list[Duplicate]
    backbone: Backbone
    setting: RunConfig
    model: Method
    candidates: Sequence[Candidate] = ()
    # `init_from`: what the method started from
    started: dict[str, Any] = field(default_factory=dict)
    loss: type[Loss] | None = None  # instead of the configuration's

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
            **self.started,
        }

    def outputs(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Logits (N, C) and labels of `samples`."""
        precision, folder = self.config.train.precision, self.config.engine.feature_cache
        loader = test_loader(self.model, samples, self.config.data.workers)
        logits, labels = predict_cached(self.model, loader, precision, folder)
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
    if config.tasks:
        raise InputError("tasks: several data sets at once are for vpt train, vpt.multitask.run")
    folder = RunFolder(config.out or default_folder(config))
    result = finished(folder, config, resume)
    if not result:
        prepared = prepare(config, log)
        if config.auto is not None:
            prepared = choose(prepared, log, progress)
        history = fit(prepared, log, progress)
        result = write(prepared, history, test(prepared, log))
    run_tests(config, folder, result["accuracy"], log)
    return result


def prepare(
    config: RunConfig,
    log: Log = print,
    backbone: Backbone | None = None,
    data: tuple[Source, Split] | None = None,
) -> Prepared:
    """Read and check all that a run needs, and attach the method; writes nothing.

    Args:
        config: of the run.
        log: takes lines for the user.
        backbone: the configuration's, where another run has loaded it.
        data: what was read already; None: what `config.data` means.

    Raises:
        InputError: anything that is wrong with the input.
    """
    folder = RunFolder(config.out or default_folder(config))
    check_cache(config.engine.feature_cache)
    source = data[0] if data else open_source(config.data)
    split = data[1] if data else split_data(source, config.data)
    source = source.half(config.data.class_half)
    check_same_split(folder, split.hash)
    survey = check_split_images(split)
    calibration = calibration_samples(config, source, split)
    check_method(config)
    for line in [describe(source, split, config.data), *source.notes, *split.notes]:
        log(f"data: {line}")
    grey = find_grey_range(survey, split.train.images, log)
    duplicates = search_duplicates(config, split, grey, log)

    set_seed(config.train.seed)
    log(f"backbone: {config.backbone.name}")
    backbone = backbones.adapt(
        backbone or backbones.load(config.backbone.name, config.backbone.checkpoint)
    )
    backbone.exact_tokens = config.engine.exact_tokens
    backbone.checkpointing = config.engine.checkpointing
    backbone.preprocess = backbone.preprocess.model_copy(update={"grey_range": grey})
    if not backbone.knows_rows:
        log(f"{config.backbone.name}: blocks of an unknown type, so prompts run as tokens")
    setting = config if config.auto is None else auto.settings(config, backbone)[0]
    model = attach(backbone, source, setting)
    check_tests(config, model)
    if config.auto is None:
        find_loss(config.train.loss, model)
        passes = "" if model.passes == 1 else f", {model.passes:.2f} passes of a test image"
        tunable = f"{num_tunable(model):,} tunable parameters"
        log(f"method: {model.name} on {config.backbone.name}, {tunable}{passes}")
    elif config.init_from:
        raise InputError("init_from: auto chooses the method first: drop it, or name a method")
    started = {"init_from": start(model, config, split.train, log)} if config.init_from else {}
    read = config, folder, source, split, calibration, duplicates
    return Prepared(*read, backbone, config, model, started=started)


def check_method(config: RunConfig) -> None:
    """Refuse an unknown method or candidate, and unknown options."""
    for setting in [config] if config.auto is None else auto.settings(config):
        methods.check_options(setting.method.name, setting.method.options)


def choose(prepared: Prepared, log: Log = print, progress: bool = True) -> Prepared:
    """The chosen candidate of an auto run in the place of the first; see `Comparison.choose`.

    Raises:
        InputError: no candidate can be trained.
    """
    config, folder, backbone = prepared.config, prepared.folder, prepared.backbone
    _open_folder(prepared)
    comparison = auto.Comparison(backbone, prepared.source, prepared.split, folder, progress)
    settings = auto.settings(config, backbone, len(prepared.split.train))
    chosen, tried = comparison.choose(settings, config.auto.minutes, log)
    cache = {"feature_cache": config.engine.feature_cache or folder.features}
    engine = config.engine.model_copy(update=cache)
    setting = chosen.setting.model_copy(update={"engine": engine})
    model = attach(backbone, prepared.source, setting)
    return replace(prepared, setting=setting, model=model, candidates=tried)


def fit(prepared: Prepared, log: Log = print, progress: bool = True) -> list[Record]:
    """Train, or go on from the checkpoint; the artefact and metrics.jsonl follow each epoch.

    Raises:
        InputError: as `vpt.fit`; says which prompt is kept.
    """
    config, folder, model = prepared.setting, prepared.folder, prepared.model
    split = prepared.split
    _open_folder(prepared)
    train = training_loader(model, prepared.source, split, config)
    begin = time.perf_counter()
    try:
        history = training.fit(
            model,
            train,
            split.val and test_loader(model, split.val, config.data.workers),
            config.train,
            loss=prepared.loss,
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


def _open_folder(prepared: Prepared) -> None:
    """Write what says whose the folder is."""
    processes().wait_for_everyone()  # all have seen whether the folder held a run
    if processes().is_main_process:
        write_atomically(prepared.folder.config, to_yaml(prepared.config).encode())
        if prepared.duplicates:
            pairs = [pair._asdict() for pair in prepared.duplicates]
            write_atomically(prepared.folder.duplicates, json_lines(pairs))


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
    tried = {candidate.name: candidate.record for candidate in prepared.candidates}
    result = {
        **tested.metrics,
        **tested.intervals,
        **({"chosen": model.name, "candidates": tried} if tried else {}),
        **({"notice": NOTICE} if source.medical else {}),
        "tunable_parameters": num_tunable(model),
        # of the artefact, whether a step trains them or not
        "stored_parameters": sum(p.numel() for n, p in model.named_parameters() if n in kept),
        "trained": "loss" in history[-1],  # False: fitted at once, or left as it starts
        "train_seconds": sum(record["seconds"] for record in [*history, *tried.values()]),
        **prepared.started,
        "method": config.method.name,
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
    folder.candidates.unlink(missing_ok=True)
    shutil.rmtree(folder.features, ignore_errors=True)
    return result


def num_tunable(model: Method) -> int:
    """Number of values that train."""
    return sum(p.numel() for p in model.tunable_parameters().values())


def _keep(prepared: Prepared, history: list[Record], **details: Any) -> None:
    artifact.save(prepared.model, prepared.folder.prompt, **prepared.details, **details)
    write_atomically(prepared.folder.metrics, json_lines(history))


def json_lines(records: Sequence[dict[str, Any]]) -> bytes:
    """A JSON record a line."""
    return "".join(f"{json.dumps(record)}\n" for record in records).encode()


def check_same_split(folder: RunFolder, split_hash: str) -> None:
    """Refuses to resume on other images: what was trained on might become test images.

    Raises:
        InputError: the folder's artefact is of another split.
    """
    if folder.prompt.is_file():
        _, metadata = artifact.read(folder.prompt)
        if metadata.get("split_hash") != split_hash:
            raise InputError(
                f"{folder.path}: its images changed since it was interrupted (split "
                f"{metadata.get('split_hash')}, now {split_hash}): give another out=DIR"
            )


def finished(
    folder: RunFolder,
    config: RunConfig,
    resume: bool,
    load: Callable[[str], RunConfig] = load_run,
) -> dict[str, Any] | None:
    """The result of the same run if it is finished and `resume`; refuses to overwrite any run."""
    if not folder.config.is_file():
        return None
    try:
        before = load(str(folder.config))
    except InputError as error:
        raise InputError(
            f"{folder.path}: holds no run of this kind ({error}): give another out=DIR"
        ) from None
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
    begun = folder.prompt.is_file() and artifact.read_metadata(folder.prompt)
    if config.init_from and begun and begun["config_hash"] != config.hash:  # by content
        raise InputError(f"{folder.path}: init_from was another artefact: give another out=DIR")
    return json.loads(folder.result.read_text()) if folder.result.is_file() else None
