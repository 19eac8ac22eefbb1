"""Files of earlier versions keep their meaning: artefacts, run configurations, stopped runs."""

import json
import shutil
from functools import partial

import pytest
import torch
from golden_case import GOLDEN, assert_close
from PIL import Image
from sklearn.datasets import load_digits
from stored import BACKBONES, FOLDER, cases, metadata
from tiny import images, vpt_cli

import vpt
from vpt import methods
from vpt.config import load_run

ARTEFACTS = sorted(FOLDER.glob("*.safetensors"))
RUNS = sorted((GOLDEN / "runs").iterdir())


@pytest.fixture
def cli(capfd, monkeypatch):
    return partial(vpt_cli, capfd, monkeypatch)


def load(path):
    return vpt.load(path, BACKBONES[path.stem.rpartition("_")[2]]())


@pytest.mark.parametrize("path", ARTEFACTS, ids=lambda path: path.stem)
@torch.no_grad()
def test_an_artefact_gives_the_logits_it_gave(path):
    model = load(path)
    expected = torch.tensor(model.metadata["logits"])
    assert_close(model(images()), expected, 1e-5)
    assert_close(model.fold()(images()), expected, 2e-5)
    model.backbone.exact_tokens = True
    assert_close(model(images()), expected, 2e-5)


def test_every_method_and_variant_has_one():
    """Of a new method, `tests/stored.py` writes it."""
    stored = {path.stem.rpartition("_")[0] for path in ARTEFACTS}
    assert stored >= cases().keys()
    assert {metadata(path)["method"] for path in ARTEFACTS} >= set(methods.names())


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
def test_a_run_keeps_its_hash(folder):
    """Else it could not be resumed, and a suite would do it again."""
    command = json.loads((folder / "command.json").read_text())
    assert load_run(str(folder / "config.yaml")).hash == command["hash"]
    if command["arguments"]:  # not of a suite's
        run, *overrides = command["arguments"]
        assert load_run(run, overrides).hash == command["hash"]


def test_a_stopped_run_goes_on(tmp_path, cli):
    folder = shutil.copytree(GOLDEN / "runs" / "interrupted", tmp_path / "run")
    expected = json.loads((folder / "expected.json").read_text())
    code, _, err = cli("train", folder / "config.yaml", f"out={folder}", "--resume")
    assert code == 0, err
    result = json.loads((folder / "result.json").read_text())
    assert result.keys() >= set(expected["keys"])
    assert result["split_hash"] == expected["split_hash"]
    assert result["accuracy"] == pytest.approx(expected["accuracy"], abs=2e-3)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == len(expected["records"])
    for record, before in zip(records, expected["records"], strict=True):
        assert record["lr"] == pytest.approx(before["lr"])
        assert record["loss"] == pytest.approx(before["loss"], rel=2e-4)


def test_a_decision_is_predicted_by(tmp_path, cli):
    folder = GOLDEN / "runs" / "decision"
    expected = [json.loads(x) for x in (folder / "predictions.jsonl").read_text().splitlines()]
    for index, row in enumerate(expected):
        path = tmp_path / row["path"]
        Image.fromarray((load_digits().images[index] * 15).astype("uint8")).save(path)
    code, out, err = cli("predict", "--json", folder / "prompt.safetensors", tmp_path)
    assert code == 0, err
    for line, row in zip(out.splitlines(), expected, strict=True):
        prediction = json.loads(line)
        assert prediction.pop("path") == str(tmp_path / row.pop("path"))
        for key in ("probabilities", "probability"):
            assert prediction.pop(key) == pytest.approx(row.pop(key), rel=1e-3, abs=1e-5)
        assert prediction == row
