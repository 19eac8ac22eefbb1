"""`vpt bench speed` on tiny towers: a row for each work, and none where the paths disagree."""

import json

import pytest

from vpt.bench import speed, speed_clip
from vpt.bench.speed import Work, measure, measure_run, works
from vpt.bench.speed_clip import clip_works
from vpt.bench.speed_table import bench
from vpt.errors import InputError


def test_speed_writes_a_row_for_each_work(tmp_path):
    bench(tmp_path, rounds=1, small=True, run=True)
    result = json.loads((tmp_path / "speed.json").read_text())
    *steps, run = result["rows"]
    assert len(steps) == len(works(small=True)) + len(clip_works(small=True))
    for row in steps:
        assert row["disagreement"] < 1e-4
        assert row["flop_ratio"] > 1
    assert run["disagreement"] < 1e-2


def test_nothing_is_measured_where_the_paths_disagree():
    work = works(small=True)[0]
    wrong = Work("wrong", engine=work.engine, tokens=lambda: [t + 1 for t in work.tokens()])
    with pytest.raises(InputError, match="wrong: engine and tokens differ"):
        list(measure([wrong], rounds=1))


@pytest.mark.parametrize("number", range(len(clip_works(small=True))))
def test_works_on_clip_compare_what_training_needs(number, monkeypatch):
    work = clip_works(small=True)[number]
    real = speed._all_positions
    monkeypatch.setattr(speed_clip, "_all_positions", lambda *which: real(*which) * 1.01)
    with pytest.raises(InputError, match=f"{work.name}: engine and tokens differ"):
        list(measure([work], rounds=1))


def test_no_run_is_measured_where_the_paths_disagree(monkeypatch):
    real = speed._all_positions
    monkeypatch.setattr(speed, "_all_positions", lambda model: real(model).flip(0))
    with pytest.raises(InputError, match=r"CoOp run, .*: engine and tokens differ"):
        measure_run(epochs=1, shots=1, classes=6)
