"""Source → target: gains over scratch, their intervals, what is chosen, and what is refused."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
from scipy.stats import ttest_rel
from tiny import vpt_cli, write_image

from vpt.bench.suite import attempt
from vpt.bench.transfer import draw, interval, lines, summarise, transfer
from vpt.errors import InputError
from vpt.training.start import NONE

CLASSES = {"pets": ["cat", "dog"], "cars": ["van", "bus", "jeep"]}


def inline(configs):
    """An engine in this process."""
    for config in configs:
        yield config, attempt(config)


@pytest.fixture
def folders(tmp_path):
    for task, names in CLASSES.items():
        for label, name in enumerate(names):
            for index in range(6):
                write_image(tmp_path / task / name / f"{index}.png", label, index + 50 * len(names))
    return tmp_path


def keys(folders, *extra):
    return [
        *(f"tasks.{name}.root={folders / name}" for name in CLASSES),
        *("backbone.name=tiny_clip", "method.num_tokens=2", "train.epochs=1", "train.min_steps=0"),
        *("train.warmup_epochs=0", "source_shots=3", "shots=[1,2]", "seeds=[1,2]", *extra),
    ]


def test_the_interval_is_that_of_the_paired_t_test():
    a, b = [0.8, 0.9, 0.7, 0.75], [0.7, 0.85, 0.72, 0.6]
    expected = ttest_rel(a, b).confidence_interval(0.95)
    gains = [x - y for x, y in zip(a, b, strict=True)]
    assert interval(gains) == pytest.approx([expected.low, expected.high])
    assert interval(gains[:1]) is None


def test_gains_flags_and_wins(tmp_path):
    # of two sources and two seeds: one helps, one harms, each time alike
    accuracies = {
        ("t", 4, 1, NONE): 0.5,
        ("t", 4, 2, NONE): 0.6,
        ("t", 4, 1, "good"): 0.6,
        ("t", 4, 2, "good"): 0.701,
        ("t", 4, 1, "bad"): 0.3,
        ("t", 4, 2, "bad"): 0.4,
    }
    choices = {("t", 4, 1): "good", ("t", 4, 2): "bad"}
    found = summarise(accuracies, choices)
    cells = {cell["source"]: cell for cell in found["cells"]}
    assert list(cells) == [NONE, "good", "bad", "auto"]
    assert cells["good"]["gain"] == pytest.approx(0.1005)
    assert cells["bad"]["gain"] == pytest.approx(-0.2)
    assert [cells[name]["negative"] for name in cells] == [False, False, True, False]
    assert cells["auto"]["accuracy"] == pytest.approx(0.5)
    assert found["auto"] == {
        "choices": 2,
        "at_least_scratch": 1,
        "better": 1,
        "at_least_random": 1,
    }
    text = list(lines(found))
    assert sum("negative transfer" in line for line in text) == 1
    assert "of 2 choices 1 are at least as good as scratch (1 better)" in text[-1]
    draw(found, ["t", "good", "bad"], tmp_path / "transfer.png")
    assert (tmp_path / "transfer.png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_has_no_flag():
    accuracies = {("t", None, 1, NONE): 0.9, ("t", None, 1, "bad"): 0.1}
    found = summarise(accuracies, {("t", None, 1): NONE})
    assert all(cell["interval"] is None and not cell["negative"] for cell in found["cells"])
    assert "all a class" in next(lines(found))


def test_every_task_is_trained_from_every_other(folders):
    said = []
    do = partial(transfer, "halves", keys(folders), folders / "out", inline)
    found = do(resume=False, log=said.append)
    assert len(said) == 2 + 2 * 2 * 2 * 2  # sources; targets, shots, seeds, none and the other
    assert found == json.loads((folders / "out" / "transfer.json").read_text())
    results = {
        path.parent.name: json.loads(path.read_text())
        for path in (folders / "out" / "runs").glob("*/result.json")
    }
    digest = results["pets-1shot-seed1-from-cars"]["init_from"]["sha256"]
    assert digest == results["pets-2shot-seed2-from-cars"]["init_from"]["sha256"]
    assert "init_from" not in results["pets-1shot-seed1-from-none"]
    for cell in found["cells"]:
        if cell["source"] == "auto":
            continue
        runs = [
            results[f"{cell['target']}-{cell['shots']}shot-seed{seed}-from-{cell['source']}"]
            for seed in (1, 2)
        ]
        assert cell["accuracy"] == pytest.approx(np.mean([run["accuracy"] for run in runs]))
    allowed = {"pets": {NONE, "cars"}, "cars": {NONE, "pets"}}
    assert all(chosen["source"] in allowed[chosen["target"]] for chosen in found["chosen"])
    assert all(chosen["source"] == NONE for chosen in found["chosen"] if chosen["shots"] == 1)
    with pytest.raises(InputError, match="holds a suite: give --resume"):
        do(resume=False, log=said.append)
    shutil.rmtree(folders / "out" / "runs" / "pets-1shot-seed1-from-cars")
    assert do(resume=True, log=lambda line: None) == found


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["shots=[0]"], "shots.0=0"),
        (["sources=4"], "unknown key 'sources'; did you mean 'source_shots'"),
        (["tasks.pets.rot=x"], "unknown key 'tasks.pets.rot'; did you mean 'tasks.pets.root'"),
        (["source_shots=50"], "tasks.pets at 50 images a class: "),
        (["shots=[1,60]"], "tasks.pets at 60 images a class: "),
        (["method.name=linear_probe"], "it changes no image features"),
    ],
)
def test_a_bad_key_is_a_line(folders, capfd, monkeypatch, extra, message):
    out = folders / "out"
    arguments = ["transfer", "halves", *keys(folders, *extra), "--out", out]
    code, _, error = vpt_cli(capfd, monkeypatch, *arguments)
    assert code == 1
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_tasks_that_share_an_image_are_refused(folders):
    shutil.copy(folders / "pets" / "cat" / "0.png", folders / "cars" / "van" / "copy.png")
    with pytest.raises(InputError, match="is an image of pets too"):
        transfer("halves", keys(folders), folders / "out", inline, resume=False, log=print)
    assert not (folders / "out").exists()


def test_a_failed_run_is_said(folders):
    with pytest.raises(InputError, match="runs failed, first pets: "):
        transfer(
            "halves", keys(folders, "train.lr=1e30"), folders / "out", inline, resume=False,
            log=lambda line: None,
        )  # fmt: skip
