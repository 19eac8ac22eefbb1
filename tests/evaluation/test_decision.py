"""Calibration, thresholds, prediction sets and referring: by hand, on test data, never from it."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from tiny import vpt_cli

from vpt import artifact, targets
from vpt.bench.run_suite import _line
from vpt.config import DecisionConfig, load_run
from vpt.errors import InputError
from vpt.evaluation.decision import Decision, achieved, check_decision, fit_decision
from vpt.evaluation.plots import (
    draw_confusion,
    draw_precision_recall,
    draw_reliability,
    draw_risk_coverage,
    draw_roc,
    save,
)
from vpt.run import NOTICE, run
from vpt.targets.multiclass import Multiclass

NAMES = ["normal", "pneumonia"]
TARGET = Multiclass()


def quiet(line):
    pass


def case(count=400, classes=2, seed=0, scale=4.0):
    """Logits that are `scale` times too sure: at temperature `scale` they are calibrated."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return scale * logits, labels


def fit(logits, labels, log=quiet, names=None, **config):
    config = DecisionConfig.model_validate(config)
    return fit_decision(config, TARGET, logits, labels, names or NAMES, log)


def of_probabilities(values):
    """Logits whose softmax gives the second class these probabilities."""
    values = torch.tensor(values, dtype=torch.float64)
    return torch.stack([(1 - values).log(), values.log()], 1)


class Logits(ClassifierMixin, BaseEstimator):
    """The features are the logits."""

    def fit(self, x, y):
        self.classes_ = np.unique(y)
        return self

    def decision_function(self, x):
        return x

    def predict(self, x):
        return x.argmax(1)


def test_temperature_is_scikit_learns():
    logits, labels = case(classes=3, count=2000)
    found = fit(logits, labels, names=["a", "b", "c"], temperature=True).temperature
    assert found == pytest.approx(4, rel=0.1)
    x, y = logits.double().numpy(), labels.numpy()
    frozen = FrozenEstimator(Logits().fit(x, y))
    calibrated = CalibratedClassifierCV(frozen, method="temperature", ensemble=False).fit(x, y)
    ours = Decision(temperature=found).probabilities(TARGET, logits)
    assert np.allclose(ours, calibrated.predict_proba(x), atol=1e-3)


def test_calibration_lowers_the_error_on_other_images():
    decision = fit(*case(seed=0), temperature=True)
    found = achieved(decision, TARGET, *case(seed=1), NAMES)
    assert found["ece_after"] < 0.06 < 0.1 < found["ece_before"]


def test_all_right_gives_no_temperature():
    lines = []
    assert fit(torch.eye(2), torch.arange(2), lines.append, temperature=True).temperature == 1
    assert "the temperature stays at 1" in lines[0]


def test_guessing_is_said():
    lines, (logits, labels) = [], case()
    probabilities = fit(logits, 1 - labels, lines.append, temperature=True).probabilities(
        TARGET, logits
    )
    assert torch.allclose(probabilities, torch.tensor(0.5).double(), atol=1e-2)
    assert len(lines) == 1 and "no better than guessing" in lines[0]
    fit(logits, labels, lines.append, temperature=True)
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("rate", "wanted", "threshold"),
    [
        # of the five positives at .9 .7 .7 .4 .2
        ("sensitivity", 0.2, 0.9),
        ("sensitivity", 0.21, 0.7),
        ("sensitivity", 0.6, 0.7),  # both at .7: ties are called together
        ("sensitivity", 0.61, 0.4),
        ("sensitivity", 0.99, 0.2),
        # of the four negatives at .7 .3 .3 .1
        ("specificity", 0.25, 0.2),
        ("specificity", 0.75, 0.4),
        ("specificity", 0.76, 0.9),  # not .7: a negative stands there
    ],
)
def test_thresholds_by_hand(rate, wanted, threshold):
    logits = of_probabilities([0.9, 0.7, 0.7, 0.4, 0.2, 0.7, 0.3, 0.3, 0.1])
    labels = torch.tensor([1] * 5 + [0] * 4)
    decision = fit(logits, labels, **{rate: {"pneumonia": wanted}})
    assert decision.thresholds["pneumonia"] == pytest.approx(threshold)
    found = achieved(decision, TARGET, logits, labels, NAMES)["thresholds"]["pneumonia"]
    assert found[rate] >= wanted


