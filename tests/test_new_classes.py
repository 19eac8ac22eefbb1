"""Artefacts on classes and data sets that they were not trained on."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from tiny import vpt_cli, write_folder

import vpt
from vpt.bench.suite import cells
from vpt.config import DataConfig, load_run, load_suite
from vpt.data.fewshot import split_data
from vpt.data.images import read_image
from vpt.data.sources import open_source
from vpt.errors import InputError
from vpt.folder import RunFolder
from vpt.run import run

CLASSES = ["ant", "bee", "cat", "dog", "elk"]
FAST = ["backbone.name=tiny_clip", "train.epochs=2", "train.min_steps=0", "data.shots=2"]


@pytest.fixture
def cli(capfd, monkeypatch):
    return partial(vpt_cli, capfd, monkeypatch)


@pytest.fixture
def animals(tmp_path):
    return write_folder(tmp_path / "animals", CLASSES)


def train(out, method, *overrides):
    return run(load_run(method, [*FAST, f"out={out}", *overrides]), log=lambda line: None)


@torch.no_grad()
def logits_of(model, files):
    """By the model's own transform."""
    preprocess = model.backbone.preprocess
    crops = [torch.from_numpy(preprocess.crop()(read_image(file))) for file in files]
    return model.eval()(preprocess.normalize(torch.stack(crops)))


def accuracy(model, samples):
    right = [
        logits_of(model, [path]).argmax().item() == label
        for path, label in zip(samples.images, samples.labels, strict=True)
    ]
    return np.mean(right)


def test_base_to_new(tmp_path, animals, cli):
    half = [f"data.root={animals}", "data.class_half=base"]
    result = train(tmp_path / "run", "coop", *half, "tests.new.class_half=new")
    folder = RunFolder(tmp_path / "run")
    model = vpt.load(folder.prompt)
    assert model.class_names == CLASSES[:3]
    found = json.loads(folder.test("new").read_text())
    data = DataConfig(root=animals, shots=2, class_half="new")
    test = split_data(open_source(data), data).test
    assert {path.parent.name for path in test.images} == {"dog", "elk"}
    expected = accuracy(vpt.load(folder.prompt, class_names=CLASSES[3:]), test)
    assert (found["accuracy"], found["num_test"], found["num_classes"]) == (expected, 6, 2)
    base = result["accuracy"]
    harmonic = 2 * base * expected / (base + expected) if base + expected else 0
    assert found["harmonic_mean"] == pytest.approx(harmonic)

    code, out, _ = cli("eval", folder.prompt, "data.class_half=new", "--other-classes")
    assert (code, f"{expected:.4f}" in out) == (0, True)
    code, _, err = cli("eval", folder.prompt, "data.class_half=new")
    assert code
    assert "give --other-classes to test it" in err
    code, out, _ = cli("eval", folder.prompt)  # base, as in training
    assert f"{base:.4f}" in out

    folder.test("new").unlink()
    before = folder.prompt.read_bytes()
    again = load_run("coop", [*FAST, *half, f"out={folder.path}", "tests.new.class_half=new"])
    run(again, resume=True, log=lambda line: None)
    assert json.loads(folder.test("new").read_text()) == found
    assert folder.prompt.read_bytes() == before


def test_what_belongs_to_its_classes_is_refused_before_training(tmp_path, animals):
    for test in ("class_half=new", f"root={write_folder(tmp_path / 'others', ['owl', 'pig'])}"):
        with pytest.raises(InputError, match=r"tests.there: .* belongs to its own classes"):
            half = [f"data.root={animals}", "data.class_half=base"]
            train(tmp_path / "run", "vpt_deep", *half, f"tests.there.{test}")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"tests.new: unknown key 'class_halve'.*'class_half'"):
        train(tmp_path / "run", "coop", f"data.root={animals}", "tests.new.class_halve=new")
    with pytest.raises(InputError, match=r"'\.\./new'"):
        train(tmp_path / "run", "coop", f"data.root={animals}", "tests={../new: {}}")


