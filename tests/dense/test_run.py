"""A run on boxes from files to predictions, by the command line; and on real images."""

import json
import os
import shutil
import sys
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scenes import CLASSES, draw, write_coco, write_voc
from tiny import vpt_cli

from vpt.dense import fit, map_files
from vpt.dense.artefact import kind_of
from vpt.dense.compare import paired_difference
from vpt.dense.config import load_dense
from vpt.dense.pyramid import Maps
from vpt.dense.run import run
from vpt.errors import InputError
from vpt.folder import RunFolder
from vpt.report.runs import find_runs
from vpt.training.checkpoint import write_checkpoint

FAST = ["backbone.name=tiny_clip", "train.steps=4", "detect.channels=32", "detect.convs=1"]
PARTS = {"train": draw(6), "val": draw(2, seed=1), "test": draw(3, seed=2)}
KEYS = {
    *("ap", "ap_interval", "ap50", "ap50_interval", "ap75", "ar", "by_size", "per_class", "froc"),
    *("counting_error", "threshold", "matchable", "num_test", "tunable_parameters", "trained"),
    *("train_seconds", "seed", "config_hash", "split_hash", "shots_per", "artefact_bytes"),
}
VIT = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def write_masks(root, count):
    """images/ and masks/ of bright squares, class 1."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number in range(count):
        mask = np.zeros((32, 32), np.uint8)
        mask[number : number + 12, 8:20] = 1
        Image.fromarray(mask * 150 + 40).convert("RGB").save(root / f"images/{number}.png")
        Image.fromarray(mask).save(root / f"masks/{number}.png")
    return root


@pytest.fixture
def cli(capfd, monkeypatch):
    return partial(vpt_cli, capfd, monkeypatch)


@pytest.fixture
def good(cli):
    """Runs a command that must succeed; gives its stdout."""

    def check(*arguments):
        code, out, err = cli(*arguments)
        assert code == 0, err
        return out

    return check


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_from_boxes_to_predictions(tmp_path, good, cli):
    data, folder = write_voc(tmp_path / "cells", PARTS), tmp_path / "run"
    train = ["train", "detect", *FAST, f"data.root={data}", f"out={folder}", "data.shots=4"]
    code, _, err = cli(*train, "method.name=vpt_deep")
    assert code == 0, err
    assert "shots are images: 4 training, 2 validation, 3 test images" in err
    metrics = result(folder)
    assert set(metrics) >= KEYS
    assert set(metrics["per_class"]) == set(CLASSES)
    assert (metrics["num_test"], metrics["shots_per"], metrics["num_train"]) == (3, "image", 4)
    records = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["step"] == 4
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "prompt.safetensors", "result.json"),
        *("detections.json", "test.json"),
    }  # fmt: skip

    tested = good("eval", folder / "prompt.safetensors")
    assert f"ap50                 {metrics['ap50']:.4f}" in tested
    code, _, err = cli("eval", folder / "prompt.safetensors", "data.shots=3")
    assert code == 1 and "not the split that it was trained with" in err
    code, _, err = cli("eval", folder / "prompt.safetensors", "--all")
    assert code == 1 and "drop --all" in err
    other = write_coco(tmp_path / "others", {"train": draw(3, seed=5)})
    assert "num_test             3" in good(
        "eval", folder / "prompt.safetensors", f"data.root={other}", "--all"
    )

    out = tmp_path / "found"
    picture = data / "JPEGImages" / "test0.png"
    line = json.loads(
        good("predict", folder / "prompt.safetensors", picture, "--json", "--out", out)
    )
    content = json.loads((out / "detections.json").read_text())
    assert line["path"] == str(picture) and len(content["annotations"]) == len(line["objects"])
    assert Image.open(line["drawn"]).size == Image.open(picture).size

    code, _, err = cli(*train, "method.name=vpt_deep")
    assert code == 1 and "holds a run" in err
    again = run(load_dense(str(folder / "config.yaml")), resume=True, log=print)
    assert again == metrics
    with pytest.raises(InputError, match="no finished run below it"):  # the page is of classifiers
        find_runs(folder)
    good("train", "linear_probe", "data.name=digits", "backbone.name=tiny_clip", "data.shots=1",
         f"out={tmp_path / 'classifier'}")  # fmt: skip
    finished, others = find_runs(tmp_path)
    assert [run.path.name for run in finished] == ["classifier"]
    assert others == {RunFolder(folder): "of boxes or masks, which this page does not show"}
    assert paired_difference([folder], [folder])["ap50_interval"] == [0, 0]
    blind, perfect = (Path(shutil.copytree(folder, tmp_path / name)) for name in ("no", "all"))
    (blind / "detections.json").write_text("[]")
    drawn = json.loads((folder / "test.json").read_text())["annotations"]
    (perfect / "detections.json").write_text(json.dumps([{**row, "score": 1.0} for row in drawn]))
    for ones, mean in (([perfect], 1), ([perfect, blind], 0.5)):  # over pairs
        gain = paired_difference(ones, [blind] * len(ones))
        assert gain["ap50"] == pytest.approx(mean)
        assert all(own["ap50"] == pytest.approx(mean) for own in gain["per_class"].values())


def test_a_run_is_the_same_twice_and_holds_out_without_parts(tmp_path):
    data = write_coco(
        tmp_path / "cells", {"train": draw(9)}, patients=lambda _, number: f"p{number // 3}"
    )
    lines = []
    results = [
        run(
            load_dense("detect", [*FAST, f"data.root={data}", f"out={tmp_path / name}"]),
            log=lines.append, progress=False,
        )
        for name in "ab"
    ]  # fmt: skip
    assert results[0]["ap"] == results[1]["ap"] and results[0]["num_test"] == 3
    assert "Not for clinical use." in results[0]["notice"]
    assert any("3 training of 1 patients, 3 validation, 3 test" in line for line in lines)
    assert any("fewer than data.shots=50: all train" in line for line in lines)


class Killed(Exception):
    pass


@pytest.mark.parametrize("stop", [2, 4, 6])
@pytest.mark.parametrize("kind", ["detect", "segment"])
def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path, monkeypatch, kind, stop):
    monkeypatch.setattr(fit, "EVERY", 2)
    keys = ["backbone.name=tiny_clip", "train.steps=6", f"{kind}.channels=32", "data.shots=5"]
    keys += ["method.name=vpt_deep", "method.dropout=0.3", "data.flips=both"]
    if kind == "detect":
        keys += [f"data.root={write_voc(tmp_path / 'cells', PARTS)}"]
    else:
        keys += [f"data.root={write_masks(tmp_path / 'cells', 12)}", "data.masks=class"]
    load = partial(load_dense, kind)
    whole = run(load([*keys, f"out={tmp_path / 'whole'}"]), log=print, progress=False)
    config, folder = load([*keys, f"out={tmp_path / 'run'}"]), RunFolder(tmp_path / "run")

    def killed(path, model, optimizer, history):
        write_checkpoint(path, model, optimizer, history)
        if history[-1]["step"] == stop:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(fit, "write_checkpoint", killed)
        run(config, log=print, progress=False)
    assert folder.checkpoint.is_file() and not folder.result.exists()
    assert kind_of(folder.prompt) == kind
    with pytest.raises(InputError, match="interrupted: give --resume"):
        run(config, log=print, progress=False)
    resumed = run(config, resume=True, log=print, progress=False)
    assert {k: v for k, v in resumed.items() if "seconds" not in k} == {
        k: v for k, v in whole.items() if "seconds" not in k
    }
    both = [load_file(tmp_path / name / "prompt.safetensors") for name in ("whole", "run")]
    assert all(torch.equal(tensor, both[1][name]) for name, tensor in both[0].items())
    assert not folder.checkpoint.exists()


def test_a_killed_run_does_not_go_on_with_other_images(tmp_path, monkeypatch):
    parts = {**PARTS, "test": draw(1, seed=2)}
    data = write_voc(tmp_path / "cells", PARTS)
    config = load_dense("detect", [*FAST, f"data.root={data}", f"out={tmp_path / 'run'}"])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(fit, "write_checkpoint", raiser)
        run(config, log=print, progress=False)
    shutil.rmtree(data)
    write_voc(data, parts)
    with pytest.raises(InputError, match="its images changed since it was interrupted"):
        run(config, resume=True, log=print, progress=False)
    shutil.rmtree(data)
    write_voc(data, PARTS)
    (tmp_path / "run/checkpoint.pt").write_bytes(b"half")
    with pytest.raises(InputError, match=r"checkpoint.pt: cannot be continued .* start again"):
        run(config, resume=True, log=print, progress=False)


def test_maps_of_a_frozen_tower_are_kept_on_disk(tmp_path, monkeypatch):
    data, cache, lines = write_voc(tmp_path / "cells", PARTS), tmp_path / "maps", []

    def train(name, *more):
        keys = [
            *FAST,
            f"data.root={data}",
            "data.shots=2",
            "data.flips=none",
            *more,
            f"out={tmp_path / name}",
        ]
        return run(load_dense("detect", keys), log=lines.append, progress=False)

    def counted(self, *given):
        calls.append(len(given[0]))
        return forward(self, *given)

    forward, calls = Maps.forward, []
    monkeypatch.setattr(Maps, "forward", counted)
    bare = train("bare")
    kept = f"engine.feature_cache={cache}"
    first, calls_first = train("first", kept), calls.copy()
    calls.clear()
    second = train("second", kept)
    assert bare["config_hash"] == first["config_hash"]
    assert bare["ap"] == first["ap"] == second["ap"]
    files = sorted(cache.rglob("*.safetensors"))
    assert sum(calls_first) // 2 - sum(calls) == len(files) == 2
    assert f"of 2 images up to 0.00 GB in {cache}, of whose disk 1 GiB stay free" in lines[-2]

    files[0].write_bytes(files[0].read_bytes()[:-4] + b"dust")
    calls.clear()
    assert train("third", kept)["ap"] == bare["ap"] and sum(calls) == 1 + sum(calls_first) // 2 - 2
    train("other", kept, "detect.layers=[0]")
    assert len(list(cache.iterdir())) == 2

    monkeypatch.setattr(map_files, "SPARE_BYTES", 2**62)
    train("full", f"engine.feature_cache={tmp_path / 'full_disk'}")
    assert not list((tmp_path / "full_disk").rglob("*.safetensors"))
    with pytest.raises(InputError, match=r"engine\.feature_cache=.*give another folder"):
        train("file", f"engine.feature_cache={files[0]}")
    assert not (tmp_path / "file").exists()
    train("prompts", kept, "method.name=vpt_deep")
    assert any("they change while vpt_deep trains" in line for line in lines)
    assert len(list(cache.iterdir())) == 2


def raiser(*arguments):
    raise Killed


def test_what_is_missing_is_said_and_nothing_is_written(tmp_path, monkeypatch):
    data = write_voc(tmp_path / "cells", PARTS)
    config = [*FAST, f"data.root={data}", f"out={tmp_path / 'run'}"]
    with pytest.raises(InputError, match="32 pixels alone"):
        run(load_dense("detect", [*config, "data.size=64"]), log=print)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(InputError, match=r"visual-prompt-tuning\[dense\]"):
        run(load_dense("detect", config), log=print)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif("VPT_REAL_DATA" not in os.environ, reason="VPT_REAL_DATA is not set: no BCCD")
@pytest.mark.parametrize("method", ["head_only", "vpt_deep"])
def test_sixteen_real_images(tmp_path, method):
    real = Path(os.environ["VPT_REAL_DATA"])
    with tarfile.open(real / "bccd.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    overrides = [f"data.root={tmp_path / 'BCCD'}", f"method.name={method}", "data.shots=16"]
    overrides += ["data.size=224", "data.flips=both", "train.steps=100", "detect.channels=64"]
    overrides += [f"backbone.name={VIT}", f"backbone.checkpoint={real / f'{VIT}.fp16.safetensors'}"]
    metrics = run(load_dense("detect", [*overrides, f"out={tmp_path / 'run'}"]), log=print)
    losses = [
        json.loads(x)["loss"] for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < losses[0]
    assert metrics["ap50"] > 0.3
    assert metrics["per_class"]["WBC"]["ap50"] > 0.5
