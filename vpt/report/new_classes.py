"""Runs' `tests`: base and new classes with their harmonic mean, and other data sets."""

from typing import Literal

import pandas as pd
from pandas.io.formats.style import Styler
from pydantic import BaseModel

from vpt.report.runs import CELL, parse, shots_text
from vpt.report.tables import percent

OWN = "own test images"


class Test(BaseModel):
    """Fields of a file of a run's `tests` that a report reads."""

    accuracy: float
    class_half: Literal["base", "new"] | None = None


def make_tests(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a cell with tests: mean accuracies over seeds, and sample deviations as `NAME_std`.

    Of a method with several data sets, a further row is the mean over these. The harmonic mean of
    base and new classes is that of the two means, as Zhou et al. 2022 (CoCoOp) have it.

    Raises:
        InputError: a file of a test that is not what a run writes.
    """
    rows, new = [], set()
    for run in runs.itertuples():
        row = {key: getattr(run, key) for key in CELL} | {OWN: run.accuracy}
        for path in sorted(run.folder.path.glob("tests/*.json")):
            test = parse(Test, path.read_bytes(), path)
            row[path.stem] = test.accuracy
            new |= {path.stem} if test.class_half == "new" else set()
        if len(row) > len(CELL) + 1:
            rows.append(row)
    if not rows:
        return pd.DataFrame()
    groups = pd.DataFrame(rows).groupby(CELL)
    means, others = groups.mean(), CELL[1:]
    averaged = means.groupby(level=others).filter(lambda part: len(part) > 1)
    averaged = averaged.groupby(level=others).mean().assign(data="mean of the data sets")
    table = pd.concat([means, averaged.set_index("data", append=True).reorder_levels(CELL)])
    tests = sorted(set(table) - {OWN})
    for name in sorted(new):
        table[f"harmonic mean with {name}"] = 2 / (1 / table[OWN] + 1 / table[name])
    if len(elsewhere := sorted(set(tests) - new)) > 1:
        table["mean of the tests"] = table[elsewhere].mean(axis="columns", skipna=False)
    return table.join(groups.std().add_suffix("_std")).join(groups.size().rename("seeds"))


def tests_table(tests: pd.DataFrame) -> Styler:
    """Results of `make_tests`, in percent."""
    names = [name for name in tests if not name.endswith("_std") and name != "seeds"]
    shown = {
        name: [
            percent(100 * mean, *([100 * spread] if name + "_std" in tests else []))
            for mean, spread in zip(tests[name], tests.get(name + "_std", tests[name]), strict=True)
        ]
        for name in names
    }
    table = tests.index.to_frame(index=False).assign(**shown)
    table["shots"] = table.shots.map(shots_text)
    return table.style.format(escape="html").hide(axis="index").set_uuid("tests")
