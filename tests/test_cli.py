"""The command line from a folder of images to predictions, on every layout of data."""

import csv
import json
import shlex
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from safetensors import safe_open
from tiny import vpt_cli, write_folder, write_image

from vpt import catalog, methods, resources
from vpt.settings import override

KEYS = {
    *("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece", "num_test"),
    *("tunable_parameters", "stored_parameters", "trained", "train_seconds", "seed"),
    *("config_hash", "split_hash"),
}
FAST = ["backbone.name=tiny_clip", "train.epochs=2", "train.min_steps=0", "data.shots=2"]


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


def table(text):
    return dict(line.split(None, 1) for line in text.splitlines())


def result(run):
    return json.loads((run / "result.json").read_text())


def test_help_needs_no_heavy_import():
    code = (
        "import sys; sys.argv = ['vpt', '--help']\n"
        "from vpt import cli\n"
        "try:\n    cli.main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'timm', 'open_clip', 'numpy', 'sklearn', 'pydantic', 'omegaconf'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("quickstart", "train", "eval", "predict", "list"):
        assert command in done.stdout


@pytest.mark.parametrize("what", ["methods", "datasets", "backbones", "configs", "suites"])
def test_listing_needs_no_torch(what):
    code = (
        f"import sys; from vpt.catalog import catalog; assert catalog({what!r})\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("methods", methods.names()),
        ("datasets", resources.names("datasets")),
        ("backbones", resources.names("configs/backbone")),
        ("configs", resources.names("configs/run")),
        ("suites", resources.names("configs/suite")),
    ],
)
def test_list_shows_every_name_with_a_line(good, what, names):
    lines = good("list", what).splitlines()
    assert [line.split()[0] for line in lines] == names
    assert all(len(line.split()) > 2 for line in lines)
    assert [name for name, _ in catalog.catalog(what)] == names


def test_from_images_to_predictions(tmp_path, good, cli):
    images, run = write_folder(tmp_path / "pets"), tmp_path / "run"
    train = ["train", "vpt_deep", *FAST, f"data.root={images}", f"out={run}", "train.folds=null"]
    code, out, err = cli(*train)
    assert code == 0
    assert "2 classes, 4 training, 6 test images" in err
    metrics = result(run)
    assert set(metrics) >= KEYS
    assert metrics["num_test"] == 6
    assert metrics["seed"] == 1
    assert metrics["trained"]
    assert metrics["train_seconds"] > 0
    assert f"{metrics['accuracy']:.4f}" in out
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert (run / "config.yaml").is_file()
    assert (run / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert not (run / "checkpoint.pt").exists()
    assert not [path for path in run.iterdir() if path.name.startswith(".")]

    artefact = run / "prompt.safetensors"
    with safe_open(artefact, "pt") as file:
        metadata = json.loads(file.metadata()["vpt"])
    assert metadata["class_names"] == ["cat", "dog"]
    assert metadata["figures"]["accuracy"] == metrics["accuracy"]
    assert metadata["split_hash"] == metrics["split_hash"]
    content = artefact.read_bytes()
    assert b"secret" not in content  # no names of images
    assert str(tmp_path).encode() not in content  # no paths

    shown = table(good("eval", artefact))
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece"):
        assert shown[name] == f"{metrics[name]:.4f}"
    assert shown["num_test"] == "6"

    files = [images / "cat" / "secret0.png", images / "dog" / "secret1.png"]
    plain = good("predict", artefact, *files).splitlines()
    lines = [json.loads(line) for line in good("predict", "--json", artefact, *files).splitlines()]
    assert [line["path"] for line in lines] == [str(file) for file in files]
    for line, text in zip(lines, plain, strict=True):
        assert line["probabilities"].keys() == {"cat", "dog"}
        assert sum(line["probabilities"].values()) == pytest.approx(1)
        assert line["probability"] == max(line["probabilities"].values())
        assert line["probabilities"][line["class"]] == line["probability"]
        assert text.split("\t") == [line["path"], line["class"], f"{line['probability']:.3f}"]

    folder = good("predict", artefact, images, files[1]).splitlines()
    assert len(folder) == 11
    assert folder[-1] == plain[1]
    assert folder[0] == plain[0]

    code, _, err = cli(*train)
    assert code == 1
    assert err.count("\n") == 1
    assert f"{run}: holds a run that is finished: give --resume" in err
    assert dict(line.split(None, 1) for line in good(*train, "--resume").splitlines())
    assert result(run) == metrics
    code, _, err = cli(*train, "--resume", "train.lr=0.5")
    assert code == 1
    assert "other settings" in err

    # it repeats from the configuration that it left
    again = tmp_path / "again"
    good("train", run / "config.yaml", f"out={again}")
    assert result(again) | {"train_seconds": 0} == metrics | {"train_seconds": 0}


def test_eval_on_images_elsewhere(tmp_path, good, cli):
    images, run = write_folder(tmp_path / "pets"), tmp_path / "run"
    good("train", "linear_probe", *FAST, f"data.root={images}", f"out={run}")
    artefact = (run / "prompt.safetensors").rename(tmp_path / "pets.safetensors")
    moved = images.rename(tmp_path / "elsewhere")
    shown = table(good("eval", artefact, f"data.root={moved}"))
    assert shown["accuracy"] == f"{result(run)['accuracy']:.4f}"
    other = write_folder(tmp_path / "other", count=3)
    code, _, err = cli("eval", artefact, f"data.root={other}")
    assert code == 1
    assert "trained with split" in err
    shown = table(good("eval", artefact, "--all", f"data.root={other}"))
    assert shown["num_test"] == "6"
    code, _, err = cli("eval", artefact)
    assert code == 1
    assert err.startswith("vpt: ")
    assert "data.root" in err


def test_eval_follows_names_not_positions(tmp_path, good, cli):
    images, run = write_folder(tmp_path / "pets"), tmp_path / "run"
    good("train", "linear_probe", *FAST, f"data.root={images}", f"out={run}")
    artefact = run / "prompt.safetensors"
    for options in ([], ["--all"]):
        code, _, err = cli("eval", artefact, "data.classes=[dog, cat]", *options)
        assert code == 1
        assert "dog" in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    "names", [("yes", "no"), ("a, b", "it's"), ('say "x"', "[1]"), ("1e5", "null", "v1.5")], ids=str
)
def test_the_mend_that_eval_prints_can_be_pasted(tmp_path, good, cli, names):
    images, run = write_folder(tmp_path / "pets", names), tmp_path / "run"
    order = override("data.classes", sorted(names, reverse=True))
    good("train", "linear_probe", *FAST, f"data.root={images}", f"out={run}", *shlex.split(order))
    artefact = run / "prompt.safetensors"
    expected = table(good("eval", artefact))["accuracy"]
    code, _, err = cli("eval", artefact, "data.classes=null")
    assert code == 1
    (mend,) = shlex.split(err.partition("another order: give ")[2])
    assert table(good("eval", artefact, mend))["accuracy"] == expected


