"""`vpt quickstart`: its files and table, and, slowly, its accuracies."""

import json
from functools import partial

import pytest
from golden_case import GOLDEN
from PIL import Image
from tiny import vpt_cli

from vpt import quickstart

EXPECTED = json.loads((GOLDEN / "quickstart.json").read_text())


@pytest.fixture
def cli(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    return partial(vpt_cli, capfd, monkeypatch)


def check(out, err, code, folder, chosen, seeds):
    """The table's numbers are those of result.json, which are the means over the runs."""
    assert code == 0, err
    summary = json.loads((folder / "result.json").read_text())
    assert [row["method"] for row in summary["rows"]] == chosen
    assert summary["seeds"] == seeds
    for row in summary["rows"]:
        name = row["method"]
        runs = [folder / f"{name}-seed{seed}" for seed in range(1, seeds + 1)]
        results = [json.loads((run / "result.json").read_text()) for run in runs]
        assert [result["seed"] for result in results] == list(range(1, seeds + 1))
        accuracies = [result["accuracy"] for result in results]
        assert row["accuracy"] == pytest.approx(sum(accuracies) / seeds)
        assert (row["accuracy_std"] is None) == (seeds == 1)
        assert row["tunable_parameters"] == EXPECTED[name]["tunable_parameters"]
        (line,) = (x for x in out.splitlines() if x.startswith(f"│ {quickstart.METHODS[name]} "))
        assert f"{row['accuracy']:.1%}" in line
        assert f"{row['tunable_parameters']:,}" in line
    with Image.open(folder / "figure.png") as figure:
        assert min(figure.size) > 400
        assert len(figure.convert("L").getcolors()) > 50  # bars and matrices, not a blank page
    assert f"Artefacts, result.json and figure.png are in {folder}/" in out.replace("\n", "")
    return {row["method"]: row["accuracy"] for row in summary["rows"]}


def test_two_methods(tmp_path, cli, monkeypatch):
    methods = {name: quickstart.METHODS[name] for name in ("zero_shot", "vpt_deep")}
    monkeypatch.setattr(quickstart, "METHODS", methods)
    fast = ["train.epochs=1", "train.min_steps=0", "train.folds=null"]
    fast += ["data.shots=4", "data.calibration=0.8"]  # held out, so that fewer are tested on
    real = quickstart.load_run
    monkeypatch.setattr(quickstart, "load_run", lambda name, given: real(name, [*given, *fast]))
    folder = tmp_path / "new"
    code, out, err = cli("quickstart", "--out", folder, "--seeds", 2)
    accuracies = check(out, err, code, folder, list(methods), seeds=2)
    assert accuracies["zero_shot"] == pytest.approx(EXPECTED["zero_shot"]["accuracy"], abs=0.05)
    written = (folder / "vpt_deep-seed2" / "result.json").stat().st_mtime_ns
    code, out, err = cli("quickstart", "--out", folder, "--seeds", 2)
    assert check(out, err, code, folder, list(methods), seeds=2) == accuracies
    assert (folder / "vpt_deep-seed2" / "result.json").stat().st_mtime_ns == written


@pytest.mark.slow
def test_accuracies_stay(tmp_path, cli):
    code, out, err = cli("quickstart", "--out", tmp_path)
    accuracies = check(out, err, code, tmp_path, list(EXPECTED), seeds=1)
    for name, row in EXPECTED.items():
        assert accuracies[name] == pytest.approx(row["accuracy"], abs=2e-3), name
