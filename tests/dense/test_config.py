"""Configurations of runs on boxes and masks: files, recipes of methods, overrides."""

import pytest

from vpt import methods, resources
from vpt.config import kind_of, to_yaml
from vpt.dense.config import CONFIGS, load_dense
from vpt.dense.pyramid import HEAD_ONLY
from vpt.errors import InputError

ROOT = ["data.root=cells"]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_file_and_its_own_yaml_are_the_same(kind, tmp_path):
    masks = ["data.masks=instance"] if kind == "segment" else []
    config = load_dense(kind, [*ROOT, *masks, "data.shots=null", "method.name=vpt_deep"])
    assert (config.kind, kind_of(kind), config.data.shots) == (kind, kind, None)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_dense(str(path)) == config
    assert load_dense(str(path)).hash == config.hash
    assert load_dense(str(path), ["data.seed=2"]).hash != config.hash
    assert load_dense(str(path), ["out=elsewhere"]).hash == config.hash


@pytest.mark.parametrize("name", resources.names("configs/dense"))
def test_a_recipe_is_of_a_method(name):
    config = load_dense("detect", [*ROOT, f"method.name={name}"])
    assert config.method.name == name
    if name != HEAD_ONLY:
        methods.check_options(name, config.method.options)


def test_the_recipe_comes_first_then_the_file_then_the_overrides(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "kind: detect\nbackbone: {name: tiny_clip}\ndata: {root: cells}\n"
        "method: {name: vpt_deep, num_tokens: 3}\ntrain: {steps: 7, lr: 0.5}\n"
    )
    config = load_dense(str(path), ["train.lr=0.25"])
    assert config.method.options == {"num_tokens": 3, "gated": True}
    assert (config.train.steps, config.train.lr, config.train.method_lr) == (7, 0.25, 5e-3)
    other = load_dense(str(path), ["method.name=bias_tuning"])
    assert (other.train.steps, other.method.options) == (600, {})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "data.root is missing"),
        ([*ROOT, "detect.channels=100"], "multiple of 32"),
        ([*ROOT, "detect.chanels=64"], "did you mean 'detect.channels'"),
        ([*ROOT, "train.epochs=3"], "unknown key 'train.epochs'"),
        ([*ROOT, "data.flips=all"], "data.flips"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(InputError, match=message):
        load_dense("detect", overrides)


def test_a_classifier_is_another_kind():
    assert kind_of("vpt_deep") is None
    with pytest.raises(InputError, match="kind is none of detect, segment"):
        load_dense("vpt_deep")
