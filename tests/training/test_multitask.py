"""Several data sets at once: a shared prompt, a rank-one change of it and an artefact for each."""

import json

import numpy as np
import pytest
import torch
from tiny import attach, images, loader, samples, vit, vpt_cli, write_image
from torch.nn import functional as F

import vpt
from vpt import multitask
from vpt.artifact import read
from vpt.backbones.base import Prompts
from vpt.config import load_run, to_yaml
from vpt.errors import InputError
from vpt.losses.cross_entropy import CrossEntropy
from vpt.methods.base import Batch
from vpt.multitask import join
from vpt.training.multitask import Multitask

CLASSES = {"pets": ["cat", "dog"], "cars": ["van", "bus", "jeep"]}
LABELS = torch.tensor([0, 2, 1, 4, 3, 0, 2])  # cat, van, dog, jeep, bus, cat, van
PETS = LABELS < 2


def quiet(line):
    pass


def joint(method="vpt_deep", seed=0, **options):
    """Two tasks whose tensors are no longer as they were drawn."""
    backbone = vit()
    options = {"num_tokens": 3, "head": "random"} | options
    tasks = {n: attach(backbone, method, class_names=c, **options) for n, c in CLASSES.items()}
    model = Multitask(tasks)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.tunable_parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("method", "options"),
    [("vpt_deep", {}), ("vpt_deep", {"gated": True}), ("vpt_shallow", {})],
)
def test_a_step_is_the_mean_of_what_each_task_would_do_alone(method, options):
    model = joint(method, **options).double()
    x = images(len(LABELS)).double()
    step = model.step(Batch(x, LABELS), CrossEntropy(model.target))
    step.total.backward()
    found = {name: p.grad.clone() for name, p in model.tunable_parameters().items()}
    model.zero_grad()
    total = 0
    for number, (own, start) in enumerate(((PETS, 0), (~PETS, 2))):
        task = model.tasks[number]
        u, v = model.token_factors[number], model.width_factors[number]
        sets = [model.shared[i] * torch.outer(u[i], v[i]) for i in range(len(u))]
        prompts = Prompts(sets, task.layers, gates=task.gates)
        logits = task.head(model.backbone(x[own], prompts))
        total = total + F.cross_entropy(logits, LABELS[own] - start, reduction="sum")
        columns = slice(start, start + logits.shape[1])
        torch.testing.assert_close(step.logits[own][:, columns], logits.detach(), atol=1e-9, rtol=0)
    total = total / len(LABELS)
    torch.testing.assert_close(step.total, total, atol=1e-9, rtol=1e-9)
    total.backward()
    for name, parameter in model.tunable_parameters().items():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-9, rtol=1e-7)
    assert (step.logits.argmax(1) < 2).equal(PETS)  # no class of another task


