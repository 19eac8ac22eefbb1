"""From which task to which do prompts carry over: every pair, beside a start from scratch."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import permutations, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pydantic import Field, PositiveInt
from scipy.stats import t as student

from vpt import methods
from vpt.bench.suite import Engine, absolute, run_all
from vpt.config import RunConfig, Seed, load_run, to_yaml
from vpt.data.fewshot import split_data
from vpt.data.sources import open_source
from vpt.digests import AUTO
from vpt.errors import InputError
from vpt.evaluation.plots import save
from vpt.files import write_atomically
from vpt.folder import RunFolder
from vpt.progress import Log
from vpt.run import prepare
from vpt.training.start import NONE

Outcomes = dict[tuple[str, int | None, int, str], float]  # target, shots, seed, source: accuracy


class TransferConfig(RunConfig):
    """A run configuration with `tasks`, each of which is the source of all others."""

    source_shots: PositiveInt | None = 16  # images a class that a source is trained on
    shots: list[PositiveInt | None] = Field([1, 4, 16], min_length=1)  # of the targets
    seeds: list[Seed] = Field([1, 2, 3], min_length=1)  # of the targets; sources have the first


def transfer(
    name: str, overrides: Sequence[str], out: Path, engine: Engine, *, resume: bool, log: Log
) -> dict[str, Any]:
    """Train each task alone, then each from each other; returns the contents of transfer.json.

    Beside them, what `init_from=auto` chooses on the training images: its accuracy is that of the
    run that starts there.

    Args:
        name: a path, or a name under configs/transfer.
        overrides: `key=value`s.
        out: folder of the runs, transfer.json and transfer.png.
        engine: does the runs.
        resume: do what is not finished in `out`.
        log: takes lines for the user.

    Raises:
        InputError: a bad suite; `out` holds one and not `resume`; a run that could not be done.
    """
    suite = load_run(name, overrides, TransferConfig, "configs/transfer")
    if len(suite.tasks) < 2:
        raise InputError(f"{name}: give two tasks or more, as tasks.NAME.root=IMAGES")
    out = out.absolute()
    if (out / "suite.yaml").is_file() and not resume:
        raise InputError(f"{out}: holds a suite: give --resume, or another --out")
    _check_method(suite.method.name)
    _check_apart(suite)
    _check_shots(suite)
    write_atomically(out / "suite.yaml", to_yaml(suite).encode())
    sources = {
        task: _run(suite, task, suite.source_shots, suite.seeds[0], out / "sources" / task)
        for task in suite.tasks
    }
    _do(list(sources.values()), engine, log)
    for target, task in permutations(sources, 2):
        artefact = RunFolder(sources[task].out).prompt.read_bytes()
        write_atomically(out / "from" / target / f"{task}.safetensors", artefact)
    runs = {
        (target, shots, seed, source): _target(suite, target, shots, seed, source, out)
        for target, shots, seed in _cells(suite)
        for source in [NONE, *(task for task in suite.tasks if task != target)]
    }
    _do(list(runs.values()), engine, log)
    accuracies = {
        cell: json.loads(RunFolder(config.out).result.read_text())["accuracy"]
        for cell, config in runs.items()
    }
    choices = {cell: _choice(suite, *cell, out) for cell in _cells(suite)}
    found = summarise(accuracies, choices)
    write_atomically(out / "transfer.json", json.dumps(found, indent=2).encode())
    draw(found, list(suite.tasks), out / "transfer.png")
    return found


def summarise(
    accuracies: Outcomes, choices: Mapping[tuple[str, int | None, int], str]
) -> dict[str, Any]:
    """Gains over scratch with their intervals, and how often the chosen source wins.

    Returns:
        `cells`: of each target, shots and source, or `auto`, the `accuracy` and the `gain` (means
        over seeds), the `interval` of the gain (95 %, Student's t of the seeds' paired differences;
        None with one seed), and `negative`, True where all of it is below 0. `auto`: of the number
        of `choices`, those that are at least as good as scratch, better, and at least as good as
        the mean of all sources, a random one's expected accuracy.
    """
    cells = []
    sources: dict[tuple[str, int | None], list[str]] = {}
    for target, shots, _, source in accuracies:
        names = sources.setdefault((target, shots), [])
        names += [source] * (source not in {NONE, *names})
    seeds = list(dict.fromkeys(seed for _, _, seed, _ in accuracies))
    wins = {"choices": 0, "at_least_scratch": 0, "better": 0, "at_least_random": 0}
    for (target, shots), names in sources.items():
        scratch = [accuracies[target, shots, seed, NONE] for seed in seeds]
        by_source = {s: [accuracies[target, shots, seed, s] for seed in seeds] for s in names}
        by_source["auto"] = [
            accuracies[target, shots, seed, choices[target, shots, seed]] for seed in seeds
        ]
        for source, own in {NONE: scratch, **by_source}.items():
            gains = [a - b for a, b in zip(own, scratch, strict=True)]
            bounds = None if source == NONE else interval(gains)
            cells.append(
                {
                    **{"target": target, "shots": shots, "source": source},
                    **{"accuracy": mean(own), "gain": mean(gains), "interval": bounds},
                    "negative": bool(bounds and bounds[1] < 0),
                }
            )
        random = [mean(each) for each in zip(*(by_source[s] for s in names), strict=True)]
        for auto, other, drawn in zip(by_source["auto"], scratch, random, strict=True):
            wins["choices"] += 1
            wins["at_least_scratch"] += auto >= other
            wins["better"] += auto > other
            wins["at_least_random"] += auto >= drawn
    chosen = [
        {"target": target, "shots": shots, "seed": seed, "source": source}
        for (target, shots, seed), source in choices.items()
    ]
    return {"cells": cells, "auto": wins, "chosen": chosen}


def interval(gains: Sequence[float]) -> list[float] | None:
    """95 % interval of the mean of paired differences, by Student's t; None of a single one."""
    if len(gains) < 2:
        return None
    width = float(student.ppf(0.975, len(gains) - 1)) * stdev(gains) / len(gains) ** 0.5
    return [mean(gains) - width, mean(gains) + width]