def test_a_specificity_that_only_no_call_gives():
    decision = fit(
        of_probabilities([0.6, 0.9]), torch.tensor([1, 0]), specificity={"pneumonia": 0.9}
    )
    assert decision.thresholds["pneumonia"] > 1
    json.dumps(decision.model_dump(), allow_nan=False)


def test_thresholds_on_other_images():
    decision = fit(*case(2000), sensitivity={"pneumonia": 0.9}, specificity={"normal": 0.8})
    found = achieved(decision, TARGET, *case(2000, seed=1), NAMES)["thresholds"]
    for name, rate, wanted in (("pneumonia", "sensitivity", 0.9), ("normal", "specificity", 0.8)):
        low, high = found[name][f"{rate}_interval"]
        assert low < found[name][rate] < high
        assert found[name][rate] == pytest.approx(wanted, abs=0.04)


def test_quantiles_by_hand():
    # 9 scores of the second class: rank ⌈.8 · 10⌉ = 8; 3 of the first: rank 4 of 3, so all
    positive = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    logits = of_probabilities([*positive, 0.1, 0.2, 0.3])
    lines = []
    decision = fit(logits, torch.tensor([1] * 9 + [0] * 3), lines.append, alpha=0.2)
    assert decision.quantiles["pneumonia"] == pytest.approx(1 - 0.2)
    assert decision.quantiles["normal"] == 1
    assert "normal: 3 calibration images, fewer than 19" in lines[0]
    own = decision.sets(
        decision.probabilities(TARGET, logits), NAMES
    )  # a score at its quantile is in
    assert own[:9, 1].sum() == 8
    sets = decision.sets(
        decision.probabilities(TARGET, of_probabilities([0.95, 0.21, 0.19])), NAMES
    )
    assert sets.tolist() == [[True, True], [True, True], [True, False]]


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_sets_cover_each_class(alpha):
    """Over many calibration sets, each class is covered in at least 1 - alpha of the images."""
    names = ["a", "b", "c"]
    coverage = []
    for seed in range(40):
        logits, labels = case(300, 3, seed)
        logits[:, 2] += 2  # a class that is taken for the others' must be covered too
        decision = fit(logits[:150], labels[:150], names=names, alpha=alpha)
        found = achieved(decision, TARGET, logits[150:], labels[150:], names)
        coverage.append([found["set_coverage"][name]["coverage"] for name in names])
        assert 1 - alpha - 0.2 < min(coverage[-1])
        assert 0 < found["set_size"] <= 3
    mean = np.mean(coverage, axis=0)
    assert (mean > 1 - alpha - 0.015).all() and (mean < 1 - alpha + 0.05).all()


def test_a_class_without_calibration_images_is_in_every_set():
    lines = []
    logits, _ = case(50, 3)
    decision = fit(logits, torch.arange(50) % 2, lines.append, [*NAMES, "rare"], alpha=0.1)
    assert decision.sets(decision.probabilities(TARGET, logits), [*NAMES, "rare"])[:, 2].all()
    assert any("rare: 0 calibration images" in line for line in lines)


def test_referring_by_hand():
    logits = of_probabilities([0.9, 0.2, 0.7, 0.6, 0.3])  # confidence .9 .8 .7 .6 .7
    decision = fit(logits, torch.tensor([1, 0, 1, 1, 0]), coverage=0.6)
    assert decision.refer_below == pytest.approx(0.7)
    found = achieved(decision, TARGET, logits, torch.tensor([1, 0, 0, 0, 1]), NAMES)["refer"]
    assert found["coverage"] == 0.8  # the tie at .7 is decided
    everything = achieved(decision, TARGET, logits[:3], torch.tensor([1, 0, 1]), NAMES)["refer"]
    for share in ("coverage", "accuracy"):
        assert everything[share] == 1
        assert everything[f"{share}_interval"] == pytest.approx([0.025 ** (1 / 3), 1])
    assert found["accuracy"] == 0.5
    assert decision.describe(TARGET, logits[3], NAMES)["refer"]
    assert not decision.describe(TARGET, logits[0], NAMES)["refer"]


