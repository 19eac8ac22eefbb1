"""Finished runs as one table, and what to know before they are compared."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import pandas as pd
from omegaconf import OmegaConf
from pydantic import BaseModel, PositiveInt, ValidationError

from vpt.config import DataConfig, DecisionConfig, EngineConfig, TrainConfig
from vpt.data.cards import Card
from vpt.errors import InputError
from vpt.folder import RunFolder
from vpt.settings import read_yaml

CELL = ["data", "shots", "backbone", "method"]  # runs that differ in their seed only
METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "ece": "ECE",
}
INTERVALS = [name for name in METRICS if name != "ece"]  # metrics that have one, of 95 %
# settings that do not tell the runs of a cell apart
_SAME = (
    r"expected\..*|method\.name|data\.(name|root|shots|seed|workers|duplicates)|train\.seed"
    r"|engine\.feature_cache|tests\..*"
)

# of keys that came after a run, which leave its hash as it was
_DEFAULTS = {
    f"{section}.{key}": str(value)
    for section, settings in {
        "data": DataConfig(),
        "train": TrainConfig(),
        "decision": DecisionConfig(),
        "engine": EngineConfig(),
    }.items()
    for key, value in settings
}

Interval = tuple[float, float]
Settings = dict[str, str]  # SECTION.KEY of a configuration → value
Record = TypeVar("Record", bound=BaseModel)


class Result(BaseModel):
    """Fields of result.json that a report reads."""

    data: str
    shots: PositiveInt | None
    backbone: str
    method: str
    seed: int
    accuracy: float
    balanced_accuracy: float | None
    macro_f1: float | None
    auroc: float | None
    auprc: float | None = None
    ece: float | None
    accuracy_interval: Interval | None = None
    balanced_accuracy_interval: Interval | None = None
    macro_f1_interval: Interval | None = None
    auroc_interval: Interval | None = None
    auprc_interval: Interval | None = None
    num_test: int
    tunable_parameters: int
    stored_parameters: int | None = None
    trained: bool = True
    train_seconds: float
    config_hash: str
    split_hash: str
    fingerprint: str | None = None
    version: str
    torch: str
    device: str


class Epoch(BaseModel):
    """Fields of a line of metrics.jsonl that a report reads."""

    epoch: int
    accuracy: float
    loss: float | None = None
    val_accuracy: float | None = None


def find_runs(folder: Path) -> tuple[dict[RunFolder, Settings], dict[RunFolder, str]]:
    """The finished runs below `folder` with their settings, the others with what became of them.

    Those that only choose a setting (`data.split=train-val`) are none of them.

    Raises:
        InputError: no run is finished.
    """
    found = {
        RunFolder(path.parent): _settings(path) for path in sorted(folder.rglob("config.yaml"))
    }
    tested = {run: s for run, s in found.items() if s.get("data.split") != "train-val"}
    dense = {run for run, s in tested.items() if {"detect.channels", "segment.channels"} & s.keys()}
    finished = {run: s for run, s in tested.items() if run.result.is_file() and run not in dense}
    failed = {
        RunFolder(path.parent): f"failed: {path.read_text()}"
        for path in sorted(folder.rglob("failure.txt"))
    }
    if not finished:
        mend = next(iter(failed.values()), "give the folder that holds the runs")
        raise InputError(f"{folder}: no finished run below it: {mend}")
    others = dict.fromkeys(tested, "not finished") | failed
    others |= dict.fromkeys(dense, "of boxes or masks, which this page does not show")
    return finished, {run: state for run, state in others.items() if run not in finished}


def read_runs(found: Mapping[RunFolder, Settings], cards: Mapping[str, Card]) -> pd.DataFrame:
    """One row a run: the fields of `Result`, its card's name and its folder.

    An interval is two columns, `NAME_low` and `NAME_high`; `duplicates` counts the test images that
    look like a training image; `left_untrained` is True where cross-validation (`train.folds`) left
    the method as it starts. `shots` is infinite where all training images were taken. `data`
    names the root too, where the card is none of a data set, and the half of its classes. Where
    runs of a cell differ in more than the seed, `method` says in what, so that they become cells
    of their own.

    Raises:
        InputError: a result.json that is not a run's.
    """
    results = [parse(Result, run.result.read_bytes(), run.result) for run in found]
    runs = pd.DataFrame([result.model_dump() for result in results])
    runs = runs.astype(
        {"shots": float, "stored_parameters": "Int64"} | dict.fromkeys(METRICS, float)
    )
    runs["shots"] = runs["shots"].fillna(math.inf)
    for name in INTERVALS:
        pairs = [pair or (math.nan, math.nan) for pair in runs.pop(f"{name}_interval")]
        runs[[f"{name}_low", f"{name}_high"]] = pairs
    runs["folder"] = list(found)
    runs["duplicates"] = [_count_lines(run.duplicates) for run in found]
    runs["left_untrained"] = [
        settings.get("train.folds", "None") != "None" and not trained
        for settings, trained in zip(found.values(), runs.pop("trained"), strict=True)
    ]
    runs["card"] = runs["data"]
    settings = pd.DataFrame(list(found.values()))
    generic = [name in cards and not cards[name].num_classes for name in runs.card]
    roots = settings["data.root"][generic].map(lambda root: Path(root).stem)
    runs.loc[generic, "data"] = roots + " (" + runs.card[generic] + ")"

    halves = settings.get("data.class_half", pd.Series("None", settings.index)).fillna("None")
    runs["data"] += halves.map(lambda half: "" if half == "None" else f", {half} classes")
    settings = settings.loc[:, ~settings.columns.str.fullmatch(_SAME)]
    settings = settings.fillna(_DEFAULTS).fillna("unset")
    for _, part in runs.groupby(CELL):
        chosen = settings.loc[part.index]
        for key in chosen.columns[chosen.nunique() > 1]:
            runs.loc[part.index, "method"] += f", {key}=" + chosen[key]
    return runs


def read_curves(runs: pd.DataFrame) -> pd.DataFrame:
    """One row an epoch of each run that has several: its cell and the fields of `Epoch`.

    Raises:
        InputError: a metrics.jsonl that is not a run's.
    """
    rows = []
    for run in runs.itertuples():
        path = run.folder.metrics
        epochs = [parse(Epoch, line, path) for line in path.read_bytes().splitlines()]
        if len(epochs) > 1:
            cell = {key: getattr(run, key) for key in CELL}
            rows += [cell | epoch.model_dump() for epoch in epochs]
    return pd.DataFrame(rows, columns=[*CELL, *Epoch.model_fields])


def caveats(runs: pd.DataFrame) -> list[str]:
    """Caveats of comparing the metrics of `runs`, a sentence each."""
    found = []
    for (data, shots, seed), part in runs.groupby(["data", "shots", "seed"]):
        if part.split_hash.nunique() > 1:
            splits = part.groupby("split_hash").method.agg(lambda names: ", ".join(sorted(names)))
            sides = "; ".join(f"split {split}: {methods}" for split, methods in splits.items())
            found.append(
                f"{data} (shots: {shots_text(shots)}, seed: {seed}): not the same images for all, "
                f"so not comparable: {sides}."
            )
    for data, count in runs.groupby("data").duplicates.max().items():
        if count:
            found.append(
                f"{data}: up to {count} test or calibration images of a run look like a training "
                "image (duplicates.jsonl)."
            )
    for backbone, part in runs.groupby("backbone"):
        if part.fingerprint.nunique() > 1:
            found.append(f"{backbone}: {part.fingerprint.nunique()} different sets of weights.")
    for key in ("version", "torch"):
        if runs[key].nunique() > 1:
            found.append(f"Different {key}s: {', '.join(sorted(set(runs[key])))}.")
    if runs.device.nunique() > 1:
        found.append("Training times are of different devices.")
    return found


def shots_text(shots: float) -> str:
    """Images a class, or `all`."""
    return "all" if math.isinf(shots) else f"{shots:.0f}"


def _settings(path: Path) -> Settings:
    config = OmegaConf.to_container(read_yaml(path))
    sections = {name: keys for name, keys in config.items() if isinstance(keys, dict)}
    return {f"{name}.{key}": str(keys[key]) for name, keys in sections.items() for key in keys}


def _count_lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def parse(model: type[Record], text: bytes, path: Path) -> Record:
    """The record that `text` of the file `path` is.

    Raises:
        InputError: it is not one.
    """
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = "".join(f"{part}: " for part in first["loc"])
        raise InputError(f"{path}: {key}{first['msg'].lower()}: repeat the run") from None