def test_eval_of_other_images_may_lack_a_class(tmp_path, good, cli):
    images, run = write_folder(tmp_path / "pets", ("cat", "dog", "owl")), tmp_path / "run"
    good("train", "linear_probe", *FAST, f"data.root={images}", f"out={run}")
    artefact, other = run / "prompt.safetensors", tmp_path / "other"
    write_folder(other, ("owl",), count=3)  # written as cats
    for index in range(3):
        write_image(other / "owl" / f"secret{index}.png", 2, index + 9)
    code, out, err = cli("eval", artefact, "--all", f"data.root={other}")
    assert code == 0, err
    assert table(out)["accuracy"] == "1.0000" and table(out)["num_test"] == "3"
    assert "classes without a test image, which metrics leave out: cat, dog" in err
    write_image(other / "bear" / "1.png")
    code, _, err = cli("eval", artefact, "--all", f"data.root={other}")
    assert code == 1 and "bear" in err


def test_a_rare_class_is_trained_on_and_what_was_left_out_is_kept(tmp_path, good, cli):
    images, run = write_folder(tmp_path / "pets"), tmp_path / "run"
    write_folder(images, ["rare"], count=1)
    (images / "cat/notes.txt").write_text("x")
    (images / "@eaDir").mkdir()
    (images / "dog/bad.png").write_text("x")
    settings = ["linear_probe", *FAST, f"data.root={images}", f"out={run}", "data.shots=5"]
    code, _, err = cli("train", *settings)
    assert code == 1 and "dog/bad.png" in err
    code, _, err = cli("train", *settings, "data.shots=2", "data.skip_broken=true")
    assert code == 0, err
    assert "data: left out dog/bad.png: no known image format\n" in err
    kinds = "1 hidden or system folders, 1 images that can't be read, 1 not images"
    assert f"data: left out {kinds}\n" in err
    assert "fewer images than data.shots=2, so all train: rare (1)" in err
    assert result(run)["left_out"] == {
        "hidden or system folders": 1,
        "images that can't be read": 1,
        "not images": 1,
    }
    good("eval", run / "prompt.safetensors")  # the same split


