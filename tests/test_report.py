"""`vpt report`: its numbers against ones computed here, and a page that stands by itself."""

import csv
import json
import shutil
from html.parser import HTMLParser
from statistics import mean, stdev

import pytest
import yaml
from tiny import vpt_cli, write_folder

from vpt.config import Published
from vpt.data.cards import load_card
from vpt.errors import InputError
from vpt.report import report
from vpt.report.tables import VTAB

RESULT = {
    **{"balanced_accuracy": 0.5, "macro_f1": 0.5, "auroc": None, "ece": 0.1, "num_test": 100},
    **{"tunable_parameters": 1290, "stored_parameters": 2580, "trained": True},
    **{"train_seconds": 2.5, "torch": "2.15", "device": "cpu"},
    **{"split_hash": "s", "fingerprint": "f", "version": "0.1.0"},
}


@pytest.fixture
def write_run(tmp_path):
    """Leaves the files of a run, as `vpt train` does, below tmp_path / "bench"."""

    def write(
        accuracy,
        method="vpt_deep",
        data="digits",
        shots=16,
        seed=1,
        config=None,
        epochs=2,
        **result,
    ):
        count = len(list(tmp_path.glob("bench/*")))
        folder = tmp_path / "bench" / f"run{count}"
        folder.mkdir(parents=True)
        result = {
            **{"accuracy": accuracy, "method": method, "data": data, "shots": shots, "seed": seed},
            **{"backbone": "tiny_clip", "config_hash": folder.name},
            **RESULT,
            **result,
        }
        settings = {"data": {"root": None, "seed": seed}, "method": {"name": method}}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings | (config or {})))
        (folder / "result.json").write_text(json.dumps(result))
        records = [{"epoch": e, "accuracy": 0.5, "loss": 1.5, "seconds": 1} for e in range(epochs)]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
        return folder

    return write


