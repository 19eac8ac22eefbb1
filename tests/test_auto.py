"""`vpt train auto`: one of several methods, chosen on training images alone."""

import json
from functools import partial

import numpy as np
import pytest
from tiny import samples, vit, vpt_cli, write_folder

from vpt import auto
from vpt.auto import PRIOR, Candidate, Comparison
from vpt.backbones.base import Backbone
from vpt.config import MethodConfig, load_run
from vpt.errors import InputError
from vpt.run import run

QUIET = {"log": lambda line: None, "progress": False}
FEW = ["zero_shot", "ss_text", "linear_probe"]


@pytest.fixture
def cli(capfd, monkeypatch):
    return partial(vpt_cli, capfd, monkeypatch)


@pytest.fixture
def images(tmp_path):
    return write_folder(tmp_path / "pets", ("cat", "dog", "red panda"), count=7)


def config(images, out, *overrides, candidates=FEW, shots=4):
    given = ["backbone.name=tiny_clip", f"data.root={images}", f"data.shots={shots}", f"out={out}"]
    if candidates:
        given.append(f"auto.candidates=[{','.join(candidates)}]")
    return load_run("auto", [*given, *overrides])


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_the_chosen_one_is_trained_as_by_itself(images, tmp_path):
    out = tmp_path / "auto"
    result = run(config(images, out), **QUIET)
    assert result["method"] == "auto"
    assert list(result["candidates"]) == FEW
    table = result["candidates"]
    assert result["chosen"] == "linear_probe"  # colours tell the classes, words do not
    for record in table.values():
        assert record["log_loss"] >= 0 and 0 <= record["accuracy"] <= 1 and record["seconds"] > 0
    assert result["train_seconds"] > sum(record["seconds"] for record in table.values())
    alone = load_run(
        result["chosen"],
        [
            "backbone.name=tiny_clip",
            f"data.root={images}",
            "data.shots=4",
            f"out={tmp_path / 'one'}",
        ],
    )
    single = run(alone, **QUIET)
    for name in ("accuracy", "auroc", "ece", "split_hash", "tunable_parameters"):
        assert result[name] == single[name]
    assert names(out) == names(tmp_path / "one")  # nothing of the comparison is left


def test_test_images_are_read_once_for_the_chosen_one(images, tmp_path, monkeypatch):
    tested = []
    real = auto.predict_cached
    for module in ("vpt.auto", "vpt.run"):

        def spy(model, loader, *rest, module=module):
            tested.append((module, model.name, set(loader.dataset.samples.names)))
            return real(model, loader, *rest)

        monkeypatch.setattr(f"{module}.predict_cached", spy)
    result = run(config(images, tmp_path / "auto"), **QUIET)
    held = set().union(*(found for module, _, found in tested if module == "vpt.auto"))
    (last,) = (each for each in tested if each[0] == "vpt.run")
    assert last[1] == result["chosen"]
    assert len(held) == 12 and len(last[2]) == 9 and not held & last[2]


def test_features_are_computed_once(images, tmp_path, monkeypatch):
    seen, pooled = [], Backbone.pooled

    def count(self, images, *rest):
        seen.append(len(images))
        return pooled(self, images, *rest)

    monkeypatch.setattr(Backbone, "pooled", count)
    run(config(images, tmp_path / "auto"), **QUIET)
    # an image on loading, then training images for all, and test images for the chosen one
    assert seen[0] == 1 and sum(seen[1:]) == 12 + 9


def test_one_image_a_class_leaves_nothing_to_hold_out(images, tmp_path):
    lines = []
    result = run(config(images, tmp_path / "a", candidates=None, shots=1), log=lines.append)
    assert result["chosen"] == PRIOR[0]
    assert list(result["candidates"]) == [n for n in auto.WITH_TEXT if n not in auto.PROMPTS]
    assert {record["log_loss"] for record in result["candidates"].values()} == {None}
    assert any("too few images" in line and PRIOR[0] in line for line in lines)
    own = config(images, tmp_path / "b", candidates=["coop", "linear_probe"], shots=1)
    assert run(own, **QUIET)["chosen"] == "linear_probe"


def test_the_first_is_tried_whatever_the_time_and_others_are_dropped_for_it(images, tmp_path):
    given = ["auto.minutes=1e-9"]
    result = run(config(images, tmp_path / "auto", *given), **QUIET)
    assert result["chosen"] == FEW[0]  # whatever it is worth
    dropped = [record.get("dropped") for record in result["candidates"].values()]
    assert dropped[0] is None
    assert all("s are left" in reason for reason in dropped[1:])


