"""A suite as independent runs: each has a folder of its own; an engine does them in any order."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from vpt import methods
from vpt.config import AUTO, Parts, RunConfig, Seed, SuiteConfig, compose
from vpt.data import layouts
from vpt.data.cards import load_card
from vpt.errors import InputError
from vpt.folder import RunFolder, default_folder
from vpt.run import check_method, run

RETRIES = 3  # of a run whose process or node died

Outcome = tuple[RunConfig, str | None]  # a run, and why it could not be done
Engine = Callable[[Sequence[RunConfig]], Iterator[Outcome]]


@dataclass(frozen=True, eq=False)
class Cell:
    """A method on a data set with so many shots; `settings`: one, or those to choose from."""

    settings: list[RunConfig]
    seeds: list[Seed]
    split: Parts
    out: Path

    @property
    def candidates(self) -> list[RunConfig]:
        """A run of each setting on the first seed, which never reads the test part."""
        if len(self.settings) == 1:
            return []
        return [self._run(setting, self.seeds[0], "train-val") for setting in self.settings]

    def finals(self, setting: RunConfig) -> list[RunConfig]:
        """A run of `setting` on each seed: those that are reported."""
        return [self._run(setting, seed, self.split) for seed in self.seeds]

    def _run(self, setting: RunConfig, seed: Seed, split: Parts) -> RunConfig:
        data = setting.data.model_copy(update={"seed": seed, "split": split})
        tests = {} if split == "train-val" else setting.tests
        train = setting.train.model_copy(update={"seed": seed})
        config = setting.model_copy(update={"data": data, "train": train, "tests": tests})
        folder = self.out / ("grid" if split == "train-val" else "runs")
        name = f"{default_folder(config).name}-{config.hash}"
        return config.model_copy(update={"out": folder / name})


def cells(suite: SuiteConfig, out: Path) -> list[Cell]:
    """Every method on every data set with every number of shots; the runs go below `out`.

    Raises:
        InputError: no such method or data set, or settings that do not fit.
    """
    named = {name: name.partition("/") for name in suite.settings}
    for method in [*suite.grid, *(method for method, _, _ in named.values())]:
        if method != AUTO:
            methods.find(method)
    for _, _, data in named.values():
        if data:
            load_card(data)
    return [
        Cell(
            [
                _setting(suite, method, data, shots, point)
                for point in _points(suite.grid.get(method, {}))
            ],
            suite.seeds,
            suite.split,
            out.absolute(),
        )
        for data, shots, method in itertools.product(suite.data, suite.shots, suite.methods)
    ]


def run_cells(todo: Sequence[Cell], engine: Engine) -> Iterator[Outcome]:
    """Do the runs of all cells, the candidates first; gives each outcome as soon as it is known.

    Finished runs are not repeated. Where no candidate of a cell could be run, its final runs fail
    with the reason of the first.
    """
    failures = {}
    for config, failure in run_all([c for cell in todo for c in cell.candidates], engine):
        failures[config.out] = failure
        yield config, failure
    finals = []
    for cell in todo:
        tried = list(zip(cell.settings, cell.candidates, strict=False))  # of one setting: none
        done = [(s, candidate) for s, candidate in tried if failures[candidate.out] is None]
        if tried and not done:
            reason = failures[tried[0][1].out]
            yield from ((config, reason) for config in cell.finals(cell.settings[0]))
        else:
            setting = min(done, key=_rank)[0] if done else cell.settings[0]
            finals += cell.finals(setting)
    yield from run_all(finals, engine)


def attempt(config: RunConfig) -> str | None:
    """Do the run of `config` in its folder; why it could not be done, in one line.

    A process that has the same run, such as one on a node believed dead, is waited for, and what
    it did is not repeated. Its lock ends with it.
    """
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        with FileLock(config.out / ".lock"):
            RunFolder(config.out).failure.unlink(missing_ok=True)
            run(config, resume=True, log=lambda line: None, progress=False)
    except InputError as error:
        return str(error)
    except Exception as error:  # no run may end the others
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def run_all(configs: Sequence[RunConfig], engine: Engine) -> Iterator[Outcome]:
    """Do the runs that are not finished; gives each outcome as soon as it is known."""
    waiting = []
    for config in configs:
        folder = RunFolder(config.out)
        done = [folder.result, *(folder.test(name) for name in config.tests)]
        if all(path.is_file() for path in done):
            yield config, None
        else:
            waiting.append(config)
    if waiting:
        yield from engine(waiting)


def _rank(tried: tuple[RunConfig, RunConfig]) -> tuple[float, float]:
    """The best first: by accuracy after the last epoch, ties to the lower learning rate."""
    setting, candidate = tried
    result = json.loads(RunFolder(candidate.out).result.read_text())
    return -result["accuracy"], setting.train.lr


def _setting(
    suite: SuiteConfig, method: str, data: str, shots: int | None, point: dict[str, Any]
) -> RunConfig:
    checkpoint = absolute(suite.backbone.checkpoint)
    config = compose(
        method,
        {"backbone": {"name": suite.backbone.name, "checkpoint": checkpoint}},
        {"engine": suite.engine.model_dump(mode="json", exclude_unset=True)},
        suite.settings.get(method, {}),
        suite.settings.get(f"{method}/{data}", {}),
        point,
        {"data": {"name": data, "root": _root(suite, data), "shots": shots}},
        {"data": {"class_half": suite.class_half}} if suite.class_half else {},
        {"tests": {name: _test(suite, keys) for name, keys in suite.tests.items()}},
        where=f"{method} on {data}",
    )
    check_method(config)
    return config


def _test(suite: SuiteConfig, keys: dict[str, Any]) -> dict[str, Any]:
    """The keys of a test, with the place of the data set that they name."""
    return {**keys, "root": _root(suite, keys["name"])} if "name" in keys else keys


def _root(suite: SuiteConfig, data: str) -> str | None:
    if layouts.find(load_card(data).layout).ROOT is None:
        return None
    if suite.root is None:
        raise InputError(f"{data}: give root=DIR, the folder of the data sets")
    # a process elsewhere has another working directory
    return str(suite.root.expanduser().absolute() / suite.path.format(data))


def absolute(checkpoint: str | None) -> str | None:
    """A checkpoint as a process elsewhere finds it: a file's whole path, or a hub's tag."""
    is_file = checkpoint is not None and Path(checkpoint).is_file()
    return str(Path(checkpoint).absolute()) if is_file else checkpoint


def _points(grid: dict[str, dict[str, list[Any]]]) -> list[dict[str, Any]]:
    """Every combination of the values, as settings; the empty one where there are none."""
    axes = [
        [(section, key, value) for value in values]
        for section, keys in grid.items()
        for key, values in keys.items()
    ]
    points = []
    for choice in itertools.product(*axes):
        point: dict[str, Any] = {}
        for section, key, value in choice:
            point.setdefault(section, {})[key] = value
        points.append(point)
    return points