class Page(HTMLParser):
    """Rows of the tables, headings, images and every address of a page."""

    def __init__(self, path):
        super().__init__()
        self.rows, self.headings, self.images, self.addresses = [], [], [], []
        self.tags, self.text = [""], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs.items() if key in {"src", "href"}]
        if tag == "img":
            self.images.append(attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.tags[-1] in {"td", "th"} and data.strip():
            self.rows[-1][-1] += data.strip()
        if self.tags[-1] in {"h1", "h2", "h3"} and data.strip():
            self.headings.append(data)


def build(tmp_path):
    """The page, the rows of the CSV and the LaTeX of all runs written."""
    page = report(tmp_path / "bench", tmp_path / "out", log=lambda line: None)
    with (page.parent / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return Page(page), rows, (page.parent / "report.tex").read_text()


def test_means_and_deviations_over_seeds(tmp_path, write_run):
    accuracies = [0.81, 0.9, 0.84]
    for seed, accuracy in enumerate(accuracies, start=1):
        write_run(accuracy, seed=seed, train_seconds=seed)
    write_run(0.7, method="coop")
    page, rows, tex = build(tmp_path)

    one, three = rows
    assert (one["method"], one["n"], one["accuracy_std"]) == ("coop", "1", "")
    assert (three["method"], three["n"], three["seeds"]) == ("vpt_deep", "3", "1, 2, 3")
    assert float(three["accuracy"]) == pytest.approx(mean(accuracies), abs=1e-15)
    assert float(three["accuracy_std"]) == pytest.approx(stdev(accuracies), abs=1e-15)
    assert float(three["train_seconds"]) == 2
    shown = f"{100 * mean(accuracies):.1f} ± {100 * stdev(accuracies):.1f}"
    assert ["vpt_deep", shown] in page.rows
    assert ["16", "tiny_clip", "coop", "70.0 ± –"] in page.rows
    assert f"\\bfseries {shown}" in tex  # the best of two
    assert "\\bfseries 70.0" not in tex
    assert "not a test of" in " ".join(page.text.split())
    details = next(row for row in page.rows if row[:4] == ["digits", "16", "tiny_clip", "vpt_deep"])
    assert details[4:6] == ["3", shown]
    assert details[-5:] == ["100", "1,290", "2,580", "2.00", "cpu"]


def test_a_page_of_real_runs_stands_by_itself(tmp_path, capfd, monkeypatch):
    images, runs = write_folder(tmp_path / "pets"), tmp_path / "runs"
    fast = [f"data.root={images}", "backbone.name=tiny_clip", "train.epochs=2", "train.min_steps=0"]
    todo = [("linear_probe", 1), ("vpt_deep", 1), ("vpt_shallow", 1), ("vpt_deep", 2)]
    for method, shots in todo:
        folds = 3 if method == "vpt_shallow" else "null"  # one image a class: none to hold out
        here = [f"data.shots={shots}", f"out={runs}/{method}{shots}", f"train.folds={folds}"]
        assert vpt_cli(capfd, monkeypatch, "train", method, *fast, *here)[0] == 0
    code, out, err = vpt_cli(capfd, monkeypatch, "report", runs)
    assert (code, err) == (0, "")
    path = runs / "report" / "report.html"
    assert out == f"{path}\n"
    page = Page(path)
    assert page.headings == ["Results", "Test accuracy", "Every cell", "Plots", "pets (folder)"]
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in path.read_text()
    assert [image["alt"] for image in page.images] == [
        "pets (folder): Test accuracy against the number of training images a class.",
        "pets (folder): Test accuracy against seconds to train (shots: 2).",
        "pets (folder): Test accuracy against stored parameters (shots: 2).",
        "pets (folder): Learning curves (shots: 1).",
        "pets (folder): Learning curves (shots: 2).",
    ]
    with (path.parent / "report.csv").open(newline="") as file:
        probe, ours, left, more = csv.DictReader(file)
    assert [row["left_untrained"] for row in (probe, ours, left, more)] == ["0", "0", "1", "0"]
    assert probe["tunable_parameters"] == probe["stored_parameters"]
    head = int(ours["stored_parameters"]) - int(ours["tunable_parameters"])
    assert head == int(probe["stored_parameters"])
    assert more["stored_parameters"] == ours["stored_parameters"]
    before = path.read_bytes()
    assert vpt_cli(capfd, monkeypatch, "report", runs)[0] == 0
    assert path.read_bytes() == before


def test_runs_that_cross_validation_left_as_they_start_are_marked(tmp_path, write_run):
    folds = {"train": {"folds": 3}}
    for seed, trained in enumerate([True, False, False], start=1):
        write_run(0.8, seed=seed, trained=trained, config=folds)
        write_run(0.7, seed=seed, method="lora", config=folds)
        write_run(0.7, seed=seed, method="linear_probe", trained=False)  # solved
    page, rows, tex = build(tmp_path)
    assert [(row["method"], row["left_untrained"]) for row in rows] == [
        ("linear_probe", "0"),
        ("lora", "0"),
        ("vpt_deep", "2"),
    ]
    assert ["vpt_deep", "80.0 ± 0.0 †2/3"] in page.rows
    assert ["lora", "70.0 ± 0.0"] in page.rows
    assert "80.0 ± 0.0 †2/3" in tex
    for text in (page.text, tex):
        assert text.count("†") == 2
        assert "†n/m: cross-validation on the training images left n of m seeds" in text
    header = next(row for row in page.rows if "left untrained" in row)
    details = [row for row in page.rows if row[:3] == ["digits", "16", "tiny_clip"]]
    assert [row[header.index("left untrained")] for row in details] == ["0", "0", "2"]


def test_a_page_of_trained_runs_has_no_marks(tmp_path, write_run):
    write_run(0.8, config={"train": {"folds": 3}})
    page, _, tex = build(tmp_path)
    assert "†" not in page.text + tex
    assert "left untrained" not in page.text


def test_runs_that_do_not_say_what_they_store_are_in_no_plot_of_it(tmp_path, write_run):
    write_run(0.8, method="coop", stored_parameters=None)
    page, _, _ = build(tmp_path)
    assert not [image for image in page.images if "stored" in image["alt"]]
    write_run(0.8)
    page, rows, _ = build(tmp_path)
    assert [image for image in page.images if "stored" in image["alt"]]
    assert [row["stored_parameters"] for row in rows] == ["", "2580"]
    details = [row for row in page.rows if row[:3] == ["digits", "16", "tiny_clip"]]
    assert [row[-3] for row in details] == ["", "2,580"]


def test_a_key_that_came_after_a_run_is_at_its_default(tmp_path, write_run):
    """Of three seeds the first knows no `class_half`, as their one hash says."""
    for seed, keys in enumerate([{}, {"class_half": None}, {"class_half": None}], start=1):
        write_run(0.8, seed=seed, config={"data": {"root": None, "seed": seed, **keys}})
    page, _, _ = build(tmp_path)
    details = [row for row in page.rows if row[:3] == ["digits", "16", "tiny_clip"]]
    assert [row[3] for row in details] == ["vpt_deep"]


@pytest.fixture
def vtab(monkeypatch):
    """Five data cards: two natural, one specialized, one structured, one of no group."""
    groups = {f"{group}{i}": group for i, group in enumerate(["natural", *VTAB])} | {"pets": None}
    published = [
        Published(method="Paper", backbone="ViT-B", accuracy=0.612, source="A & B, table 1")
    ]
    cards = {
        name: load_card("digits").model_copy(update={"group": group})
        for name, group in groups.items()
    }
    cards["natural0"] = cards["natural0"].model_copy(update={"published": published})
    monkeypatch.setattr("vpt.report.resources.names", lambda folder: list(cards))
    monkeypatch.setattr("vpt.report.load_card", cards.get)
    return cards


def test_means_over_groups_and_tasks(tmp_path, write_run, vtab):
    accuracy = {name: 0.5 + 0.03 * i for i, name in enumerate(vtab)}
    for name in vtab:
        write_run(accuracy[name] - 0.01, data=name, shots=None, seed=1)
        write_run(accuracy[name] + 0.01, data=name, shots=None, seed=2)
        if name != "natural1":
            write_run(0.9, method="coop", data=name, shots=None)
    suite = {"published": {"natural": [{"method": "Paper", "backbone": "ViT-B", "accuracy": 0.7}]}}
    suite["published"]["natural"][0]["source"] = "A & B, table 1"
    (tmp_path / "bench" / "suite.yaml").write_text(yaml.safe_dump(suite))
    page, _, tex = build(tmp_path)

    groups = [[accuracy[n] for n in vtab if n.startswith(group)] for group in VTAB]
    tasks = mean(value for group in groups for value in group)
    means = [*map(mean, groups), tasks, mean(map(mean, groups))]
    assert page.rows[1][-5:] == [*VTAB, "4 tasks", "3 groups"]
    coop, ours, paper = page.rows[3:6]
    assert ours[-5:] == [f"{100 * value:.1f}" for value in means]
    assert coop[-5:] == ["1/2", "90.0", "90.0", "3/4", "2/3"]
    assert paper == ["ViT-B", "Paper, published [1]", "", "61.2", *[""] * 3, "70.0", *[""] * 4]
    assert "A & B, table 1" in page.text
    assert "A \\& B, table 1" in tex
    assert "\\bfseries 70.0" not in tex


def test_published_results_stand_only_beside_the_same_number_of_shots(tmp_path, write_run, vtab):
    write_run(0.5, data="natural0", shots=16)
    page, _, _ = build(tmp_path)
    assert "published" not in page.text


def test_base_and_new_classes_and_their_harmonic_means(tmp_path, write_run):
    accuracies = {
        "digits": [(0.8, 0.6), (0.9, 0.7)],
        "dtd": [(0.5, 0.25), (0.7, 0.35)],
    }
    for data, seeds in accuracies.items():
        for seed, (base, new) in enumerate(seeds, start=1):
            settings = {"data": {"root": None, "seed": seed, "class_half": "base"}}
            settings |= {"tests": {"new": {"class_half": "new"}}}
            run = write_run(base, data=data, seed=seed, config=settings)
            (run / "tests").mkdir()
            test = json.dumps({"accuracy": new, "class_half": "new", "num_test": 9})
            (run / "tests" / "new.json").write_text(test)
    write_run(0.7, data="dtd", method="coop")  # without tests, of all classes
    page, rows, _ = build(tmp_path)
    assert {row["data"] for row in rows} == {"dtd", "dtd, base classes", "digits, base classes"}
    table = csv.DictReader((tmp_path / "out" / "tests.csv").open(newline=""))
    found = {row["data"]: row for row in table}
    expected = {f"{data}, base classes": seeds for data, seeds in accuracies.items()}
    expected["mean of the data sets"] = [pair for seeds in accuracies.values() for pair in seeds]
    assert found.keys() == expected.keys()
    for data, seeds in expected.items():
        base, new = (mean(side) for side in zip(*seeds, strict=True))
        row = found[data]
        assert float(row["own test images"]) == pytest.approx(base)
        assert float(row["new"]) == pytest.approx(new)
        assert float(row["harmonic mean with new"]) == pytest.approx(2 * base * new / (base + new))
    assert float(found["dtd, base classes"]["new_std"]) == pytest.approx(stdev([0.25, 0.35]))
    assert "Without training: other classes and data sets" in page.headings
    shown = ["85.0 ± 7.1", "65.0 ± 7.1", "73.7"]
    assert ["digits, base classes", "16", "tiny_clip", "vpt_deep", *shown] in page.rows


def test_settings_are_not_averaged(tmp_path, write_run):
    for seed in (1, 2):
        for tokens in (10, 50):
            method = {"name": "vpt_deep", "num_tokens": tokens}
            write_run(tokens / 100, seed=seed, config={"method": method, "train": {"seed": seed}})
    _, rows, _ = build(tmp_path)
    assert [(row["method"], row["n"], float(row["accuracy"])) for row in rows] == [
        ("vpt_deep, method.num_tokens=10", "2", 0.1),
        ("vpt_deep, method.num_tokens=50", "2", 0.5),
    ]


def test_folders_of_images_are_told_apart(tmp_path, write_run):
    for name in ("flowers", "birds"):
        write_run(0.5, data="folder", config={"data": {"root": f"/somewhere/{name}", "seed": 1}})
    page, rows, _ = build(tmp_path)
    assert [row["data"] for row in rows] == ["birds (folder)", "flowers (folder)"]
    assert "somewhere" not in page.text


def test_what_is_left_out_is_said(tmp_path, write_run):
    first = write_run(0.5)
    write_run(0.6, seed=2, config_hash=first.name)
    (write_run(0.7, seed=3) / "result.json").unlink()
    write_run(0.8, seed=4, config={"data": {"root": None, "seed": 4, "split": "train-val"}})
    page, rows, _ = build(tmp_path)
    assert [(row["n"], row["accuracy"]) for row in rows] == [("1", "0.5")]
    assert "Runs left out: 2" in page.text
    left_out = [["run2", "not finished"], ["run1", "repeats another run"]]
    assert page.rows[-2:] == left_out
    with (tmp_path / "out" / "left_out.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["run", "why"], *left_out]
    assert str(tmp_path) not in page.text


def test_a_failed_run_is_named_with_its_reason(tmp_path, write_run):
    (write_run(0.5) / "failure.txt").write_text("of an attempt before the one that finished")
    broken = write_run(0.5, method="lora")
    (broken / "result.json").unlink()
    (broken / "failure.txt").write_text("the loss is not finite")
    early = tmp_path / "bench" / "coop"  # no configuration yet
    early.mkdir()
    (early / "failure.txt").write_text("digits: no such file & <no> more")
    page, _, _ = build(tmp_path)
    assert page.rows[-2:] == [
        ["run1", "failed: the loss is not finite"],
        ["coop", "failed: digits: no such file & <no> more"],
    ]
    (tmp_path / "bench" / "run0" / "result.json").unlink()
    with pytest.raises(InputError, match="no finished run below it: failed: digits: no such file"):
        build(tmp_path)


def test_test_images_like_training_images_are_counted_for_each_data_set(tmp_path, write_run):
    for data, count in (("digits", 0), ("pets", 2), ("pets", 3)):
        folder = write_run(0.5, data=data, seed=count)
        (folder / "duplicates.jsonl").write_text('{"test": "a", "train": "b", "bits": 0}\n' * count)
    page, _, _ = build(tmp_path)
    assert "pets: up to 3 test or calibration images of a run look like a training" in page.text
    assert "digits: up to" not in page.text


def test_intervals_and_areas_stand_where_runs_have_them(tmp_path, write_run):
    write_run(0.8, seed=1, auprc=0.7, accuracy_interval=[0.75, 0.85], auprc_interval=None)
    write_run(0.9, seed=2, auprc=0.8, accuracy_interval=[0.85, 0.93])
    write_run(0.5, method="coop")
    page, rows, _ = build(tmp_path)
    header = next(row for row in page.rows if "ECE" in row)
    coop, ours = (row for row in page.rows if row[:3] == ["digits", "16", "tiny_clip"])
    shown = dict(zip(header, ours, strict=True))
    assert shown["accuracy"] == "85.0 ± 7.1 [80.0–89.0]"
    assert shown["AUPRC"] == "75.0 ± 7.1"
    assert dict(zip(header, coop, strict=True))["AUPRC"] == ""
    assert "AUROC" not in header  # no run has one
    assert float(rows[1]["accuracy_low"]) == pytest.approx(0.8)
    assert rows[0]["accuracy_low"] == ""


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"split_hash": "t"}, "not the same images for all, so not comparable: split s: vpt_deep;"),
        ({"fingerprint": "g"}, "tiny_clip: 2 different sets of weights."),
        ({"version": "0.2.0"}, "Different versions: 0.1.0, 0.2.0."),
        ({"device": "H100"}, "Training times are of different devices."),
        ({}, None),
    ],
)
def test_what_cannot_be_compared_is_said(tmp_path, write_run, other, said):
    write_run(0.5)
    write_run(0.6, method="coop", **other)
    lines = []
    page = Page(report(tmp_path / "bench", tmp_path / "out", log=lines.append))
    assert ("Before you compare" in page.headings) == (said is not None)
    assert said is None or said in page.text
    assert len(lines) == (said is not None)


