"""Run configurations with embedded or real data give the result that they state."""

import os
from pathlib import Path

import pytest

from vpt import resources
from vpt.config import kind_of, load_run
from vpt.run import run

CLASSIFIERS = [name for name in resources.names("configs/run") if kind_of(name) is None]
CONFIGS = [name for name in CLASSIFIERS if load_run(name).expected]
VIT = "vit_tiny_patch16_224.augreg_in21k_ft_in1k.fp16.safetensors"


def test_every_configuration_with_data_states_its_result():
    named = [name for name in CLASSIFIERS if load_run(name).data.name]
    assert set(named) <= set(CONFIGS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [c for c in CONFIGS if not c.startswith("caltech")])
def test_expected(name, tmp_path):
    overrides = [f"out={tmp_path}"]
    if name.startswith("pneumonia"):
        if "VPT_REAL_DATA" not in os.environ:
            pytest.skip("VPT_REAL_DATA is not set: no PneumoniaMNIST here")
        real = Path(os.environ["VPT_REAL_DATA"])
        overrides += [f"data.root={real / 'pneumoniamnist.npz'}"]
        overrides += [f"backbone.checkpoint={real / VIT}"]
    config = load_run(name, overrides)
    accuracy = run(config, log=lambda line: None)["accuracy"]
    assert accuracy == pytest.approx(config.expected.accuracy, abs=config.expected.within)


@pytest.mark.skipif("VPT_REAL_DATA" not in os.environ, reason="VPT_REAL_DATA is not set")
def test_real_weights_and_images(tmp_path):
    real = Path(os.environ["VPT_REAL_DATA"])
    overrides = ["data.shots=4", "train.epochs=1", "train.min_steps=0", f"out={tmp_path}"]
    overrides += [f"data.root={real / 'breastmnist.npz'}", f"backbone.checkpoint={real / VIT}"]
    result = run(load_run("vpt_shallow", overrides), log=lambda line: None)
    assert result["data"] == "breastmnist" and result["num_test"] == 156
    assert result["tunable_parameters"] == 10 * 192 + 12  # prompts and gates