def test_some_of_its_classes_are_told_apart_by_their_logits_alone(tmp_path, animals):
    """Also by a method that belongs to its classes."""
    other = write_folder(tmp_path / "two", ["dog", "bee"])
    train(tmp_path / "run", "linear_probe", f"data.root={animals}", f"tests.two.root={other}")
    model = vpt.load(tmp_path / "run" / "prompt.safetensors").eval()
    found = json.loads((tmp_path / "run/tests/two.json").read_text())
    samples = open_source(DataConfig(root=other)).parts["all"]
    logits = logits_of(model, samples.images)[:, [CLASSES.index("bee"), CLASSES.index("dog")]]
    labels = torch.tensor(samples.labels)
    assert found["accuracy"] == (logits.argmax(1) == labels).float().mean()
    assert found["num_test"] == len(samples)
    assert found["ece"] is not None


@pytest.mark.parametrize(("own", "follows"), [([], True), (["method.templates=['a {}.']"], False)])
def test_hand_written_texts_are_those_of_the_other_data(tmp_path, animals, own, follows):
    others = write_folder(tmp_path / "others", ["owl", "pig"])
    tests = {"there": {"root": str(others), "templates": ["one of {}, an animal."]}}
    train(tmp_path / "run", "zero_shot", f"data.root={animals}", *own, f"tests={json.dumps(tests)}")
    found = json.loads((tmp_path / "run/tests/there.json").read_text())
    prompt = tmp_path / "run" / "prompt.safetensors"
    templates = tests["there"]["templates"] if follows else ["a {}."]
    model = vpt.attach(
        vpt.load(prompt).backbone, "zero_shot", class_names=["owl", "pig"], templates=templates
    )
    samples = open_source(DataConfig(root=others)).parts["all"]
    assert found["accuracy"] == accuracy(model.eval(), samples)


def test_predict_with_other_classes(tmp_path, animals, cli):
    generic, specific = tmp_path / "generic", tmp_path / "specific"
    calibrated = ["decision.temperature=true", "data.calibration=4"]
    train(generic, "coop", f"data.root={animals}", *calibrated)
    train(specific, "coop", f"data.root={animals}", "method.class_specific=true")
    image = animals / "cat" / "secret0.png"
    listed = tmp_path / "names.txt"
    listed.write_text("red panda\n\n owl \n")
    options = ["--classes", listed, "--classes", "pig", "--json"]
    code, out, _ = cli("predict", generic / "prompt.safetensors", image, *options)
    assert code == 0
    record = json.loads(out)
    model = vpt.load(generic / "prompt.safetensors", class_names=["red panda", "owl", "pig"])
    probabilities = logits_of(model, [image]).softmax(1)[0]
    assert record["class"] == model.class_names[probabilities.argmax()]
    assert record["probability"] == pytest.approx(probabilities.max().item(), rel=1e-4)
    code, _, err = cli("predict", specific / "prompt.safetensors", image, *options)
    assert code
    assert "belongs to its own classes" in err
    assert err.count("\n") == 1
    listed.write_bytes(b"\xff\xfe\x00")
    code, _, err = cli("predict", generic / "prompt.safetensors", image, *options)
    assert code
    assert "not a text in UTF-8" in err


def test_a_suite_trains_once_and_tests_there(tmp_path, animals, cli):
    animals.rename(tmp_path / "folder")
    suite = tmp_path / "mine.yaml"
    suite.write_text(
        f"backbone: {{name: tiny_clip}}\ndata: [folder]\nroot: {tmp_path}\nclass_half: base\n"
        "tests: {new: {class_half: new}, digits: {name: digits}}\nmethods: [zero_shot, coop]\n"
        "shots: [2]\nseeds: [1, 2]\nsettings: {coop: {train: {epochs: 1}}}\n"
    )
    (one, *_) = cells(load_suite(str(suite)), tmp_path / "out")
    (config, _) = one.finals(one.settings[0])
    assert config.data.class_half == "base"
    assert config.tests == {
        "new": {"class_half": "new"},
        "digits": {"name": "digits", "root": None},
    }
    code, _, _ = cli("bench", suite, "--out", tmp_path / "out")
    assert code == 0
    files = sorted(tmp_path.glob("out/runs/*/tests/*.json"))
    assert [file.stem for file in files] == ["digits", "new"] * 4
    files[1].unlink()
    assert cli("bench", suite, "--out", tmp_path / "out", "--resume")[0] == 0
    assert files[1].is_file()
    assert cli("report", tmp_path / "out")[0] == 0
    table = (tmp_path / "out/report/tests.csv").read_text().splitlines()
    assert table[0].startswith("data,shots,backbone,method,own test images,digits,new,")
    assert len(table) == 3
    assert '"folder (folder), base classes"' in table[1]
