"""Where a run starts: from another artefact's prompts, or the one that fits the images best."""

import json
import shutil

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from tiny import NAMES, attach, clip, images, samples, vit, write_folder

import vpt
from vpt.artifact import start_from
from vpt.config import load_run
from vpt.errors import InputError
from vpt.run import run
from vpt.training.start import NONE, PENALTIES, choose, held_out, held_out_fit


def quiet(line):
    pass


def settings(tmp_path, out, *extra):
    return load_run(
        "vpt_deep",
        [
            "backbone.name=tiny_clip",
            f"data.root={tmp_path / 'images'}",
            "data.shots=3",
            "train.folds=null",
            "train.epochs=1",
            "train.min_steps=0",
            "method.num_tokens=2",
            "train.warmup_epochs=0",
            f"out={tmp_path / out}",
            *extra,
        ],
    )


def saved(path, backbone, method="vpt_deep", **options):
    """An artefact of which no tensor is as it was drawn for another."""
    model = attach(backbone, method, **options)
    with torch.no_grad():
        for parameter in model.tunable_parameters().values():
            parameter.add_(torch.randn_like(parameter))
    return vpt.save(model, path), model


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("vpt_deep", {"gated": True, "head": "crossfit"}),
        ("coop", {"num_tokens": 3}),
        ("maple", {}),
        ("lora", {}),
    ],
)
def test_all_but_the_head_starts_from_the_artefact_whatever_its_classes(tmp_path, method, options):
    backbone = clip()
    path, source = saved(tmp_path / "a.safetensors", backbone, method, **options)
    model = attach(backbone, method, class_names=["x", "y", "z", "w"], **options)
    before = {name: tensor.clone() for name, tensor in model.tunable_parameters().items()}
    start_from(model, path)
    theirs = source.tunable_parameters()
    for name, parameter in model.tunable_parameters().items():
        own = name.startswith("head.")
        assert torch.equal(parameter, before[name] if own else theirs[name]), name
    assert model.tunable_parameters().keys() == before.keys()
    model.loss(images(), torch.tensor([0, 1, 3]))[0].backward()