def test_certain_images_are_more_often_right():
    decision = fit(*case(1000), coverage=0.5)
    logits, labels = case(1000, seed=1)
    found = achieved(decision, TARGET, logits, labels, NAMES)["refer"]
    assert found["coverage"] == pytest.approx(0.5, abs=0.06)
    assert found["accuracy"] > (logits.argmax(1) == labels).float().mean() + 0.05


def test_patients_widen_the_intervals():
    decision = fit(*case(), sensitivity={"pneumonia": 0.8})
    logits, labels = (part.repeat_interleave(5, 0) for part in case(80, seed=1))
    widths = []
    for patients in (None, [f"p{i // 5}" for i in range(400)]):
        rates = achieved(decision, TARGET, logits, labels, NAMES, patients)["thresholds"][
            "pneumonia"
        ]
        low, high = rates["sensitivity_interval"]
        widths.append(high - low)
    assert widths[1] > 1.7 * widths[0]  # √5 in theory


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"sensitivity": {"pneumona": 0.9}}, "sensitivity.pneumona: no such class.*pneumonia"),
        (
            {"sensitivity": {"normal": 0.9}, "specificity": {"normal": 0.9}},
            "specificity.normal: it has a wanted sensitivity too",
        ),
        ({"specificity": {"rare": 0.9}}, "0 of 4 calibration images are of this class"),
    ],
)
def test_what_cannot_be_fitted(config, match):
    config = DecisionConfig.model_validate(config)
    with pytest.raises(InputError, match=match):
        check_decision(config, TARGET, torch.tensor([0, 1, 0, 1]), [*NAMES, "rare"])