def by_csv(root):
    with (root / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "patient"])
        for patient in range(9):
            for label, name in enumerate(("benign", "malignant")):
                path = root / "scans" / f"{patient}_{label}.png"
                write_image(path, label, patient)
                writer.writerow([path.relative_to(root), name, f"p{patient}"])
    return root / "labels.csv", 6, ["benign", "malignant"]


def by_parts(root):
    write_folder(root / "train", count=3)
    write_folder(root / "val", count=2)
    write_folder(root / "test", count=4)
    return root, 8, ["cat", "dog"]


def by_npz(root):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 10), ("val", 4), ("test", 6)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(count)[:, None] % 2
    np.savez(root / "scans.npz", **arrays)
    return root / "scans.npz", 6, ["0", "1"]


@pytest.mark.parametrize(
    ("layout", "method"),
    [(by_csv, "linear_probe"), (by_parts, "vpt_shallow"), (by_npz, "coop"), (by_npz, "zero_shot")],
)
def test_every_layout(tmp_path, good, layout, method):
    root, num_test, names = layout(tmp_path)
    run = tmp_path / "run"
    good("train", method, *FAST, "train.folds=null", f"data.root={root}", f"out={run}")
    metrics = result(run)
    assert set(metrics) >= KEYS
    assert metrics["num_test"] == num_test
    with safe_open(run / "prompt.safetensors", "pt") as file:
        assert json.loads(file.metadata()["vpt"])["class_names"] == names
    shown = table(good("eval", run / "prompt.safetensors"))
    assert shown["accuracy"] == f"{metrics['accuracy']:.4f}"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert ("val_accuracy" in last) == (method in {"vpt_shallow", "coop"})


def test_every_kind_of_image(tmp_path, good):
    root = tmp_path / "kinds"
    for label, name in enumerate(("cat", "dog")):
        write_image(root / name / "rgb.png", label)
        write_image(root / name / "grey.png", label, mode="L")
        write_image(root / name / "palette.png", label, mode="P")
        write_image(root / name / "alpha.png", label, mode="RGBA")
        write_image(root / name / "cmyk.jpg", label, mode="CMYK")
        write_image(root / name / "sixteen.png", label, mode="I;16")
        write_image(root / name / "one_pixel.png", label, size=(1, 1))
        write_image(root / name / "wide.png", label, size=(300, 2))
    run = tmp_path / "run"
    good("train", "linear_probe", *FAST, f"data.root={root}", f"out={run}")
    assert result(run)["num_test"] == 12
    assert len(good("predict", run / "prompt.safetensors", root).splitlines()) == 16


@pytest.mark.parametrize("command", ["predict", "explain"])
def test_one_bad_file_of_many_is_left_out_and_named(tmp_path, good, cli, command):
    images, run = write_folder(tmp_path / "pets"), tmp_path / "run"
    good("train", "linear_probe", *FAST, f"data.root={images}", f"out={run}")
    artefact = run / "prompt.safetensors"
    options = ["--out", tmp_path / "out"] if command == "explain" else []
    files = sorted((images / "cat").iterdir())
    expected = good(command, artefact, *files[1:], *options).splitlines()
    files[0].write_bytes(files[0].read_bytes()[:60])
    missing = images / "missing.png"
    code, out, err = cli(command, artefact, *files[:3], missing, *files[3:], *options)
    assert code == 1
    assert out.splitlines() == expected
    first, second, last = err.splitlines()
    assert first.startswith(f"{files[0]}: left out, it can't be read (")
    assert second == f"{missing}: left out, it can't be read (No such file or directory)"
    assert last.startswith(f"vpt: 2 of 6 images can't be read: {files[0]} (")
    code, out, err = cli(command, artefact, files[0], missing, *options)  # nothing is left
    assert (code, out, err.count("\n")) == (1, "", 1)


def test_the_default_run_folder_says_what_ran(tmp_path, good, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "pets")
    good("train", "linear_probe", *FAST, "data.root=pets")
    assert (tmp_path / "runs" / "linear_probe-pets-2shot-seed1" / "result.json").is_file()


def test_a_real_process_runs_and_fails_cleanly(tmp_path):
    images = write_folder(tmp_path / "pets")
    vpt = [sys.executable, "-m", "vpt.cli"]
    run = tmp_path / "run"
    train = [*vpt, "train", "linear_probe", *FAST, f"data.root={images}", f"out={run}"]
    done = subprocess.run(train, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("accuracy ")
    assert "Warning" not in done.stderr
    done = subprocess.run(
        [*vpt, "predict", run / "prompt.safetensors", __file__], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("vpt: ")
    assert done.stderr.count("\n") == 1