@pytest.mark.parametrize(("data", "medical"), [("digits", False), ("pneumoniamnist", True)])
def test_medical_data_is_not_for_clinical_use(tmp_path, write_run, data, medical):
    write_run(0.5, data=data)
    page, _, _ = build(tmp_path)
    assert ("Not for clinical use" in page.text) == medical


def test_names_are_text(tmp_path, write_run):
    name = "<script>alert(1)</script> $x_1$ & 50%"
    write_run(0.5, method=name, data=name, device=name, backbone=name)
    page, rows, tex = build(tmp_path)
    assert "script" not in page.tags
    assert name in page.headings
    assert rows[0]["method"] == name
    assert r"\$x\_1\$ \& 50\%" in tex


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("result.json", "{", "invalid json"),
        ("result.json", json.dumps({"data": "digits"}), "shots: field required"),
        ("metrics.jsonl", "nonsense", "invalid json"),
        ("config.yaml", "a: [", "not YAML"),
    ],
)
def test_a_broken_file_is_named(tmp_path, write_run, name, content, said):
    path = write_run(0.5) / name
    path.write_text(content)
    with pytest.raises(InputError, match=said) as error:
        build(tmp_path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_no_finished_run(tmp_path, capfd, monkeypatch):
    code, _, err = vpt_cli(capfd, monkeypatch, "report", tmp_path)
    assert code == 1
    assert err.startswith(f"vpt: {tmp_path}: no finished run below it: give the folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_window_of_a_browser(tmp_path, write_run, width):
    browser = shutil.which("chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    if browser is None:
        pytest.skip("no chromium")
    for shots in (1, 16):
        write_run(0.5, shots=shots, device="a device with a name that is long " * 4)
    path = report(tmp_path / "bench", tmp_path / "out", log=lambda line: None)
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=browser, args=["--no-sandbox", "--disable-gpu"]
        )
        page = chromium.new_page(viewport={"width": width, "height": 900})
        requests = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == width
        images = "[...document.images].every(image => image.complete && image.naturalWidth > 100)"
        assert page.evaluate(images)
        assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
        chromium.close()
