"""Means and standard deviations over seeds, means over groups of data sets, published results."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from pandas.io.formats.style import Styler

from vpt.config import Published
from vpt.data.cards import Card
from vpt.report.runs import CELL, INTERVALS, METRICS, shots_text

VTAB = ["natural", "specialized", "structured"]  # groups of VTAB-1k
Column = tuple[str, str]  # group of data sets; data set, or what the mean is over
MEAN = "mean"
UNTRAINED = (
    "†n/m: cross-validation on the training images left n of m seeds untrained, as the method "
    "starts, such as at the linear probe."
)


def make_cells(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a cell: mean and sample standard deviation (NaN of one run) of its `n` runs.

    The bounds of its runs' intervals, `NAME_low` and `NAME_high`, are averaged too.
    """
    metrics = {name: (name, "mean") for name in METRICS}
    metrics |= {f"{name}_std": (name, "std") for name in METRICS}
    bounds = [f"{name}_{bound}" for name in INTERVALS for bound in ("low", "high")]
    metrics |= {bound: (bound, "mean") for bound in bounds}
    return runs.groupby(CELL, as_index=False).agg(
        card=("card", "first"),
        n=("seed", "size"),
        seeds=("seed", _each),
        left_untrained=("left_untrained", "sum"),
        **metrics,
        num_test=("num_test", _each),
        tunable_parameters=("tunable_parameters", "first"),
        stored_parameters=("stored_parameters", "first"),
        train_seconds=("train_seconds", "mean"),
        device=("device", _each),
        version=("version", _each),
    )


def cell_table(cells: pd.DataFrame) -> Styler:
    """Every cell with the metrics that any has, those of METRICS in percent."""
    shown = {key: cells[key] for key in CELL} | {"shots": cells.shots.map(shots_text)}
    shown["seeds"] = cells.n
    if cells.left_untrained.any():
        shown["left untrained"] = cells.left_untrained
    for name, words in METRICS.items():
        parts = [f"{name}{part}" for part in ("", "_std", "_low", "_high")]
        values = 100 * cells.reindex(columns=parts)  # not every metric has an interval
        if values[name].notna().any():
            shown[words] = [
                percent(mean, spread) + _interval(low, high)
                for mean, spread, low, high in values.itertuples(index=False)
            ]
    shown["test images"] = cells.num_test
    shown["tunable parameters"] = cells.tunable_parameters.map("{:,}".format)
    # not every run says it
    shown["stored parameters"] = cells.stored_parameters.map("{:,}".format, na_action="ignore")
    shown["seconds to train"] = cells.train_seconds.map("{:,.2f}".format)
    shown["device"] = cells.device
    table = pd.DataFrame(shown).style.format(escape="html", na_rep="")
    return table.hide(axis="index").set_uuid("cells")


@dataclass(frozen=True)
class AccuracyTable:
    """Accuracy in percent as text: rows are shots × backbone × method, columns data sets, means."""

    text: pd.DataFrame
    best: pd.DataFrame  # where to print in bold
    note: str  # on the marks, if there are any
    sources: list[str]  # of the published rows, by their numbers

    def to_html(self) -> str:
        """A table element."""
        return self._styled("html").to_html()

    def to_latex(self) -> str:
        """A tabular environment, the note, and a second tabular of the sources if there are any."""
        alignment = "l" * self.text.index.nlevels + "r" * self.text.shape[1]
        table = self._styled("latex").to_latex(
            column_format=alignment,
            convert_css=True,
            hrules=True,
            multicol_align="c",
            multirow_align="t",
        )
        below = [f"{self.note}\n"] if self.note else []
        if self.sources:
            numbers = range(1, len(self.sources) + 1)
            sources = pd.DataFrame({"published": self.sources}, index=numbers)
            below.append(sources.to_latex(escape=True))
        return "\n".join([table, *below])

    def _styled(self, escape: str) -> Styler:
        bold = self.best.replace({True: "font-weight: bold", False: ""})
        styler = self.text.style.format(escape=escape).apply(lambda _: bold, axis=None)
        styler.set_uuid("accuracy")  # else random
        styler.format_index(escape=escape, axis="columns")
        styler.format_index(escape=escape, level=["backbone", "method"])
        return styler.format_index(shots_text, level="shots")


