"""Streams of tasks: what they learn, what they keep, and how they go on."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from golden_case import golden_json
from tiny import images, vpt_cli, write_folder, write_image

import vpt
import vpt.run
from vpt import methods, resources
from vpt.errors import InputError
from vpt.stream import learner as learning
from vpt.stream.config import load_stream
from vpt.stream.metrics import final_accuracy, forgetting, mean_accuracy
from vpt.stream.run import run_stream
from vpt.stream.tasks import open_stream

CLASSES = ["ape", "bee", "cat", "dog", "eel", "fox"]
FEW = ["train.epochs=2", "train.min_steps=0", "train.batch_size=8", "train.warmup_epochs=0"]
CODA = [*FEW, "method.components=4", "method.num_rows=1", "stream.tasks=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six classes, of which each brightens another part of a channel."""
    root = tmp_path_factory.mktemp("animals")
    write_folder(root, CLASSES, 6)
    return root


def config(folder, out, method, *more):
    given = [f"data.root={folder}", "data.shots=3", "backbone.name=tiny_clip", f"out={out}"]
    return load_stream(method, [*given, "stream.tasks=3", "data.duplicates=ignore", *more])


def learn(folder, out, method, *more, **options):
    settings = config(folder, out, method, *more)
    return run_stream(settings, log=lambda line: None, progress=False, **options)