def draw(found: Mapping[str, Any], tasks: Sequence[str], path: Path) -> None:
    """Heat maps of the gains, a number of shots each, in points; bold where the interval is not 0.

    Rows are sources, and last the chosen one; columns are targets.
    """
    shots = list(dict.fromkeys(cell["shots"] for cell in found["cells"]))
    rows = [*tasks, "auto"]
    gains = np.full((len(shots), len(rows), len(tasks)), np.nan)
    sure = np.zeros_like(gains, dtype=bool)
    for cell in found["cells"]:
        if cell["source"] == NONE:
            continue
        place = shots.index(cell["shots"]), rows.index(cell["source"]), tasks.index(cell["target"])
        gains[place] = 100 * cell["gain"]
        sure[place] = bool(cell["interval"]) and not cell["interval"][0] <= 0 <= cell["interval"][1]
    most = max(float(np.nanmax(np.abs(gains))), 0.1)
    size = (1.2 + len(shots) * (0.9 * len(tasks) + 0.8), 1.6 + 0.6 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    all_axes = figure.subplots(1, len(shots), squeeze=False, sharey=True)[0]
    for number, axes in enumerate(all_axes):
        image = axes.imshow(gains[number], cmap="RdBu", vmin=-most, vmax=most)
        for row, column in np.argwhere(np.isfinite(gains[number])):
            value, bold = gains[number, row, column], sure[number, row, column]
            weight = "bold" if bold else "normal"
            axes.text(column, row, f"{value:+.1f}", ha="center", va="center", weight=weight)
        axes.set_xticks(range(len(tasks)), tasks, rotation=90)
        axes.set_yticks(range(len(rows)), rows)
        axes.set(title=f"{shots[number] or 'all'} a class", xlabel="target")
    all_axes[0].set(ylabel="source")
    figure.colorbar(image, ax=all_axes, label="gain over scratch, points")
    save(figure, path, tasks)


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The matrix as text, a line a cell, then how the choice fared."""
    for cell in found["cells"]:
        shots, accuracy = cell["shots"] or "all", f"{cell['accuracy']:.1%}"
        line = f"{cell['target']:16} {shots:>4} a class  from {cell['source']:16} {accuracy}"
        if cell["source"] != NONE:
            line += f"  {100 * cell['gain']:+.1f}"
            if cell["interval"]:
                low, high = (100 * bound for bound in cell["interval"])
                line += f" [{low:+.1f}, {high:+.1f}]"
            line += "  negative transfer" * cell["negative"]
        yield line
    auto = found["auto"]
    yield (
        f"auto: of {auto['choices']} choices {auto['at_least_scratch']} are at least as good as "
        f"scratch ({auto['better']} better), {auto['at_least_random']} as a random source"
    )


def _cells(suite: TransferConfig) -> list[tuple[str, int | None, int]]:
    return list(product(suite.tasks, suite.shots, suite.seeds))


def _run(
    suite: TransferConfig, task: str, shots: int | None, seed: int, out: Path, **changes: Any
) -> RunConfig:
    own = {name: getattr(suite, name) for name in RunConfig.model_fields}
    root = suite.tasks[task].root
    data = {"shots": shots, "seed": seed, "root": root and root.expanduser().absolute()}
    return RunConfig.model_construct(
        **own
        | {
            "tasks": {},
            "backbone": suite.backbone.model_copy(
                update={"checkpoint": absolute(suite.backbone.checkpoint)}
            ),
            "data": suite.tasks[task].model_copy(update=data),
            "train": suite.train.model_copy(update={"seed": seed}),
            "out": out,
            **changes,
        }
    )


def _target(
    suite: TransferConfig, target: str, shots: int | None, seed: int, source: str, out: Path
) -> RunConfig:
    name = f"{target}-{'all' if shots is None else shots}shot-seed{seed}-from-{source}"
    path = out / "from" / target / f"{source}.safetensors"
    start = None if source == NONE else str(path)
    return _run(suite, target, shots, seed, out / "runs" / name, init_from=start)


def _choice(suite: TransferConfig, target: str, shots: int | None, seed: int, out: Path) -> str:
    """The choice of `init_from=auto`; nothing is trained."""
    start = f"{AUTO}{out / 'from' / target}"
    config = _run(suite, target, shots, seed, out / "chosen", init_from=start)
    data = config.data.model_copy(update={"duplicates": "ignore"})
    prepared = prepare(config.model_copy(update={"data": data}), log=lambda line: None)
    return prepared.started["init_from"]["name"]


def _check_method(name: str) -> None:
    """Refuses a method without anything of images that could carry over."""
    method = methods.find(name)
    if method.solved or method.frozen_features:
        raise InputError(
            f"method.name={name}: it changes no image features, by which a source is chosen: give "
            "one that does, such as vpt_deep"
        )


def _check_apart(suite: TransferConfig) -> None:
    """Refuses tasks that share an image: the source might have trained on the target's test."""
    owner: dict[bytes, str] = {}
    for task, data in suite.tasks.items():
        for samples in open_source(data).parts.values():
            for name, image in zip(samples.names, samples.hashes(), strict=True):
                if owner.setdefault(image, task) != task:
                    raise InputError(
                        f"tasks.{task}: {name} is an image of {owner[image]} too: give tasks that "
                        "share none"
                    )


def _check_shots(suite: TransferConfig) -> None:
    """Refuses numbers of shots that a task lacks, before the first run."""
    for task, data in suite.tasks.items():
        source = open_source(data)
        wanted = [(suite.source_shots, suite.seeds[0]), *product(suite.shots, suite.seeds)]
        for shots, seed in wanted:
            try:
                split_data(source, data.model_copy(update={"shots": shots, "seed": seed}))
            except InputError as error:
                many = shots or "all"
                raise InputError(f"tasks.{task} at {many} images a class: {error}") from None


def _do(configs: Sequence[RunConfig], engine: Engine, log: Log) -> None:
    """Do the runs.

    Raises:
        InputError: one could not be done; those that can are done first.
    """
    failures = []
    outcomes = run_all(configs, engine)
    with closing(outcomes):
        for config, failure in outcomes:
            if failure:
                failures.append(f"{config.out.name}: {failure}")
                continue
            accuracy = json.loads(RunFolder(config.out).result.read_text())["accuracy"]
            log(f"{config.out.parent.name}/{config.out.name}: {accuracy:.1%}")
    if failures:
        raise InputError(f"{len(failures)} runs failed, first {failures[0]}")