def write_npz(path, swap=False):
    """Grey images, brighter with pneumonia, that overlap; `swap` exchanges the test labels."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 20), ("val", 60), ("test", 60)):
        labels = rng.permutation(np.arange(count) % 2)
        grey = rng.normal(100 + 25 * labels, 30).clip(0, 255)[:, None, None]
        pixels = grey + rng.normal(0, 5, (count, 28, 28))
        arrays[f"{part}_images"] = pixels.clip(0, 255).astype(np.uint8)
        arrays[f"{part}_labels"] = 1 - labels if swap and part == "test" else labels
    np.savez(path, **arrays)
    return path


SETTINGS = [
    *("backbone.name=tiny_clip", "data.shots=null", "data.classes=[normal, pneumonia]"),
    *("decision.temperature=true", "decision.sensitivity.pneumonia=0.9", "decision.alpha=0.1"),
    "decision.coverage=0.7",
]


def test_the_test_labels_leave_no_trace_in_the_artefact(tmp_path):
    stored, results = [], []
    for name, swap in (("one", False), ("two", True)):
        out = tmp_path / name
        root = write_npz(tmp_path / f"{name}.npz", swap)
        config = load_run("linear_probe", [*SETTINGS, f"data.root={root}", f"out={out}"])
        results.append(run(config, log=quiet))
        tensors, metadata = artifact.read(out / "prompt.safetensors")
        for key in ("figures", "split_hash", "config_hash"):  # these are of the test, or name it
            del metadata[key]
        stored.append((tensors, metadata))
    (one, about_one), (two, about_two) = stored
    assert about_one == about_two and about_one["decision"]["thresholds"]
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert results[0]["accuracy"] == pytest.approx(1 - results[1]["accuracy"])
    assert results[0]["decision"] != results[1]["decision"]


def test_predict_and_eval_apply_what_was_fitted(tmp_path, capfd, monkeypatch):
    cli = partial(vpt_cli, capfd, monkeypatch)
    root, out = write_npz(tmp_path / "x.npz"), tmp_path / "run"
    code, _, err = cli("train", "linear_probe", *SETTINGS, f"data.root={root}", f"out={out}")
    assert code == 0, err
    assert "fitted on 60 validation images" in err
    result = json.loads((out / "result.json").read_text())
    assert "notice" not in result  # an .npz of one's own may be anything
    decision = Decision(**artifact.read(out / "prompt.safetensors")[1]["decision"])
    found = result["decision"]
    assert found["temperature"] == decision.temperature != 1
    for name in ("accuracy", "auroc", "auprc"):
        low, high = result[f"{name}_interval"]
        assert low <= result[name] <= high
    code, shown, _ = cli("eval", out / "prompt.safetensors")
    assert f"{found['refer']['accuracy']:.4f}" in shown
    assert "decision.thresholds.pneumonia" in shown

    pixels = np.load(root)["test_images"][:12]
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{index:02}.png")
    paths = sorted(tmp_path.glob("*.png"))
    artefact = out / "prompt.safetensors"
    rows = [json.loads(x) for x in cli("predict", "--json", artefact, *paths)[1].splitlines()]
    text = cli("predict", artefact, *paths)[1].splitlines()
    for row, line in zip(rows, text, strict=True):
        probability = row["probabilities"]["pneumonia"]
        assert row["called"] == ["pneumonia"] * (probability >= decision.thresholds["pneumonia"])
        members = [n for n in NAMES if 1 - row["probabilities"][n] <= decision.quantiles[n]]
        assert row["set"] == members
        assert row["refer"] == (row["probability"] < decision.refer_below)
        assert line.endswith("\trefer") == row["refer"]
        assert f"set: {', '.join(members) or 'none'}" in line
    assert {row["refer"] for row in rows} == {True, False}


def test_medical_data_says_so(tmp_path, capfd, monkeypatch):
    cli = partial(vpt_cli, capfd, monkeypatch)
    monkeypatch.setattr("vpt.data.sources._check_sums", lambda root, card: None)
    monkeypatch.setattr("vpt.data.sources._check_dump", lambda parts, card, where: None)
    root, out = write_npz(tmp_path / "pneumoniamnist.npz"), tmp_path / "run"
    settings = ["backbone.name=tiny_clip", "data.shots=4", f"data.root={root}", f"out={out}"]
    assert NOTICE in cli("train", "linear_probe", *settings)[1]
    assert json.loads((out / "result.json").read_text())["notice"] == NOTICE
    assert NOTICE in cli("eval", out / "prompt.safetensors")[1]
    Image.new("L", (28, 28)).save(tmp_path / "x.png")
    _, shown, err = cli("predict", "--json", out / "prompt.safetensors", tmp_path / "x.png")
    assert json.loads(shown)["notice"] == NOTICE and NOTICE in err
    config = load_run(str(out / "config.yaml"))
    assert _line(config, None).endswith(NOTICE)
    plain = tmp_path / "plain.png"
    draw_confusion(torch.eye(2), NAMES, plain)
    draw_confusion(torch.eye(2), NAMES, tmp_path / "noted.png", NOTICE)
    assert plain.read_bytes() != (tmp_path / "noted.png").read_bytes()


def test_a_decision_needs_calibration_images(tmp_path):
    config = load_run("digits_linear_probe", ["decision.temperature=true", f"out={tmp_path / 'r'}"])
    with pytest.raises(InputError, match="digits has no calibration and no validation images"):
        run(config, log=quiet)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("multilabel", [False, True])
def test_plots(tmp_path, multilabel):
    logits, labels = case(300, 3)
    names = ["a", "b$", "never"]
    labels = labels % 2
    if multilabel:
        labels = torch.nn.functional.one_hot(labels, 3)
    target = targets.of(labels)
    decision = Decision(temperature=4)
    after, before = (d.probabilities(target, logits) for d in (decision, Decision()))
    roc = draw_roc(target, after, labels, names)
    curves = draw_precision_recall(target, after, labels, names)
    reliability = draw_reliability(target, {"before": before, "after": after}, labels)
    plots = [roc, curves, reliability]
    assert [len(plot.axes[0].get_legend().get_texts()) for plot in plots] == [2, 2, 3]
    if not multilabel:
        risk = draw_risk_coverage(after, labels, refer_below=0.6)
        line = risk.axes[0].lines[0]
        assert line.get_xdata()[-1] == 1
        assert line.get_ydata()[-1] == pytest.approx((after.argmax(1) != labels).float().mean())
        plots.append(risk)
    for index, plot in enumerate(plots):
        save(plot, tmp_path / f"{index}.png")
