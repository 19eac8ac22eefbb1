"""Training: repeatable, resumable, stopped by NaN, the same by every path."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
import torch
from tiny import NAMES, attach, clip, images, samples, vit, write_folder
from torch.utils.data import DataLoader, TensorDataset

import vpt
from vpt.artifact import read
from vpt.backbones import base
from vpt.backbones.clip import Adapter
from vpt.config import TrainConfig, load_run
from vpt.errors import InputError
from vpt.run import run
from vpt.training.fit import make_optimizer

SAMPLES = samples(np.arange(10) % 3)


def loader(model, augment="none"):
    return tiny.loader(model, SAMPLES, 4, augment=augment, seed=1)


def tensors(model):
    return {name: t.clone() for name, t in model.artifact_tensors().items()}


def losses(history):
    return [record["loss"] for record in history]


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


CONFIG = TrainConfig(epochs=4, lr=1e-2, warmup_epochs=1)


@pytest.mark.parametrize(
    ("method", "options", "augment"),
    [
        ("vpt_deep", {"dropout": 0.3}, "crop_flip"),
        ("vpt_shallow", {"project": 5}, "none"),
        ("full_finetune", {}, "crop"),
    ],
)
def test_two_fits_give_the_same_numbers(method, options, augment):
    fits = []
    for noise in range(2):
        model = attach(vit(), method, **options)
        data = loader(model, augment)
        torch.manual_seed(100 + noise)  # what was drawn before does not matter
        fits.append((losses(vpt.fit(model, data, config=CONFIG)), tensors(model)))
    assert fits[0][0] == fits[1][0]
    assert_same(fits[0][1], fits[1][1])
    other = attach(vit(), method, **options)
    history = vpt.fit(other, loader(other, augment), config=CONFIG.model_copy(update={"seed": 2}))
    changes = bool(options.get("dropout"))  # the seed of `fit` draws the dropout masks only
    assert (losses(history) != fits[0][0]) == changes


def test_each_epoch_draws_dropout_masks_of_its_own():
    model = attach(vit(), "vpt_deep", head="random", dropout=0.5)
    data = DataLoader(TensorDataset(images(8), torch.arange(8) % 3), 4)  # always in this order
    config = {"epochs": 3, "lr": 1e-12, "schedule": "constant"}
    one, two, three = losses(vpt.fit(model, data, config=config))
    assert min(abs(one - two), abs(two - three), abs(one - three)) > 1e-5


def test_one_record_an_epoch():
    model = attach(vit(), "vpt_deep", head="random")
    calls = []
    history = vpt.fit(
        model,
        loader(model),
        val=loader(model),
        config=CONFIG,
        on_epoch=lambda records: calls.append(len(records)),
    )
    assert [record["epoch"] for record in history] == [0, 1, 2, 3]
    assert history[0]["lr"] == 0
    assert history[1]["lr"] == 1e-2
    for record in history:
        assert set(record) == {"epoch", "lr", "loss", "accuracy", "val_accuracy", "seconds"}
    assert calls == [1, 2, 3, 4]
    assert not model.training
    model.eval()
    # lr is 0 in the first epoch, so its loss is that of the prompts as drawn
    first = attach(vit(), "vpt_deep", head="random").eval()
    batch = next(iter(tiny.loader(first, SAMPLES, 10, train=False)))
    loss = first.loss(*batch)[0].item()
    assert history[0]["loss"] == pytest.approx(loss, rel=1e-5)


def test_any_loader_of_images_and_labels_will_do():
    model = attach(vit(), "vpt_deep")
    labels = torch.tensor([0, 1, 2, 0, 1])
    data = DataLoader(TensorDataset(images(5), labels), batch_size=2, shuffle=True)
    history = vpt.fit(model, data, config=TrainConfig(epochs=30, lr=1e-2, warmup_epochs=0))
    assert history[-1]["accuracy"] == 1
    assert vpt.evaluate(model, data)["accuracy"] == 1


class Stop(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("vpt_deep", {"dropout": 0.3}),
        ("vpt_deep", {"head": "random"}),
        ("coop", {"num_tokens": 4}),
        ("kv_prompts", {"prune_tokens": 0.5}),
        ("self_prompts", {}),
        ("lora", {"dropout": 0.3}),
    ],
)
def test_a_stopped_fit_continues_as_if_it_had_not_been(tmp_path, optimizer, method, options):
    config = CONFIG.model_copy(update={"optimizer": optimizer})
    backbone = clip() if method == "coop" else vit()
    whole = attach(backbone, method, **options)
    expected = vpt.fit(whole, loader(whole), config=config, checkpoint=tmp_path / "whole.pt")

    def stop(history):
        if len(history) == 3:  # before the checkpoint of this epoch is written
            raise Stop

    stopped = attach(backbone, method, **options)
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(Stop):
        vpt.fit(stopped, loader(stopped), config=config, checkpoint=checkpoint, on_epoch=stop)
    again = attach(backbone, method, **options)
    history = vpt.fit(again, loader(again), config=config, checkpoint=checkpoint)
    assert losses(history) == losses(expected)
    assert_same(tensors(again), tensors(whole))


@pytest.mark.parametrize("content", [b"", b"hello", b"PK"])
def test_a_checkpoint_that_is_none_is_one_line(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    model = attach(vit(), "vpt_deep")
    with pytest.raises(InputError, match=r"checkpoint\.pt: cannot be continued from") as caught:
        vpt.fit(model, loader(model), config=CONFIG, checkpoint=path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    one, other = attach(vit(), "vpt_shallow"), attach(vit(), "vpt_deep")
    vpt.fit(one, loader(one), config=CONFIG, checkpoint=path)
    with pytest.raises(InputError, match="cannot be continued from"):
        vpt.fit(other, loader(other), config=CONFIG, checkpoint=path)


@pytest.fixture
def settings(tmp_path):
    """Of a run of some seconds."""
    write_folder(tmp_path / "images", NAMES, count=8)
    return [
        *("backbone.name=tiny_clip", f"data.root={tmp_path / 'images'}", "data.shots=6"),
        *("method.dropout=0.3", "method.layers=[0, 2, 3]", "train.epochs=40", "train.batch_size=6"),
    ]


def command(module, settings, out):
    return [sys.executable, "-m", *module, "train", "vpt_deep", *settings, f"out={out}"]


def run_here(settings, out, resume=False):
    return run(load_run("vpt_deep", [*settings, f"out={out}"]), resume=resume, log=str)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def records(folder):
    """metrics.jsonl without the times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path, settings):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    settings = [*settings, "train.folds=null"]
    process = subprocess.Popen(
        command(["vpt.cli"], settings, killed), env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (killed / "metrics.jsonl").is_file() or len(records(killed)) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(records(killed)) < 40
    assert not (killed / "result.json").exists()
    read(killed / "prompt.safetensors")  # whole, whenever the kill came

    result = run_here(settings, killed, resume=True)
    expected = run_here(settings, whole)
    assert_same(read(killed / "prompt.safetensors")[0], read(whole / "prompt.safetensors")[0])
    assert records(killed) == records(whole)
    assert len(records(killed)) == 40
    del result["train_seconds"], expected["train_seconds"]
    assert result == expected
    files = {"config.yaml", "metrics.jsonl", "prompt.safetensors", "result.json", "confusion.png"}
    assert {path.name for path in whole.iterdir()} == files


@pytest.mark.parametrize(
    ("setting", "where", "name", "called"),
    [("checkpointing", base, "checkpoint", True), ("exact_tokens", Adapter, "rows", False)],
)
def test_a_run_computes_as_its_engine_is_told(
    tmp_path, settings, monkeypatch, setting, where, name, called
):
    real, calls = getattr(where, name), []
    monkeypatch.setattr(where, name, lambda *a, **kw: calls.append(name) or real(*a, **kw))
    settings = [*settings, "train.epochs=1", "method.gated=false", "train.folds=null"]
    told = [*settings, f"engine.{setting}=true"]
    run_here(told, tmp_path / "told")
    assert bool(calls) == called
    calls.clear()
    run_here(settings, tmp_path / "plain")
    assert bool(calls) != called


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_nan_stops_and_the_last_good_epoch_is_kept(tmp_path, optimizer):
    model = attach(vit(), "vpt_deep")
    kept = []
    config = CONFIG.model_copy(update={"lr": 1e30, "optimizer": optimizer})
    with pytest.raises(InputError, match=r"the loss is .* in epoch 1: lower train\.lr=1e\+30") as e:
        vpt.fit(model, loader(model), config=config, on_epoch=lambda _: kept.append(tensors(model)))
    assert "\n" not in str(e.value)
    assert len(kept) == 1
    assert all(tensor.isfinite().all() for tensor in kept[0].values())


def test_a_solved_method_needs_one_pass():
    model = attach(vit(), "linear_probe")
    history = vpt.fit(model, loader(model), config=CONFIG)
    assert len(history) == 1
    assert history[0]["accuracy"] == vpt.evaluate(model, loader(model))["accuracy"]
    before = tensors(model)
    vpt.fit(model, loader(model), config=CONFIG)
    for name, tensor in tensors(model).items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_only_the_heads_bias_is_free_of_weight_decay(optimizer):
    model = attach(vit(), "vpt_deep", project=5)
    config = TrainConfig(optimizer=optimizer, weight_decay=0.25, lr=0.5, momentum=0.75)
    made = make_optimizer(model, config)
    decay = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    named = model.tunable_parameters()
    assert decay.keys() == {id(p) for p in named.values()}
    expected = {name: 0 if name == "head.bias" else 0.25 for name in named}
    assert {name: decay[id(p)] for name, p in named.items()} == expected
    assert all(group["lr"] == 0.5 for group in made.param_groups)
    if optimizer == "sgd":
        assert all(group["momentum"] == 0.75 for group in made.param_groups)


def test_bf16_trains_float32_prompts():
    model = attach(vit(), "vpt_deep")
    history = vpt.fit(model, loader(model), config=CONFIG.model_copy(update={"precision": "bf16"}))
    plain = attach(vit(), "vpt_deep")
    expected = vpt.fit(plain, loader(plain), config=CONFIG.model_copy(update={"precision": "fp32"}))
    assert losses(history) == pytest.approx(losses(expected), rel=0.05)
    assert losses(history) != losses(expected)
    assert {tensor.dtype for tensor in tensors(model).values()} == {torch.float32}


@pytest.mark.parametrize("head", ["random", "crossfit"])
def test_two_processes_give_one_run(tmp_path, settings, head):
    one, two = tmp_path / "one", tmp_path / "two"
    settings = [*settings, "train.epochs=3", "train.min_steps=0", "train.folds=null"]
    # batches of the same images in one process or two
    settings += ["method.dropout=0", f"method.head={head}", "train.batch_size=2"]
    torchrun = ["torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "vpt.cli"]
    done = subprocess.run(
        command(torchrun, settings, two), env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("num_test") == 1
    bars = [line for line in done.stderr.splitlines() if line.startswith("training ")]
    assert len(bars) == 1  # else each process ran by itself
    expected = run_here(settings, one)
    result = json.loads((two / "result.json").read_text())
    assert result["num_test"] == expected["num_test"]
    assert result["accuracy"] == pytest.approx(expected["accuracy"], abs=0.2)
    assert records(one)[0]["loss"] > 1e-4
    for record, other in zip(records(two), records(one), strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