def hashes(out):
    """Of each stage's files that later stages build on."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*.safetensors"))
    }


def test_metrics_are_those_of_the_official_code():
    case = golden_json("metrics")
    rows, expected = case["input"]["accuracy_matrices"][0], case["expected"]
    assert final_accuracy(rows) == pytest.approx(expected["final_accuracy_task_mean"], abs=1e-4)
    assert mean_accuracy(rows) == pytest.approx(expected["mean_accuracy_task_mean"], abs=1e-4)
    assert forgetting(rows) == pytest.approx(expected["forgetting_standard"], abs=1e-4)
    assert forgetting(rows) != pytest.approx(expected["forgetting_max_includes_last"], abs=0.1)
    assert forgetting([[0.5]]) == 0


@pytest.mark.parametrize("name", resources.names("configs/stream"))
def test_every_stream_config_is_valid(name):
    config = load_stream(name)
    methods.check_options(config.method.name, config.method.options)
    path = resources.find("configs/stream", name)
    assert path.read_text().startswith("# ")
    assert load_stream(str(path)) == config
    other = load_stream(name, ["method.name=class_means"])
    assert other.stream == config.stream and other.method.options == {}


def test_tasks_are_groups_of_classes(folder, tmp_path):
    stream = open_stream(config(folder, tmp_path, "class_means"))
    assert [len(task.classes) for task in stream.tasks] == [2, 2, 2]
    assert sorted(label for task in stream.tasks for label in task.classes) == list(range(6))
    for task in stream.tasks:
        assert set(task.train.labels) == set(task.test.labels) == set(task.classes)
        assert not set(task.train.names) & set(task.test.names)
    plain = open_stream(config(folder, tmp_path, "class_means", "stream.shuffle=false"))
    assert [task.classes for task in plain.tasks] == [[0, 1], [2, 3], [4, 5]]
    halves = [
        open_stream(
            config(folder, tmp_path, "class_means", f"stream.half={half}", "stream.tasks=1")
        )
        for half in ("choose", "report")
    ]
    assert [each.source.class_names for each in halves] == [CLASSES[::2], CLASSES[1::2]]
    assert set(np.unique(halves[1].split.test.labels)) == {0, 1, 2}


@pytest.fixture(scope="module")
def means(folder, tmp_path_factory):
    """Result and folder of a stream of class means."""
    out = tmp_path_factory.mktemp("means")
    return learn(folder, out, "class_means"), out


def test_sums_over_tasks_are_those_of_all_tasks_at_once(folder, tmp_path, means):
    stream, out = means
    joint = learn(folder, tmp_path, "class_means", "stream.strategy=joint")
    assert [len(row) for row in stream["accuracy_matrix"]] == [1, 2, 3]
    assert stream["accuracy_matrix"] == joint["accuracy_matrix"]
    assert stream["stored_images"] == 0 and joint["stored_images"] == 12
    assert stream.keys() >= {"final_accuracy", "mean_accuracy", "forgetting"}
    assert stream["passes"] == 1 and "without_prompts" not in stream
    assert (out / "accuracy.png").stat().st_size > 10_000


def test_a_stage_is_an_artefact_of_the_classes_so_far(folder, tmp_path):
    result = learn(folder, tmp_path, "linear_head", *FEW, "train.weight_decay=0.1")
    order, heads, seen = result["classes"], [], []
    for stage, names in enumerate(order, 1):
        run = tmp_path / f"task0{stage}"
        model = vpt.load(run / "prompt.safetensors")
        seen, heads = [*seen, *names], [*heads, model.head]
        with torch.no_grad():
            found = {model.class_names[label] for label in model(images(20)).argmax(1)}
        assert found <= set(seen)
        assert json.loads((run / "result.json").read_text())["num_test"] == 3 * len(seen)
    old, new = ([CLASSES.index(name) for name in names] for names in order[:2])
    assert torch.equal(heads[0].weight[old], heads[1].weight[old])
    assert torch.equal(heads[0].bias[old], heads[1].bias[old])
    assert not torch.isclose(heads[0].weight[new], heads[1].weight[new]).all()


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """Result and folder of a stream of CODA-Prompt."""
    out = tmp_path_factory.mktemp("whole")
    return learn(folder, out, "coda_prompt", *CODA), out


@pytest.mark.parametrize("within", [False, True])
def test_a_killed_stream_goes_on_to_the_same_numbers(folder, tmp_path, monkeypatch, whole, within):
    def stop(prepared, history, **details):
        if prepared.folder.path == tmp_path / "task02" and len(history) == 2:
            raise Stopped  # the first epoch's checkpoint is there

    def stops(prepared, *rest):
        if prepared.folder.path == tmp_path / "task02" and not within:
            raise Stopped
        return fit(prepared, *rest)

    fit = learning.fit
    with monkeypatch.context() as patched:
        patched.setattr(learning, "fit", stops)
        if within:
            keep = vpt.run._keep
            patched.setattr("vpt.run._keep", lambda *a, **d: (stop(*a, **d), keep(*a, **d)))
        with pytest.raises(Stopped):
            learn(folder, tmp_path, "coda_prompt", *CODA)
    assert (tmp_path / "task02" / "checkpoint.pt").is_file() == within
    assert not (tmp_path / "task02" / "stage.json").exists()
    before = hashes(tmp_path / "task01")
    with pytest.raises(InputError, match="interrupted"):
        learn(folder, tmp_path, "coda_prompt", *CODA)
    resumed = learn(folder, tmp_path, "coda_prompt", *CODA, resume=True)
    result, out = whole
    assert hashes(tmp_path / "task01") == before
    for key in ("accuracy_matrix", "without_prompts"):
        assert resumed[key] == result[key]
    for name in hashes(out):
        ours, theirs = (vpt.artifact.read(run / name)[0] for run in (tmp_path, out))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def test_sums_survive_a_kill(folder, tmp_path, monkeypatch):
    options = ["method.num_features=40"]
    learn(folder, tmp_path / "whole", "ranpac", *options)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    settings = (tmp_path / "killed" / "config.yaml").read_text()
    settings = settings.replace(str(tmp_path / "whole"), str(tmp_path / "killed"))
    (tmp_path / "killed" / "config.yaml").write_text(settings)
    (tmp_path / "killed" / "result.json").unlink()
    shutil.rmtree(tmp_path / "killed" / "task03")
    before = hashes(tmp_path / "killed")
    learn(folder, tmp_path / "killed", "ranpac", *options, resume=True)
    after = hashes(tmp_path / "killed")
    assert after.items() >= before.items()
    # the sums are the same bits, their solution is LAPACK's: to rounding
    whole = hashes(tmp_path / "whole")
    differ = {name for name in whole if after[name] != whole[name]}
    assert after.keys() == whole.keys() and differ <= {"task03/prompt.safetensors"}
    ours, theirs = (
        vpt.artifact.read(tmp_path / run / "task03" / "prompt.safetensors")[0]
        for run in ("killed", "whole")
    )
    torch.testing.assert_close(ours, theirs)


def test_a_changed_stage_is_refused(folder, tmp_path, means):
    shutil.copytree(means[1], tmp_path, dirs_exist_ok=True)
    settings = (tmp_path / "config.yaml").read_text().replace(str(means[1]), str(tmp_path))
    (tmp_path / "config.yaml").write_text(settings)
    (tmp_path / "result.json").unlink()
    path = tmp_path / "task01" / "prompt.safetensors"
    path.write_bytes((tmp_path / "task02" / "prompt.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"task01/prompt.safetensors: changed since") as caught:
        learn(folder, tmp_path, "class_means", resume=True)
    assert "\n" not in str(caught.value)


def test_a_stage_that_changes_under_way_is_seen(folder, tmp_path, monkeypatch):
    def meddling(prepared, *rest):
        if prepared.folder.path.name == "task02":
            (tmp_path / "task01" / "result.json").write_text("{}")
        return fit(prepared, *rest)

    fit = learning.fit
    monkeypatch.setattr(learning, "fit", meddling)
    with pytest.raises(InputError, match=r"task01/result.json: changed"):
        learn(folder, tmp_path, "class_means")


def test_a_model_a_task(folder, tmp_path):
    result = learn(
        folder, tmp_path, "vpt_deep", "stream.strategy=per_task", *FEW, "train.folds=null"
    )
    known, routed = result["known_task"]["accuracy_matrix"], result["accuracy_matrix"]
    assert all(
        k >= r for ks, rs in zip(known, routed, strict=True) for k, r in zip(ks, rs, strict=True)
    )
    assert result["known_task"]["forgetting"] == 0
    assert len(result["router_accuracy"]) == 3 and result["router_accuracy"][0] == 1
    assert result["passes"] == 2
    model = vpt.load(tmp_path / "task02" / "prompt.safetensors")
    assert model.class_names == result["classes"][1]
    assert result["without_prompts"]["method"] == "linear_probe"


def test_stored_images_only_where_the_strategy_says_so(folder, tmp_path):
    result = learn(folder, tmp_path, "linear_probe", "stream.strategy=rehearsal", "stream.memory=2")
    assert result["stored_images"] == 8
    with pytest.raises(InputError, match=r"stream\.strategy=sequential"):
        learn(folder, tmp_path / "sums", "ranpac", "stream.strategy=rehearsal")
    assert not (tmp_path / "sums").exists()


def test_domains_and_growing_labels(tmp_path):
    for number, names in enumerate((CLASSES[:2], CLASSES[:2], CLASSES[1:4])):
        for label, name in enumerate(names):
            for index in range(5):
                write_image(tmp_path / f"site{number}" / name / f"{index}.png", label, index)
    names = "stream.data=[site0,site1,site2]"
    stream = open_stream(config(tmp_path, tmp_path / "out", "class_means", names))
    assert [task.classes for task in stream.tasks] == [[0, 1], [0, 1], [1, 2, 3]]
    assert stream.source.class_names == CLASSES[:4]
    assert stream.split.train.names[0].startswith("site0/")
    result = learn(tmp_path, tmp_path / "out", "class_means", names)
    assert result["tasks"] == ["site0", "site1", "site2"]
    mixed = config(tmp_path, tmp_path / "mixed", "class_means", "stream.data=[site2,digits]")
    stream = open_stream(mixed)
    assert len(stream.source.class_names) == 13
    assert stream.tasks[1].test.read(0).mode == "RGB"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("stream.tasks=4", "6 classes make at most 3 tasks"),
        ("stream.data=[nothing,digits]", "stream.data: nothing"),
        ("stream.strategy=naive", "stream.strategy='naive'"),
        ("stream.task=2", "did you mean"),
    ],
)
def test_bad_streams_are_one_line(folder, tmp_path, capfd, monkeypatch, given, said):
    arguments = ["class_means", f"data.root={folder}", "data.shots=3", "backbone.name=tiny_clip"]
    out = tmp_path / "out"
    code, _, error = vpt_cli(capfd, monkeypatch, "stream", *arguments, f"out={out}", given)
    assert code == 1 and said in error and error.count("\n") == 1
    assert not out.exists()


def test_the_command_prints_matrix_and_costs(folder, tmp_path, capfd, monkeypatch):
    arguments = ["class_means", f"data.root={folder}", "data.shots=3", "backbone.name=tiny_clip"]
    more = ["stream.tasks=2", f"out={tmp_path / 'out'}", "data.duplicates=ignore"]
    code, out, _ = vpt_cli(capfd, monkeypatch, "stream", *arguments, *more)
    assert code == 0
    for word in ("final_accuracy", "forgetting", "megabytes a task", "passes an image"):
        assert word in out


@pytest.mark.parametrize(
    ("method", "keys", "said"),
    [
        ("class_means", ["tests.more.root=more"], "tests: not for a stream"),
        ("vpt_deep", ["init_from=other.safetensors"], "init_from: not for a stream"),
        ("auto", [], "auto: a stream needs one method"),
        ("class_means", ["stream.data=[a,a]"], "stream.data: a comes twice"),
        ("class_means", ["stream.data=[a,b]", "data.shots=50"], "stream.data: a: "),
    ],
)
def test_what_a_stream_has_not(folder, tmp_path, method, keys, said):
    (tmp_path / "data").mkdir()
    for name in "ab":
        (tmp_path / "data" / name).symlink_to(folder)
    keys = [f"data.root={tmp_path / 'data'}", *keys] if "stream.data" in str(keys) else keys
    with pytest.raises(InputError, match=said):
        learn(folder, tmp_path / "out", method, *keys)
    assert not (tmp_path / "out").exists()


def test_a_broken_record_of_a_stage(folder, tmp_path, means):
    shutil.copytree(means[1], tmp_path, dirs_exist_ok=True)
    settings = (tmp_path / "config.yaml").read_text().replace(str(means[1]), str(tmp_path))
    (tmp_path / "config.yaml").write_text(settings)
    (tmp_path / "result.json").unlink()
    (tmp_path / "task02/stage.json").write_text("{half")
    with pytest.raises(InputError, match=r"task02/stage.json: not JSON: restore it, or delete"):
        learn(folder, tmp_path, "class_means", resume=True)