def accuracy_table(
    cells: pd.DataFrame,
    cards: Mapping[str, Card],
    published: Sequence[tuple[Column, Published]],
) -> AccuracyTable:
    """Methods against data sets; a mean stands only where no data set of its group is missing.

    Args:
        cells: from `make_cells`.
        cards: all data cards by name; their groups are what is averaged.
        published: results of papers; those are shown that have a run of ours to stand beside.
    """
    numbers, text = _ours(cells, cards)
    beside, sources = _beside(numbers, published)
    text = pd.concat([text, beside]).fillna("")
    text = text.sort_index(level="shots", sort_remaining=False, kind="stable")
    blocks = numbers.groupby(level=["shots", "backbone"])
    best = (numbers == blocks.transform("max")) & (blocks.transform("count") > 1)
    best = best.reindex_like(text).eq(True)
    if not any(group for group, _ in numbers):
        text.columns = best.columns = text.columns.droplevel(0)
    note = UNTRAINED if cells.left_untrained.any() else ""
    return AccuracyTable(text, best, note, sources)


def _ours(cells: pd.DataFrame, cards: Mapping[str, Card]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Means as numbers, NaN where one is missing, and as text."""
    marked = [
        percent(100 * cell.accuracy, 100 * cell.accuracy_std)
        + (f" †{cell.left_untrained}/{cell.n}" if cell.left_untrained else "")
        for cell in cells.itertuples()
    ]
    own = cells.assign(text=marked).pivot(index=CELL[1:], columns="data")
    means = 100 * own["accuracy"]
    numbers, text = {}, {}
    for column in sorted((_group(cards, name), name) for name in means):
        numbers[column] = means[column[1]]
        text[column] = own["text", column[1]]
    for column, parts in _averaged(means, cards).items():
        numbers[column] = parts.mean(axis="columns", skipna=False)
        counts = parts.count(axis="columns")
        text[column] = [
            f"{count}/{parts.shape[1]}" if math.isnan(mean) and count else percent(mean)
            for mean, count in zip(numbers[column], counts, strict=True)
        ]
    return pd.DataFrame(numbers), pd.DataFrame(text, index=means.index)


def _beside(
    numbers: pd.DataFrame, published: Sequence[tuple[Column, Published]]
) -> tuple[pd.DataFrame, list[str]]:
    """Rows of published results, as text, where `numbers` has some; and their sources."""
    rows, sources = defaultdict(dict), []
    for column, result in published:
        shots = result.shots or math.inf
        if column in numbers and numbers[column].groupby("shots").count().get(shots):
            sources += [result.source] if result.source not in sources else []
            method = f"{result.method}, published [{sources.index(result.source) + 1}]"
            rows[shots, result.backbone, method][column] = percent(100 * result.accuracy)
    index = pd.MultiIndex.from_tuples(rows, names=numbers.index.names)
    return pd.DataFrame(list(rows.values()), index=index, columns=numbers.columns), sources


def _averaged(means: pd.DataFrame, cards: Mapping[str, Card]) -> dict[Column, pd.DataFrame]:
    """Columns that each mean is over, with a column of NaN for what is missing."""
    groups = defaultdict(list)
    for name in cards:
        groups[_group(cards, name)].append(name)
    parts = {group: means.reindex(columns=members) for group, members in groups.items()}
    ours = {_group(cards, name) for name in means} - {""}
    averaged = {(MEAN, group): parts[group] for group in sorted(ours)}
    if ours & set(VTAB):
        tasks = pd.concat([parts[group] for group in VTAB], axis="columns")
        over_groups = {group: parts[group].mean(axis="columns", skipna=False) for group in VTAB}
        averaged[MEAN, f"{tasks.shape[1]} tasks"] = tasks
        averaged[MEAN, "3 groups"] = pd.DataFrame(over_groups)
    return averaged


def _group(cards: Mapping[str, Card], name: str) -> str:
    return (cards[name].group or "") if name in cards else ""


def percent(mean: float, spread: float | None = None) -> str:
    """`mean ± spread` in percent; no spread of one run is a dash, no mean is nothing."""
    if math.isnan(mean):
        return ""
    if spread is None:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± " + ("–" if math.isnan(spread) else f"{spread:.1f}")


def _interval(low: float, high: float) -> str:
    return "" if math.isnan(low) else f" [{low:.1f}–{high:.1f}]"


def _each(values: pd.Series) -> str:
    return ", ".join(str(value) for value in sorted(set(values)))