def test_pace(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(auto.time, "monotonic", lambda: now[0])
    stages = [("a", 10), ("b", 10), ("on all images", 20)]
    with auto._Pace(stages, False, left=100) as pace:
        pace.next_stage()
        now[0] += 2  # of computing features
        pace.tick()
        now[0] += 2
        pace.tick()
        for _ in range(8):
            now[0] += 2.4
            pace.tick()
        now[0] += 20
        with pytest.raises(auto._Dropped, match=r"needs 181 s, and 100 s are left"):
            pace.tick()


class Known:
    """A comparison in which held-out losses are given."""

    def __init__(self, patients=None):
        self.split = type("", (), {"train": samples(np.zeros(40), patients)})

    chance, safe, _chance = Comparison._chance, Comparison._safe, Comparison._chance


def tried(name, losses, dropped=None):
    setting = load_run("auto").model_copy(update={"method": MethodConfig(name=name)})
    return Candidate(setting, list(losses), dropped=dropped)


NOISE = np.random.default_rng(0).normal(0, 0.1, 40)
PARTS = [(None, np.arange(40), None)]


def test_a_hopeless_candidate_differs_beyond_chance():
    best, parts = tried("ss_text", 0.5 + NOISE), [(None, np.arange(20), None)]
    assert Known().chance(np.full(20, 0.8), best, parts) < auto.HOPELESS
    assert Known().chance(np.full(20, 0.51), best, parts) > auto.HOPELESS
    assert Known().chance(np.full(20, 0.1), best, parts) > 0.99
    # twenty images of one patient are one observation
    patients = ["one"] * 20 + ["two"] * 20
    assert Known(patients).chance(np.full(20, 0.8), best, parts) == 1


def test_the_probe_is_left_only_for_one_that_is_better_beyond_chance():
    probe, best = tried("linear_probe", np.full(40, 0.51)), tried("coop", 0.5 + NOISE)
    assert Known().safe([best, probe], best, PARTS) is probe
    assert Known().safe([probe, best], probe, PARTS) is probe
    clear = tried("coop", 0.3 + NOISE)
    text = tried("ss_text", 0.31 + NOISE[::-1])
    assert Known().safe([text, probe, clear], clear, PARTS) is text
    assert Known().safe([probe, clear], clear, PARTS) is None
    assert Known().safe([tried("linear_probe", [], "slow"), clear], clear, PARTS) is None


def test_a_candidate_that_cannot_be_trained_is_dropped_with_the_reason(images, tmp_path):
    given = ["train.loss=class_balanced"]
    few = ["ss_text", "coop"]
    fast = ["train.epochs=2", "train.min_steps=0"]
    result = run(config(images, tmp_path / "a", *given, *fast, candidates=few), **QUIET)
    assert result["chosen"] == "coop"
    assert "train.loss=class_balanced" in result["candidates"]["ss_text"]["dropped"]
    with pytest.raises(InputError, match=r"no candidate can be trained.*train\.loss"):
        run(config(images, tmp_path / "b", *given, candidates=["ss_text"]), **QUIET)


def test_patients_are_never_on_both_sides(tmp_path, monkeypatch):
    files = sorted(write_folder(tmp_path / "data", count=12).glob("*/*"))
    rows = [f"{file},{file.parent.name},p{index // 2}" for index, file in enumerate(files)]
    table = tmp_path / "data.csv"
    table.write_text("\n".join(["path,label,patient", *rows]))
    found, real = [], Comparison._parts
    monkeypatch.setattr(
        Comparison,
        "_parts",
        lambda self: found.append((self.split.train, real(self))) or real(self),
    )
    result = run(config(table, tmp_path / "auto", "data.duplicates=ignore"), **QUIET)
    assert result["chosen"] in FEW
    ((train, parts),) = found
    assert len(parts) > 1
    for seen, held, _ in parts:
        assert not {train.patients[i] for i in seen} & {train.patients[i] for i in held}


def test_any_number_of_classes_an_image(tmp_path):
    files = sorted(write_folder(tmp_path / "data", ("a", "b", "c"), count=8).glob("*/*"))
    rows = [f"{f},{int(f.parent.name != 'a')},{int(f.parent.name == 'c')}" for f in files]
    table = tmp_path / "data.csv"
    table.write_text("\n".join(["path,label:red,label:round", *rows]))
    result = run(config(table, tmp_path / "auto"), **QUIET)
    assert result["chosen"] in FEW
    assert all(0 <= record["log_loss"] < 2 for record in result["candidates"].values())


def test_an_interrupted_run_goes_on(images, tmp_path, monkeypatch, cli):
    tried, real = [], Comparison._try

    def interrupt(self, candidate, *rest):
        tried.append(candidate.name)
        if tried == FEW:
            raise KeyboardInterrupt
        real(self, candidate, *rest)

    monkeypatch.setattr(Comparison, "_try", interrupt)
    out = tmp_path / "auto"
    with pytest.raises(KeyboardInterrupt):
        run(config(images, out), **QUIET)
    assert names(out) == {"config.yaml", "candidates.json", "features"}
    with pytest.raises(InputError, match="interrupted: give --resume"):
        run(config(images, out), **QUIET)
    result = run(config(images, out), resume=True, **QUIET)
    assert tried == [*FEW, FEW[-1]]
    whole = run(config(images, tmp_path / "whole"), **QUIET)
    assert (result["chosen"], result["accuracy"]) == (whole["chosen"], whole["accuracy"])
    for name, record in whole["candidates"].items():
        assert result["candidates"][name]["log_loss"] == record["log_loss"]
    assert run(config(images, out), resume=True, **QUIET) == json.loads(
        (out / "result.json").read_text()
    )


def test_what_was_found_on_other_images_does_not_count(images, tmp_path):
    out = tmp_path / "auto"
    out.mkdir()
    record = {"losses": [0.0], "accuracy": 1.0, "seconds": 1, "dropped": None}
    found = {name: record for name in FEW}
    kept = {"split_hash": "another", "candidates": found}
    (out / "candidates.json").write_text(json.dumps(kept))
    result = run(config(images, out), **QUIET)
    assert all(record["seconds"] != 1 for record in result["candidates"].values())


def test_without_a_text_tower():
    plain = Backbone(vit())
    names = [each.method.name for each in auto.settings(load_run("auto"), plain)]
    assert names == auto.WITHOUT_TEXT
    with pytest.raises(InputError, match="ss_text needs a CLIP"):
        auto.settings(load_run("auto", ["auto.candidates=[ss_text]"]), plain)


def test_the_command(images, tmp_path, cli):
    out = tmp_path / "auto"
    given = ["backbone.name=tiny_clip", f"data.root={images}", "data.shots=4", f"out={out}"]
    few = f"auto.candidates=[{','.join(FEW)}]"
    code, printed, err = cli(
        "train", "auto", *given, few, "decision.temperature=true", "data.calibration=0.2"
    )
    assert code == 0, err
    result = json.loads((out / "result.json").read_text())
    assert f"auto: {result['chosen']} is chosen" in err
    for name in FEW:
        record = result["candidates"][name]
        (line,) = (line for line in printed.splitlines() if line.startswith(f"candidates.{name} "))
        assert f"log_loss {record['log_loss']:.4f}, accuracy {record['accuracy']:.4f}" in line
        assert f"auto: {name}: log loss {record['log_loss']:.3f}" in err
    assert result["decision"]["temperature"] > 0
    code, shown, err = cli("eval", out / "prompt.safetensors")
    assert code == 0, err
    assert f"{result['accuracy']:.4f}" in shown


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["auto.candidates=[coop,cop]"], "'cop'.*'coop'"),
        (["auto.candidates=[]"], "auto.candidates"),
        (["auto.minutes=0"], "auto.minutes=0"),
        (["auto.minute=5"], "'auto.minute'.*'auto.minutes'"),
        (["method.num_tokens=5"], "method.num_tokens: auto chooses the method"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_before_anything_is_written(images, tmp_path, overrides, message):
    with pytest.raises(InputError, match=message):
        run(config(images, tmp_path / "out", *overrides, candidates=None), **QUIET)
    assert not (tmp_path / "out").exists()


def test_another_method_takes_no_settings_of_auto():
    with pytest.raises(InputError, match=r"auto.… is of `vpt train auto`, not of coop"):
        load_run("coop", ["auto.minutes=5"])
    assert load_run("auto", ["method.name=coop"]).auto is None