@pytest.mark.parametrize(
    ("method", "given", "wanted", "message"),
    [
        ("vpt_deep", {}, {"num_tokens": 3}, r"prompts: \(2, 10, 32\), but \(2, 3, 32\) here"),
        ("vpt_deep", {}, {"gated": True}, r"gates: none, but \(2,\) here"),
        ("vpt_deep", {"gated": True}, {}, r"gates: \(2,\), but none here"),
        ("linear_probe", {}, {}, "learns nothing beside a head"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(tmp_path, method, given, wanted, message):
    backbone = vit()
    path, _ = saved(tmp_path / "a.safetensors", backbone, method, **given)
    model = attach(backbone, method, **wanted)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=message) as error:
        start_from(model, path)
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_another_method_or_backbone_is_refused(tmp_path):
    path, _ = saved(tmp_path / "a.safetensors", vit())
    with pytest.raises(InputError, match="vpt_deep learned it, so it is no start for vpt_shallow"):
        start_from(attach(vit(), "vpt_shallow"), path)
    with pytest.raises(InputError, match="fingerprint"):
        start_from(attach(vit(seed=1)), path)


def test_what_belongs_to_classes_starts_no_others(tmp_path):
    backbone = clip()
    path, _ = saved(tmp_path / "a.safetensors", backbone, "taskres")
    start_from(attach(backbone, "taskres"), path)
    with pytest.raises(InputError, match="belongs to its own classes"):
        start_from(attach(backbone, "taskres", class_names=["x", "y", "z"]), path)


def test_leave_one_out_is_that_of_as_many_ridges():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(14, 5, generator=generator) * torch.arange(1, 6)
    labels = torch.arange(14) % 3
    features[:, 0] += labels
    truth = torch.nn.functional.one_hot(labels).bool()
    x = features.double().numpy()
    x = (x - x.mean(0)) / x.std(0)
    y = 2.0 * truth.numpy() - 1
    fits = {}
    for penalty in PENALTIES:
        fits[penalty] = np.stack(
            [
                Ridge(penalty).fit(np.delete(x, i, 0), np.delete(y, i, 0)).predict(x[i : i + 1])[0]
                for i in range(len(x))
            ]
        )
    errors = {penalty: ((fit - y) ** 2).mean() for penalty, fit in fits.items()}
    best = min(errors, key=errors.get)
    found, error = held_out_fit(features, truth)
    np.testing.assert_allclose(found.numpy(), fits[best], rtol=1e-8, atol=1e-10)
    assert error == pytest.approx(errors[best])


def test_the_best_is_chosen_and_none_without_a_reason():
    assert choose({NONE: (0.5, 1.0), "a": (0.75, 2.0), "b": (0.75, 1.5)}) == "b"
    assert choose({NONE: (0.5, 1.0), "a": (0.5, 1.0)}) == NONE
    assert choose({NONE: (0.0, 1.0), "a": (0.0, 0.5)}) == NONE  # one image a class


def test_a_source_that_tells_the_classes_apart_is_chosen(tmp_path):
    backbone = vit()
    data = samples(np.arange(12) % 3)
    good, _ = saved(tmp_path / "good.safetensors", backbone, head="random")
    constant = attach(backbone, head="random")
    with torch.no_grad():  # prompts so loud that no image is heard
        constant.prompts.fill_(0).add_(1e4 * torch.randn(constant.prompts.shape[-1]))
    vpt.save(constant, tmp_path / "bad.safetensors")
    other, _ = saved(tmp_path / "other.safetensors", backbone, num_tokens=3)
    target = attach(backbone, head="random")
    before = target.prompts.clone()
    lines = []
    paths = sorted(tmp_path.glob("*.safetensors"))
    found = held_out(target, paths, data, "fp32", lines.append)
    assert found.keys() == {NONE, "good", "bad"}
    assert "other.safetensors" in lines[0] and "left out" in lines[0]
    assert torch.equal(target.prompts, before)
    with pytest.raises(InputError, match="no artefact of the folder fits"):
        held_out(target, [other], data, "fp32", quiet)
    with pytest.raises(InputError, match="coop leaves alone"):
        held_out(attach(clip(), "coop"), [good], data, "fp32", quiet)


def test_a_run_starts_there_and_its_hash_knows_the_content(tmp_path):
    write_folder(tmp_path / "images")
    plain = settings(tmp_path, "source")
    run(plain, log=quiet, progress=False)
    source = tmp_path / "source" / "prompt.safetensors"
    one, two = tmp_path / "tasks" / "one.safetensors", tmp_path / "two.safetensors"
    one.parent.mkdir()
    shutil.copy(source, one)
    shutil.copy(source, two)
    config = settings(tmp_path, "run", f"init_from={one}")
    assert config.hash == settings(tmp_path, "run", f"init_from={two}").hash != plain.hash
    assert settings(tmp_path, "run", "init_from=null").hash == plain.hash
    result = run(config, log=quiet, progress=False)
    digest = json.loads(json.dumps(result))["init_from"]["sha256"]
    assert vpt.load(tmp_path / "run" / "prompt.safetensors").metadata["init_from"]["sha256"] == (
        digest
    )
    assert run(config, resume=True, log=quiet) == result
    auto = settings(tmp_path, "auto", f"init_from=auto:{one.parent}", "data.seed=2")
    lines = []
    chosen = run(auto, log=lines.append, progress=False)["init_from"]
    assert chosen["held_out_accuracy"].keys() == {NONE, "one"}
    assert chosen["name"] in {NONE, "one"}
    assert any("leave-one-out accuracy" in line for line in lines)
    shutil.copy(tmp_path / "auto" / "prompt.safetensors", one)
    with pytest.raises(InputError, match="init_from was another artefact"):
        run(config, resume=True, log=quiet)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("none.safetensors", "none.safetensors: no such artefact"),
        ("auto:nowhere", "nowhere: no artefact in it"),
        ("images/cat/secret0.png", "not a safetensors file"),
    ],
)
def test_a_start_that_is_none_is_said_before_anything_is_written(
    tmp_path, monkeypatch, value, message
):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "images")
    with pytest.raises(InputError, match=message):
        run(settings(tmp_path, "run", f"init_from={value}"), log=quiet)
    assert not (tmp_path / "run").exists()


def test_prompts_are_where_steps_begin(tmp_path):
    write_folder(tmp_path / "images")
    run(settings(tmp_path, "source", "train.seed=5"), log=quiet, progress=False)
    source = tmp_path / "source" / "prompt.safetensors"
    still = settings(tmp_path, "still", f"init_from={source}", "train.lr=1e-30")
    run(still, log=quiet, progress=False)
    before, after = (vpt.load(tmp_path / n / "prompt.safetensors") for n in ("source", "still"))
    assert torch.equal(before.prompts, after.prompts)
    assert before.class_names == after.class_names != NAMES
