"""The demos run. demos/medical: a made-up cohort that says so, a page that stands by itself."""

import csv
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import running
import tiny
from PIL import Image

from vpt.serve.limits import Tenant

DEMOS = Path(__file__).parents[1] / "demos"


@pytest.fixture
def synthetic(monkeypatch):
    monkeypatch.syspath_prepend(DEMOS / "medical")
    import synthetic

    return synthetic


def test_a_cohort_has_patients_a_rare_class_and_says_that_it_is_made_up(synthetic, tmp_path):
    table = synthetic.draw_cohort(tmp_path, 200)
    with table.open() as file:
        rows = list(csv.DictReader(file))
    labels = {row["patient"]: row["label"] for row in rows}
    assert len(labels) == 200
    assert all(labels[row["patient"]] == row["label"] for row in rows)
    counts = [list(labels.values()).count(label) for label in synthetic.PROPORTIONS]
    assert counts == sorted(counts, reverse=True)
    assert 5 < counts[-1] < 40
    scans = np.stack([np.asarray(Image.open(tmp_path / row["path"])) for row in rows[:50]])
    written = (scans == 255).all(0)  # the same letters in all, whatever lies under them
    assert written[-17:].sum() > 50
    assert written[:-17].sum() == 0


def test_the_same_seed_draws_the_same_cohort(synthetic, tmp_path):
    one, other = (synthetic.draw_cohort(tmp_path / name, 5) for name in "ab")
    assert one.read_bytes() == other.read_bytes()
    for path in one.parent.rglob("*.png"):
        assert path.read_bytes() == (other.parent / path.relative_to(one.parent)).read_bytes()


@pytest.mark.slow
def test_the_page_has_every_row_and_names_no_patient(synthetic, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["synthetic.py", "--out", str(out), "--patients", "250"])
    synthetic.main()
    page = (out / "report.html").read_text()
    assert page.count("Not for clinical use") >= 1
    assert "SYNTHETIC: every image was drawn" in page
    for method in ("vpt_deep", "zero_shot", "linear_probe", "random_prompts"):
        result = json.loads((out / method / "result.json").read_text())
        assert f"<th>{method}</th>" in page
        assert f"{100 * result['auroc']:.1f}" in page
    assert "patient0" not in page
    assert str(tmp_path) not in page
    assert "http" not in page


@pytest.fixture
def demo(monkeypatch, capsys):
    """Output of a demo, run as a command."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(DEMOS / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_a_prompt_of_a_few_images_of_a_folder_then_in_onnx(demo, tmp_path):
    root, out = tiny.write_folder(tmp_path / "pets", count=6), tmp_path / "pets.safetensors"
    text = demo("few_shot", root, "--out", out, "--shots", 4)
    assert "8 images trained, 4 tested: accuracy 100.0%" in text
    pytest.importorskip("onnxruntime")
    pictures = sorted(root.rglob("secret5.png"))
    text = demo("onnx_runtime", out, *pictures)
    assert [f"{path}: {path.parent.name}," in text for path in pictures] == [True, True]


def test_many_departments_on_one_backbone(demo):
    text = demo("departments", "--shots", 5)
    accuracies = re.findall(r"(\w+): accuracy (.*)%", text)
    assert {name for name, _ in accuracies} == {"parity", "size", "loops", "reader"}
    assert all(float(accuracy) > 55 for _, accuracy in accuracies)
    assert "to all: {'parity':" in text


def test_ones_own_loop_learns(demo):
    text = demo("own_loop", "--epochs", 5)
    before, after = map(float, re.findall("trained: accuracy (.*)%", text))
    assert after > before + 10


def test_a_client_of_the_server(demo, tmp_path, monkeypatch):
    for name, stored in (("pets", "decision_clip"), ("marks", "multilabel_clip")):
        running.put(tmp_path, name, stored)
    picture = tmp_path / "cat.png"
    picture.write_bytes(running.png())
    token = "of-the-test-alone"
    with running.serving(tmp_path, tenants={"all": Tenant(token=token, tasks=["*"])}) as (http, *_):
        server = ["--server", str(http.base_url)]
        with pytest.raises(SystemExit, match="401: give a token"):
            demo("client", *server)
        monkeypatch.setenv("VPT_TOKEN", token)
        assert "pets (vpt_deep): tabby cat, dog, red_panda" in demo("client", *server)
        text = demo("client", *server, "--task", "pets", picture)
        reply = http.post(
            "/v1/tasks/pets/predict",
            content=picture.read_bytes(),
            headers={"Authorization": f"Bearer {token}", "Content-Type": "image/png"},
        )
        image = reply.json()["images"][0]
        assert f"{picture}: {image['class']} {image['probability']:.1%}" in text
        assert f"{picture}: " in demo("client", *server, "--task", "marks", picture)
        with pytest.raises(SystemExit, match="404: no such task; did you mean 'pets'"):
            demo("client", *server, "--task", "pet", picture)
    with pytest.raises(SystemExit, match="refused: is `vpt serve` running"):
        demo("client", *server)


@pytest.mark.parametrize("path", sorted(DEMOS.glob("[!p]*.py")), ids=lambda path: path.stem)
def test_a_demo_is_short(path):
    assert len(path.read_text().splitlines()) < 100