def test_tasks_start_as_they_would_alone():
    backbone = vit()
    alone = attach(backbone, num_tokens=3, class_names=CLASSES["pets"]).eval()
    tasks = {n: attach(backbone, num_tokens=3, class_names=c) for n, c in CLASSES.items()}
    model = Multitask(tasks)
    x = images(2)
    features = model.batch_features(Batch(x, torch.tensor([0, 4])))
    torch.testing.assert_close(features, alone.features(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("options", [{"gated": True, "head": "crossfit"}, {"head": "probe"}])
def test_each_task_is_left_with_prompts_and_a_head_of_its_own(tmp_path, options):
    model = joint(**options)
    own = {"pets": samples(np.arange(12) % 2, seed=1), "cars": samples(np.arange(18) % 3, seed=2)}
    data = loader(model, join(own, model.starts.tolist()), 8, seed=1)
    config = {"epochs": 2, "lr": 0.01, "schedule": "constant"}
    vpt.fit(model, data, config=config)
    for number, (name, task) in enumerate(zip(CLASSES, model.tasks, strict=True)):
        path = vpt.save(task, tmp_path / f"{name}.safetensors")
        alone = vpt.load(path, vit())
        assert alone.name == "vpt_deep"
        test = loader(model, own[name], 20, train=False)
        x, labels = next(iter(test))
        batch = Batch(x, labels + model.starts[number])
        logits = task.head(model.batch_features(batch))
        torch.testing.assert_close(alone(x), logits, atol=1e-5, rtol=1e-4)
    pets, cars = model.tasks
    assert not torch.equal(pets.prompts, cars.prompts)
    bank = vpt.PromptBank(vit())
    for name in CLASSES:
        bank.add(name, tmp_path / f"{name}.safetensors")
    x = images(2)
    one, two = bank(x, ["pets", "cars"])
    torch.testing.assert_close(one, pets(x[:1])[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(two, cars(x[1:])[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("linear_probe", {}, "linear_probe has no prompts to share"),
        ("fourier_prompts", {}, "fourier_prompts has no prompts to share"),
        ("vpt_deep", {"project": 5}, "of one task: drop them"),
    ],
)
def test_other_methods_are_refused(method, options, message):
    backbone = vit()
    tasks = {n: attach(backbone, method, class_names=c, **options) for n, c in CLASSES.items()}
    with pytest.raises(InputError, match=message):
        Multitask(tasks)


@pytest.fixture
def folders(tmp_path):
    """Two data sets whose images do not look alike."""
    for task, names in CLASSES.items():
        for label, name in enumerate(names):
            for index in range(6):
                seed = index + 50 * (task == "cars")
                write_image(tmp_path / task / name / f"{index}.png", label, seed, size=(96, 90))
    return tmp_path


def settings(folders, *extra):
    return load_run(
        "multitask",
        [
            *(f"tasks.{name}.root={folders / name}" for name in CLASSES),
            "backbone.name=tiny_clip",
            "data.shots=3",
            "tasks.cars.shots=4",
            "train.epochs=2",
            "train.min_steps=0",
            "method.num_tokens=2",
            f"out={folders / 'run'}",
            *extra,
        ],
    )


def test_a_run_leaves_a_folder_that_is_served_and_resumed(folders, capfd, monkeypatch):
    config = settings(folders)
    result = multitask.run(config, log=quiet, progress=False)
    out = folders / "run"
    assert result == json.loads((out / "result.json").read_text())
    each = {name: json.loads((out / name / "result.json").read_text()) for name in CLASSES}
    assert result["accuracy"] == pytest.approx(np.mean([r["accuracy"] for r in each.values()]))
    assert (each["pets"]["num_train"], each["cars"]["num_train"]) == (6, 12)
    depth, width = 6, 160
    assert result["shared_bytes"] == 4 * depth * 2 * width
    assert result["task_bytes"] == 4 * depth * (2 + width + 1)  # and a gate
    assert result["artefact_bytes"] == result["shared_bytes"] + 4 * depth
    assert multitask.run(config, resume=True, log=quiet) == result
    (out / "config.yaml").write_text(to_yaml(config))
    assert load_run(str(out / "config.yaml")) == config
    artefact = out / "pets.safetensors"
    image = folders / "pets" / "cat" / "0.png"
    code, printed, _ = vpt_cli(capfd, monkeypatch, "predict", artefact, image)
    assert code == 0
    assert printed.split("\t")[1] in CLASSES["pets"]
    code, printed, _ = vpt_cli(capfd, monkeypatch, "eval", out / "cars" / "prompt.safetensors")
    assert code == 0
    assert f"{each['cars']['accuracy']:.4f}" in printed
    code, printed, _ = vpt_cli(capfd, monkeypatch, "report", out)
    assert code == 0


def test_an_interrupted_run_ends_in_the_same_numbers(folders, monkeypatch):
    whole = settings(folders, f"out={folders / 'whole'}")
    multitask.run(whole, log=quiet, progress=False)
    config = settings(folders)

    def killed(records):
        if len(records) == 2:
            raise KeyboardInterrupt
        return b""

    monkeypatch.setattr(multitask, "json_lines", killed)
    with pytest.raises(KeyboardInterrupt):
        multitask.run(config, log=quiet, progress=False)
    monkeypatch.undo()
    assert (folders / "run" / "checkpoint.pt").is_file()
    multitask.run(config, resume=True, log=quiet, progress=False)
    for name in CLASSES:
        one, two = (read(folders / run / f"{name}.safetensors")[0] for run in ("whole", "run"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["train.folds=3"], "train.folds=null"),
        (["train.loss=class_balanced"], "tasks have cross_entropy"),
        (["init_from=auto:runs"], "chooses for one task"),
        (["tasks.pets.augment=crop"], "give data.augment=none"),
        (["tasks.pets.roots=x"], "unknown key 'tasks.pets.roots'; did you mean 'tasks.pets.root'"),
        (["tasks.a/b.root=x"], "tasks.a/b"),
    ],
)
def test_what_does_not_go_together_is_refused(folders, extra, message):
    with pytest.raises(InputError, match=message) as error:
        multitask.run(settings(folders, *extra), log=quiet)
    assert "\n" not in str(error.value)
    assert not (folders / "run").exists()


def test_a_test_image_that_another_task_trains_on_is_refused(folders):
    config = settings(folders)
    for path in (folders / "pets" / "cat").iterdir():
        target = folders / "cars" / "van" / f"copy{path.name}"
        target.write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="look like training images of other tasks"):
        multitask.run(config, log=quiet)
