"""Class names of every script in every plot: their letters, or numbers with a legend in text."""

import warnings
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import pytest
import torch
from matplotlib.font_manager import FontEntry, FontProperties, findfont, fontManager
from matplotlib.text import Text
from tiny import write_image

import vpt
from vpt import backbones, quickstart, targets
from vpt.config import load_run
from vpt.evaluation import lettering
from vpt.evaluation.lettering import labels, legend, letter
from vpt.evaluation.plots import (
    draw_confusion,
    draw_precision_recall,
    draw_reliability,
    draw_roc,
    save,
)
from vpt.explain import explain_images
from vpt.folder import RunFolder
from vpt.report.plots import draw_plots

NAMES = ["Löwe", "猫", "a\tb", "Ж$x$", "แมว"]
SHOWN = ["Löwe", "#2", "#3", "Ж$x$", "#5"]


@pytest.fixture(autouse=True)
def own_fonts(monkeypatch):
    """Only matplotlib's own fonts, whatever this machine has; and any warning is an error."""
    own = mpl.get_data_path()
    fonts = [font for font in fontManager.ttflist if font.fname.startswith(own)]
    monkeypatch.setattr(fontManager, "ttflist", fonts)
    lettering._families.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    lettering._families.cache_clear()


def texts(figure):
    return {text.get_text() for text in figure.findobj(Text)}


def test_names_that_no_font_has_are_numbers():
    assert labels(NAMES) == SHOWN
    assert legend(NAMES) == ["#2 猫", "#3 a\tb", "#5 แมว"]
    assert labels(["one", "two\nlines", "Ελλάδα", "قطة"]) == ["one", "two\nlines", "Ελλάδα", "قطة"]
    assert legend(["one", "two"]) == []


def test_confusion(tmp_path):
    draw_confusion(torch.eye(5), NAMES, tmp_path / "confusion.png")
    assert (tmp_path / "confusion.txt").read_text() == "#2 猫\n#3 a\tb\n#5 แมว\n"
    draw_confusion(torch.eye(2), ["cat", "dog"], tmp_path / "plain.png")
    draw_confusion(torch.eye(40), NAMES * 8, tmp_path / "many.png")  # without names
    assert not (tmp_path / "plain.txt").exists() and not (tmp_path / "many.txt").exists()


def test_curves(tmp_path):
    labels_ = torch.arange(50) % 5
    probabilities = torch.rand(50, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
    target = targets.of(labels_)
    for draw in (draw_roc, draw_precision_recall):
        figure = draw(target, probabilities, labels_, NAMES)
        found = {text.split(" (")[0].replace("\\", "") for text in texts(figure)}
        assert found >= set(SHOWN)
        save(figure, tmp_path / "curves.png")
    figure = draw_reliability(target, {"猫": probabilities, "after": probabilities}, labels_)
    assert texts(figure) >= {"#1", "after"}
    save(figure, tmp_path / "reliability.png")


def test_quickstart(tmp_path):
    """Its plot, of digits that have Chinese names."""
    names, configs, rows = [*"〇一二三四五六七八九"], [], []
    for method in ("zero_shot", "linear_probe"):
        classes = f"data.classes=[{','.join(names)}]"
        config = load_run(f"notebook_{method}", [classes, f"out={tmp_path / method}"])
        model = vpt.attach(backbones.load("tiny_clip"), method, class_names=names)
        vpt.save(model, RunFolder(config.out).prompt)
        configs.append(config)
        result = {"accuracy": 0.5, "tunable_parameters": 0, "train_seconds": 0}
        rows.append(quickstart._summary(method, [result]))
    quickstart._draw(rows, *configs, tmp_path / "figure.png")
    lines = [f"#{number} {name}" for number, name in enumerate(names, start=1)]
    assert (tmp_path / "figure.txt").read_text().splitlines() == lines


def test_explain(tmp_path):
    model = vpt.attach(backbones.load("tiny_clip"), "zero_shot", class_names=["猫", "犬"])
    path = vpt.save(model, tmp_path / "prompt.safetensors")
    image = write_image(tmp_path / "a.png")
    (record,) = explain_images(path, [image], tmp_path / "out")
    assert record["class"] in {"猫", "犬"}
    lines = Path(record["figure"]).with_suffix(".txt").read_text().splitlines()
    assert lines == ["#1 猫", "#2 犬"]


def test_report():
    cells = pd.DataFrame(
        {
            "data": "猫", "backbone": ["tiny_clip"] * 2, "method": ["vpt_deep", "提示"],
            "shots": 4.0, "accuracy": 0.5, "accuracy_std": 0.1, "train_seconds": 1.0,
            "stored_parameters": 10,
        }
    )  # fmt: skip
    curves = pd.DataFrame(
        columns=["data", "backbone", "method", "shots", "epoch", "accuracy", "val_accuracy", "loss"]
    )
    plots = draw_plots(cells, curves)["猫"]
    assert plots and all("#2 提示" in plot.caption for plot in plots)


def test_a_font_that_has_the_letters_is_used(tmp_path, monkeypatch):
    """An installed family, here one of matplotlib's own, beside a default one without Greek."""
    default = findfont(FontProperties(family="cmr10"))
    assert Path(default).name == "cmr10.ttf"
    with mpl.rc_context({"font.family": ["cmr10"], "axes.formatter.use_mathtext": True}):
        assert labels(["Ωmega", "猫"]) == ["Ωmega", "#2"]
        figure = mpl.figure.Figure()
        text = figure.text(0, 0, "Ж")
        letter(figure)
        assert len(text.get_family()) > 1 and text.get_family()[0] == "cmr10"
        save(figure, tmp_path / "greek.png")


def test_a_font_without_a_regular_weight_is_taken_in_silence(monkeypatch, caplog):
    light = FontEntry(findfont("DejaVu Sans"), 0, "Light Only", "normal", "normal", 200, "normal")
    monkeypatch.setattr(fontManager, "ttflist", [light])
    assert "x" in lettering._letters("Light Only")
    assert caplog.records == []
