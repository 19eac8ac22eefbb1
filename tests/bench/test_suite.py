"""Suites: what they expand to, how a grid is chosen from, and what survives a kill."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tiny import vpt_cli, write_folder

from vpt import methods, resources
from vpt.bench.cluster import run_on_ray
from vpt.bench.local import run_locally
from vpt.bench.suite import RETRIES, attempt, cells, run_cells
from vpt.config import load_suite, to_yaml
from vpt.data.cards import load_card
from vpt.errors import InputError
from vpt.folder import RunFolder

SUITES = resources.names("configs/suite")
EPOCHS = 20  # seconds of training, to be killed in


@pytest.fixture
def cli(capfd, monkeypatch):
    return partial(vpt_cli, capfd, monkeypatch)


def toy(out, *overrides):
    return cells(load_suite("toy", overrides), out)


@pytest.fixture
def suite(tmp_path):
    """A suite of three runs on a few images."""
    for part, count in (("train", 4), ("val", 3), ("test", 5)):
        write_folder(tmp_path / "folder" / part, count=count)
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"backbone: {{name: tiny_clip}}\ndata: [folder]\nroot: {tmp_path}\n"
        "methods: [vpt_shallow]\nshots: [null]\n"
        f"settings: {{vpt_shallow: {{train: {{epochs: {EPOCHS}, min_steps: 0, folds: null}}}}}}\n"
    )
    return path


def results(out, kind="runs"):
    return {path.parent: json.loads(path.read_text()) for path in out.glob(f"{kind}/*/result.json")}


def wait_for(condition, seconds=120):
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() < begin + seconds
        time.sleep(0.02)


def in_flight(out):
    """Folders of runs that have trained an epoch and are not finished."""
    folders = [RunFolder(path.parent) for path in out.glob("runs/*/checkpoint.pt")]
    return [folder for folder in folders if not folder.result.is_file()]


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_is_valid(name):
    suite = load_suite(name, ["root=data"])
    assert resources.find("configs/suite", name).read_text().startswith("# ")
    assert set(suite.methods) <= set(methods.names())
    assert suite.backbone.name in resources.names("configs/backbone")
    assert load_suite(str(resources.find("configs/suite", name)), ["root=data"]) == suite


@pytest.mark.parametrize("name", SUITES)
def test_every_data_set_of_a_suite_has_a_card(name):
    assert set(load_suite(name).data + places(name)) - set(resources.names("datasets")) == set()


PROTOCOLS = {
    "base_to_new11": {"average_epoch": 15, "average_std": 1},
    "cross_dataset": {"average_epoch": 6, "average_std": 10, "text_depth": 3, "image_depth": 3},
}
PROTOCOLS["domain_generalisation"] = PROTOCOLS["cross_dataset"]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_promptsrc_trains_as_published_for_the_protocol(name):
    """muzairkhattak/PromptSRC, configs/trainers/PromptSRC: other settings than for few shots."""
    suite = load_suite(name, ["root=data", "methods=[promptsrc]"])
    for cell in cells(suite, Path("out")):
        (setting,) = cell.settings
        assert setting.method.options == {"templates": None} | PROTOCOLS[name]
        assert setting.train.epochs == 20


@pytest.mark.parametrize("name", PROTOCOLS)
def test_coop_and_prolip_train_as_published_for_the_protocol(name):
    """KaiyangZhou/CoOp, scripts/cocoop; astra-vision/ProLIP, configs/experiments."""
    for cell in cells(load_suite(name, ["root=data"]), Path("out")):
        (setting,) = cell.settings
        long = name == "base_to_new11" and setting.data.name != "imagenet"
        if setting.method.name == "coop":
            assert setting.method.options["init"] == "a photo of a"
            assert setting.train.epochs == (200 if long else 50)
        if setting.method.name == "prolip":
            assert setting.train.lr == 1e-5


def places(name):
    """Data sets that a suite only tests on."""
    return [keys["name"] for keys in load_suite(name).tests.values() if "name" in keys]


GROUPED = [name for name in SUITES if load_card(load_suite(name).data[0]).group]


@pytest.mark.parametrize("name", GROUPED)
def test_the_groups_of_a_published_suite_hold_its_data_sets_alone(name):
    cards = {card: load_card(card) for card in resources.names("datasets")}
    own, others = load_suite(name).data, places(name)
    groups = {cards[data].group for data in others or own}
    members = {card for card in cards if cards[card].group in groups}
    assert members - (set(own) if others else set()) == set(others or own)


def test_cells_are_all_combinations():
    todo = toy(Path("out"), "shots=[1,null]", "seeds=[5,7]", "methods=[coop,zero_shot]")
    finals = [config for cell in todo for config in cell.finals(cell.settings[0])]
    assert [(c.method.name, c.data.shots, c.data.seed, c.train.seed) for c in finals] == [
        (method, shots, seed, seed)
        for shots in (1, None)
        for method in ("coop", "zero_shot")
        for seed in (5, 7)
    ]
    assert {config.train.epochs for config in finals if config.method.name == "coop"} == {200}
    assert len({config.out for config in finals}) == len(finals)
    for config in finals:
        assert config.out.parent == Path("out/runs").absolute()
        assert config.out.name.endswith(f"-seed{config.data.seed}-{config.hash}")
    assert not any(cell.candidates for cell in todo)


def test_auto_is_a_row_of_its_own(suite, tmp_path):
    given = ["methods=[auto]", "shots=[3]", "seeds=[1]"]
    few = "settings={auto: {auto: {candidates: [ss_text, linear_probe]}}}"
    (cell,) = cells(load_suite(str(suite), [*given, few]), tmp_path / "out")
    (config,) = cell.finals(cell.settings[0])
    assert attempt(config) is None
    (result,) = results(tmp_path / "out").values()
    assert result["method"] == "auto" and result["chosen"] in result["candidates"]
    wrong = "settings={auto: {auto: {candidates: [ss_txt]}}}"
    with pytest.raises(InputError, match=r"'ss_txt'.*'ss_text'"):
        cells(load_suite(str(suite), [*given, wrong]), tmp_path / "out")


def test_settings_and_places_of_the_data():
    overrides = [
        "root=data",
        "data=[bloodmnist]",
        "settings={vpt_deep/bloodmnist: {train: {lr: 1}}}",
    ]
    one, other = cells(
        load_suite("medmnist12", [*overrides, "methods=[vpt_deep,vpt_shallow]", "shots=[4]"]),
        Path("out"),
    )
    assert one.settings[0].train.lr == 1 != other.settings[0].train.lr
    assert one.settings[0].data.root == Path("data/bloodmnist_224.npz").absolute()


@pytest.mark.parametrize(
    ("overrides", "culprits"),
    [
        (["shot=[1]"], ["'shot'", "'shots'"]),
        (["shots=[0]"], ["shots"]),
        (["methods=[vpt_dep]"], ["'vpt_dep'", "'vpt_deep'"]),
        (["data=[digit]"], ["'digit'", "'digits'"]),
        (["data=[cub]"], ["cub", "root=DIR"]),
        (["settings.vpt_dep.train.lr=1"], ["'vpt_dep'", "'vpt_deep'"]),
        (["settings.coop.train.rate=1"], ["coop on digits", "'train.rate'"]),
        (["settings.coop.method.tokens=1"], ["method coop", "'tokens'", "'num_tokens'"]),
        (["grid.coop/digits.train.lr=[1]"], ["'coop/digits'"]),
        (["grid.coop.train.lr=1"], ["grid.coop.train.lr", "list"]),
        (["grid.coop.train.lr=[]"], ["grid.coop.train.lr", "at least 1"]),
        (["grid.coop.train.lr=[1,-1]"], ["train.lr=-1"]),
        (["split=train-val"], ["split", "trainval-test"]),
    ],
    ids=str,
)
def test_a_bad_suite_is_one_line_before_any_run(tmp_path, cli, overrides, culprits):
    code, _, err = cli("bench", "toy", *overrides, "--out", tmp_path / "out")
    assert code == 1
    assert err.count("\n") == 1
    for culprit in culprits:
        assert culprit in err
    assert not (tmp_path / "out").exists()


def pretend(accuracy):
    """An engine whose runs give `accuracy(config)`, or fail where it raises."""

    def engine(configs):
        for config in configs:
            try:
                result = {"accuracy": accuracy(config)}
            except InputError as error:
                yield config, str(error)
                continue
            config.out.mkdir(parents=True)
            RunFolder(config.out).result.write_text(json.dumps(result))
            yield config, None

    return engine


GRID = ["methods=[coop]", "shots=[1]", "grid.coop.train.lr=[0.5,0.1,0.2]"]


@pytest.mark.parametrize(
    ("accuracies", "chosen"),
    [({0.5: 0.7, 0.1: 0.8, 0.2: 0.9}, 0.2), ({0.5: 0.9, 0.1: 0.8, 0.2: 0.9}, 0.2)],
    ids=["best", "tie"],
)
def test_the_grid_is_chosen_by_validation_on_the_first_seed(tmp_path, accuracies, chosen):
    todo = toy(tmp_path, *GRID, "split=trainval-test")
    outcomes = list(run_cells(todo, pretend(lambda config: accuracies[config.train.lr])))
    assert [failure for _, failure in outcomes] == [None] * 6
    tried, finals = [c for c, _ in outcomes[:3]], [c for c, _ in outcomes[3:]]
    assert {(c.data.split, c.data.seed, c.out.parent.name) for c in tried} == {
        ("train-val", 1, "grid")
    }
    assert {(c.data.split, c.out.parent.name) for c in finals} == {("trainval-test", "runs")}
    assert [(c.train.lr, c.data.seed) for c in finals] == [(chosen, seed) for seed in (1, 2, 3)]


def test_a_setting_that_fails_is_not_chosen(tmp_path):
    def accuracy(config):
        if config.train.lr > 0.1:
            raise InputError(f"too fast: {config.train.lr}")
        return 0.1

    outcomes = list(run_cells(toy(tmp_path, *GRID), pretend(accuracy)))
    assert [failure is None for _, failure in outcomes] == [False, True, False, True, True, True]
    assert {config.train.lr for config, _ in outcomes[3:]} == {0.1}


def test_a_grid_that_fails_altogether_fails_the_cell(tmp_path):
    def accuracy(config):
        raise InputError(f"too fast: {config.train.lr}")

    outcomes = list(run_cells(toy(tmp_path, *GRID), pretend(accuracy)))
    assert [failure for _, failure in outcomes[3:]] == ["too fast: 0.5"] * 3
    assert {config.out.parent.name for config, _ in outcomes[3:]} == {"runs"}


def test_a_grid_on_images(tmp_path, suite, cli):
    out = tmp_path / "out"
    settings = ["split=trainval-test", "settings.vpt_shallow.train.epochs=1", "seeds=[1,2]"]
    settings += ["grid.vpt_shallow.train.lr=[0.001,0.002]"]
    code, shown, err = cli("bench", suite, *settings, "--out", out)
    assert code == 0, err
    tried, finals = results(out, "grid"), results(out)
    assert sorted((r["num_train"], r["num_test"]) for r in tried.values()) == [(8, 6)] * 2
    assert sorted((r["num_train"], r["num_test"]) for r in finals.values()) == [(14, 10)] * 2
    assert {result["shots_per"] for result in finals.values()} == {"image"}
    for folder, result in finals.items():
        assert f"{folder.name}: {result['accuracy']:.1%}" in shown
        code, metrics, err = cli("eval", folder / "prompt.safetensors")  # the same split again
        assert code == 0, err
        assert f"{result['accuracy']:.4f}" in metrics


def test_a_run_that_cannot_be_done_stops_no_other(tmp_path, suite, cli):
    arguments = ["bench", suite, "data=[caltech101,folder]", "methods=[zero_shot]", "seeds=[1]"]
    arguments += ["--out", tmp_path / "out"]
    code, shown, err = cli(*arguments)
    assert code == 1
    assert err == ""
    assert len(results(tmp_path / "out")) == 1
    assert "1 runs failed" in shown
    assert "caltech101: no such file" in " ".join(shown.split())

    failures = list((tmp_path / "out").glob("runs/*/failure.txt"))
    assert ["caltech101" in path.parent.name for path in failures] == [True]
    assert "no such file" in failures[0].read_text()

    code, _, err = cli(*arguments)
    assert code == 1
    assert "out: holds a suite: give --resume, or another --out" in err


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_stopped_altogether_it_goes_on_where_it_was(tmp_path, suite, cli, number):
    out = tmp_path / "out"
    arguments = ["bench", suite, "methods=[zero_shot,vpt_shallow]", "seeds=[1,2]", "--out", out]
    command = [sys.executable, "-m", "vpt.cli", *map(str, arguments)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    wait_for(lambda: results(out) and in_flight(out))
    os.killpg(process.pid, number)
    _, err = process.communicate()
    assert process.returncode and "Traceback" not in err
    before = {path: path.stat() for path in out.glob("runs/*/result.json")}
    assert 0 < len(before) < 4
    code, shown, err = cli(*arguments, "--resume")
    assert code == 0, err
    assert len(results(out)) == 4
    assert shown.count("folder-all-seed") == 4
    for path, stat in before.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def finish(suite, out, engine):
    return list(run_cells(cells(load_suite(str(suite)), out), engine))


def check_complete(out, outcomes):
    """Three runs, each once and with all its epochs."""
    assert [failure for _, failure in outcomes] == [None] * 3
    assert {config.out for config, _ in outcomes} == results(out).keys()
    assert len(list(out.glob("runs/*"))) == 3
    for folder in results(out):
        lines = RunFolder(folder).metrics.read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == list(range(EPOCHS))


def test_a_killed_process_is_started_again(tmp_path, suite, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with ThreadPoolExecutor() as pool:
        outcomes = pool.submit(finish, suite, tmp_path, run_locally)
        wait_for(lambda: in_flight(tmp_path))
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    check_complete(tmp_path, outcomes.result())


def test_a_run_that_is_always_killed_is_given_up(tmp_path):
    todo = toy(tmp_path, "methods=[zero_shot]", "shots=[1]", "seeds=[1]")
    (config,) = todo[0].finals(todo[0].settings[0])
    stop = False

    def kill():
        while not stop:
            for process in multiprocessing.active_children():
                process.kill()
            time.sleep(0.001)

    with ThreadPoolExecutor() as pool:
        pool.submit(kill)
        outcomes = list(run_locally([config]))
        stop = True
    assert outcomes == [(config, f"its process died {RETRIES + 1} times")]


def test_a_run_that_another_process_has_is_waited_for(tmp_path):
    (cell,) = toy(tmp_path, "methods=[zero_shot]", "shots=[1]", "seeds=[1]")
    (config,) = cell.finals(cell.settings[0])
    config.out.mkdir(parents=True)
    RunFolder(config.out).failure.write_text("of an attempt before")
    theirs = json.dumps({"accuracy": 1})
    with ThreadPoolExecutor() as pool:
        with FileLock(config.out / ".lock"):
            failure = pool.submit(attempt, config)
            time.sleep(0.5)  # without the lock, it would be under way
            RunFolder(config.out).config.write_text(to_yaml(config))
            RunFolder(config.out).result.write_text(theirs)
        assert failure.result() is None
    assert RunFolder(config.out).result.read_text() == theirs
    assert not RunFolder(config.out).failure.exists()


def test_a_node_that_dies_loses_no_run(tmp_path, suite):
    import ray
    from ray.cluster_utils import Cluster

    soon = {"health_check_period_ms": 500, "health_check_failure_threshold": 10}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": soon}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        node = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        with ThreadPoolExecutor() as pool:
            outcomes = pool.submit(finish, suite, tmp_path, run_on_ray)
            wait_for(lambda: in_flight(tmp_path))
            cluster.add_node(num_cpus=1)
            cluster.remove_node(node, allow_graceful=False)
    finally:
        ray.shutdown()
        cluster.shutdown()
    check_complete(tmp_path, outcomes.result())
