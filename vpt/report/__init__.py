"""`vpt report`: all runs below a folder as one page, CSV files and LaTeX tables."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader
from pydantic import BaseModel

from vpt import resources
from vpt.config import Published
from vpt.data.cards import Card, load_card
from vpt.files import write_atomically
from vpt.progress import Log
from vpt.report.new_classes import make_tests, tests_table
from vpt.report.plots import draw_plots
from vpt.report.runs import caveats, find_runs, read_curves, read_runs, shots_text
from vpt.report.tables import MEAN, Column, accuracy_table, cell_table, make_cells
from vpt.settings import read_yaml, validate

PAGES = Environment(loader=PackageLoader("vpt", "report"), autoescape=True, trim_blocks=True)


class _Suite(BaseModel):
    """Fields of suite.yaml that a report reads."""

    published: dict[str, list[Published]] = {}  # group of data sets → results for its mean


def report(folder: Path, out: Path, log: Log = print) -> Path:
    """Write a page, CSV and LaTeX of all runs below `folder` into `out`.

    report.html, report.csv and report.tex are of finished runs; left_out.csv says which runs are
    in none of them, and why; tests.csv is of runs with `tests`.

    Args:
        folder: holds run folders, at any depth.
        out: the tables and the page go there.
        log: takes lines for the user.

    Returns:
        The page.

    Raises:
        InputError: no finished run, or a file of one that is not what a run writes.
    """
    finished, others = find_runs(folder)
    cards = {name: load_card(name) for name in resources.names("datasets")}
    runs = read_runs(finished, cards)
    again = runs.config_hash.duplicated()
    others |= dict.fromkeys(runs.folder[again], "repeats another run")
    left_out = {str(run.path.relative_to(folder)): why for run, why in others.items()}
    runs = runs[~again]
    notes = caveats(runs)
    for line in (*(f"{run}: left out: {why}" for run, why in left_out.items()), *notes):
        log(line)

    cells = make_cells(runs)
    table = accuracy_table(cells, cards, _published(folder, cards))
    tests = make_tests(runs)
    page = PAGES.get_template("page.html").render(
        num_runs=len(runs),
        cells=cells,
        notes=notes,
        left_out=left_out,
        medical=any(cards[name].medical for name in set(runs.card) & set(cards)),
        table=table,
        every_cell=cell_table(cells),
        tests=None if tests.empty else tests_table(tests),
        plots=draw_plots(cells, read_curves(runs)),
    )
    tex = f"% needs booktabs and multirow\n{table.to_latex()}"
    if not tests.empty:
        write_atomically(out / "tests.csv", tests.to_csv().encode())
    csv = cells.assign(shots=cells.shots.map(shots_text)).to_csv(index=False)
    reasons = pd.Series(left_out, name="why").to_csv(index_label="run")
    write_atomically(out / "report.tex", tex.encode())
    write_atomically(out / "report.csv", csv.encode())
    write_atomically(out / "left_out.csv", reasons.encode())
    write_atomically(out / "report.html", page.encode())
    return out / "report.html"


def _published(folder: Path, cards: Mapping[str, Card]) -> list[tuple[Column, Published]]:
    """Published results of the cards, and of the suites below `folder`, each with its column."""
    found = [
        ((card.group or "", name), result)
        for name, card in cards.items()
        for result in card.published
    ]
    for path in sorted(folder.rglob("suite.yaml")):
        suite = validate(_Suite, dict(read_yaml(path)), where=str(path))
        for group, results in suite.published.items():
            found += [((MEAN, group), result) for result in results]
    return found
