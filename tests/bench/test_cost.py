"""`vpt bench cost`: each method trains and serves in its own processes, one row each."""

import json

import pytest
from tiny import vpt_cli

from vpt.bench import cost, energy
from vpt.config import load_run

KEYS = ["data.name=digits", "backbone.name=tiny_clip", "data.shots=2"]


def test_a_row_a_method(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(cost, "METHODS", ("linear_probe",))
    options = ["--rounds", "1", "--out", tmp_path]
    code, out, _ = vpt_cli(capfd, monkeypatch, "bench", "cost", *KEYS, *options)
    assert code == 0
    (row,) = json.loads((tmp_path / "cost.json").read_text())["rows"]
    assert row["method"] == "linear_probe"
    assert row["tunable_parameters"] == 10 * (128 + 1)
    assert "20 training images" in out
    assert row["of_bare"] > 0
    assert set(row["train_wh"]) == set(energy.meters())
    assert ("No energy" in out) == (not energy.meters())


def test_what_a_task_costs_is_its_own_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "TASKS", 3)
    rows = {}
    for method in ("linear_probe", "full_finetune"):
        keys = [*KEYS, f"out={tmp_path}/{method}"]
        if method == "full_finetune":
            keys.append("train.epochs=1")
        config = load_run(method, keys)
        rows[method] = cost._train(config) | cost._serve(config, 1)
    probe, full = rows["linear_probe"], rows["full_finetune"]
    assert probe["memory_mb"] < 0.02
    assert full["memory_mb"] == pytest.approx(4e-6 * full["tunable_parameters"], rel=0.05)
    assert full["stored_mb"] == pytest.approx(full["memory_mb"], rel=0.05)
    assert probe["backbone_mb"] == full["backbone_mb"] > full["memory_mb"]
    assert full["trained"] and not probe["trained"]
    cost._table([probe, full])


@pytest.mark.parametrize("found", [[], ["cpu"]])
def test_energy_is_of_what_has_a_meter(found, monkeypatch):
    pytest.importorskip("codecarbon")
    monkeypatch.setattr(energy, "meters", lambda: found)
    result, watt_hours = energy.estimate(lambda: sum(range(10**6)))
    assert result == 499_999_500_000
    assert list(watt_hours) == found
    assert all(value > 0 for value in watt_hours.values())
