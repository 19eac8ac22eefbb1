"""Nothing of the test images reaches training, and nobody's labels are mixed up."""

import json
import re

import numpy as np
import pydicom
import pytest
import timm
import torch
from PIL import Image
from tiny import clip, images, vit, write_folder, write_image
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

import vpt
from vpt import backbones
from vpt import inference as apply
from vpt.config import DataConfig, load_run
from vpt.data.images import read_image
from vpt.data.sources import open_source
from vpt.errors import InputError
from vpt.run import NOTICE, run


def quiet(line):
    pass


def settings(tmp_path, *extra):
    return load_run(
        "linear_probe",
        [
            "backbone.name=tiny_clip",
            f"data.root={tmp_path / 'images'}",
            "data.shots=2",
            f"out={tmp_path / 'run'}",
            *extra,
        ],
    )


def test_fit_starts_from_the_images_of_the_sampler_alone():
    data = TensorDataset(images(12), torch.arange(12) % 3)
    sampled = [0, 1, 2, 6, 7, 8]
    loader = DataLoader(data, 3, sampler=SubsetRandomSampler(sampled))
    model = vpt.attach(vit(), "vpt_deep", num_classes=3)
    seen = []

    def before_epoch(at):
        seen.extend([sum(len(batch.labels) for batch in at.batches), len(at.features().labels)])

    model.before_epoch = before_epoch
    vpt.fit(model, loader, config={"epochs": 1})
    assert seen == [len(sampled), len(sampled)]


def test_resuming_on_other_images_is_refused(tmp_path):
    write_folder(tmp_path / "images")
    config = settings(tmp_path, "method.name=vpt_shallow", "train.epochs=1", "train.min_steps=0")
    run(config, log=quiet)
    (tmp_path / "run" / "result.json").unlink()  # as if it had been killed
    write_image(tmp_path / "images" / "cat" / "new.png")
    with pytest.raises(InputError, match="its images changed"):
        run(config, resume=True, log=quiet)


def test_test_images_that_training_has_seen(tmp_path):
    for part, first in (("train", 0), ("test", 10)):
        for label, name in enumerate(("cat", "dog")):
            for seed in (first, first + 1):
                path = tmp_path / "images" / part / name / f"{seed}.png"
                write_image(path, label, seed, size=(96, 96))
    lines = []
    run(settings(tmp_path, f"out={tmp_path / 'clean'}"), log=lines.append)
    assert not (tmp_path / "clean" / "duplicates.jsonl").exists()
    with Image.open(tmp_path / "images/train/cat/1.png") as image:
        image.save(tmp_path / "images/test/cat/copy.jpg", quality=95)
    found = "1 of 5 test images look like a training image, first test/cat/copy.jpg like train/cat"
    with pytest.raises(InputError, match=found):
        run(settings(tmp_path, "data.duplicates=stop"), log=lines.append)
    assert not (tmp_path / "run").exists() and not any(found in line for line in lines)
    run(settings(tmp_path), log=lines.append)
    assert any(found in line for line in lines)
    (pair,) = map(json.loads, (tmp_path / "run/duplicates.jsonl").read_text().splitlines())
    assert (pair["test"], pair["train"]) == ("test/cat/copy.jpg", "train/cat/1.png")
    run(settings(tmp_path, "data.duplicates=ignore", f"out={tmp_path / 'b'}"), log=quiet)
    assert not (tmp_path / "b" / "duplicates.jsonl").exists()


def test_near_copies_stop_where_patients_are_known(tmp_path):
    rows = ["path,label,patient"]
    for label, name in enumerate(("cat", "dog")):
        for i in range(10):
            write_image(tmp_path / f"{name}{i}.png", label, i // 2, size=(96, 96))  # each twice
            rows.append(f"{name}{i}.png,{name},{name}{i}")
    (tmp_path / "data.csv").write_text("\n".join(rows))
    lines = []
    config = settings(tmp_path, f"data.root={tmp_path / 'data.csv'}", "data.calibration=4")
    with pytest.raises(InputError, match=r"test and calibration images .* data\.duplicates=warn"):
        run(config, log=lines.append)
    assert any(re.fullmatch(r"(cat|dog)\d\.png looks like \1\d\.png", line) for line in lines)


def test_a_run_on_scans_leaves_no_trace_of_patients(tmp_path, capfd):
    dataset = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm"))
    rng = np.random.default_rng(0)
    rows = ["path,label,patient"]
    for label, name in enumerate(("benign", "malignant")):
        for i in range(16):
            pixels = rng.integers(0, 2000, (8, 8)).repeat(16, 0).repeat(16, 1) + 200 * label
            dataset.PixelData = pixels.astype("<i2").tobytes()
            dataset.PatientID = f"MRN-{name}-{i // 2}"
            dataset.PatientName = f"Doe^{name}"
            path = tmp_path / "images" / name / f"secret{i}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            dataset.save_as(path)
            rows.append(f"{name}/{path.name},{name},CODE-{name}-{i // 2}")
    (tmp_path / "images/own.csv").write_text("\n".join(rows))
    options = ["data.windows=[lung,bone,brain]", "data.shots_per=patient", "data.calibration=2"]
    for root in ("images", "images/own.csv"):
        out = tmp_path / f"run-{root.replace('/', '-')}"
        config = settings(tmp_path, *options, f"data.root={tmp_path / root}", f"out={out}")
        lines = []
        assert run(config, log=lines.append)["notice"] == NOTICE  # as patients are known
        said = "shots of 2 patients a class, 2 classes, 8 training from 4 patients, 4 calibration"
        assert any(said in line for line in lines)
        tested = apply.evaluate(out / "prompt.safetensors", log=lines.append)
        assert tested["notice"] == NOTICE
        printed = "".join([*lines, *capfd.readouterr()]).encode()
        kept = [path.read_bytes() for path in out.iterdir() if path.name != "config.yaml"]
        for content in [printed, *kept]:
            for trace in (b"MRN", b"CODE", b"Doe", b"secret", b".dcm"):
                assert trace not in content
    artefact = out / "prompt.safetensors"
    scan = tmp_path / "images/benign/secret3.dcm"
    (found,) = apply.predict(artefact, [scan])
    assert found["notice"] == NOTICE
    model = vpt.load(artefact)
    preprocess = model.backbone.preprocess
    image = preprocess.crop()(read_image(scan, windows=("lung", "bone", "brain")))
    with torch.no_grad():
        logits = model(preprocess.normalize(torch.from_numpy(image)[None]))
    expected = dict(zip(model.class_names, logits.softmax(-1)[0].tolist(), strict=True))
    assert found["probabilities"] == pytest.approx(expected, abs=1e-4)
    write_image(tmp_path / "x.png")
    with pytest.raises(InputError, match=r"x\.png .*data\.windows is for DICOM"):
        list(apply.predict(artefact, [tmp_path / "x.png"]))


def test_names_in_another_order_take_their_labels_along(tmp_path):
    write_folder(tmp_path)
    plain = open_source(DataConfig(root=tmp_path))
    turned = open_source(DataConfig(root=tmp_path, classes=["dog", "cat"]))
    assert turned.class_names == ["dog", "cat"]
    by_name = [
        [source.class_names[label] for label in source.parts["all"].labels]
        for source in (plain, turned)
    ]
    assert by_name[0] == by_name[1]
    renamed = open_source(DataConfig(root=tmp_path, classes=["feline", "canine"]))
    assert np.array_equal(renamed.parts["all"].labels, plain.parts["all"].labels)


def test_all_tests_every_part(tmp_path):
    for part in ("train", "val", "test"):
        write_folder(tmp_path / "images" / part, count=3)
        write_folder(tmp_path / "others" / part, count=4)
    run(settings(tmp_path), log=quiet)
    artefact = tmp_path / "run" / "prompt.safetensors"
    assert apply.evaluate(artefact, [], log=quiet)["num_test"] == 6
    others = [f"data.root={tmp_path / 'others'}"]
    assert apply.evaluate(artefact, others, every=True, log=quiet)["num_test"] == 24


def test_all_refuses_the_images_that_it_was_trained_on(tmp_path):
    write_folder(tmp_path / "images")
    run(settings(tmp_path), log=quiet)
    artefact = tmp_path / "run" / "prompt.safetensors"
    with pytest.raises(InputError, match="4 of these images trained it: drop --all"):
        apply.evaluate(artefact, [], every=True, log=quiet)


def test_fit_wants_a_data_loader():
    model = vpt.attach(vit(), "vpt_deep", num_classes=3)
    with pytest.raises(InputError, match="needs a torch DataLoader to train on, not a list"):
        vpt.fit(model, [(images(), torch.tensor([0, 1, 2]))])


def test_a_class_may_be_called_train(tmp_path):
    write_folder(tmp_path, classes=("car", "train"))
    assert open_source(DataConfig(root=tmp_path)).class_names == ["car", "train"]


def test_eval_of_a_model_saved_by_hand_needs_its_data(tmp_path):
    write_folder(tmp_path / "images")
    backbone = backbones.load("tiny_clip")
    model = vpt.attach(backbone, "vpt_shallow", class_names=["cat", "dog"])
    path = vpt.save(model, tmp_path / "prompt.safetensors")
    (tmp_path / "config.yaml").write_text("unrelated: 1\n")
    with pytest.raises(InputError, match=r"no data: give data\.root"):
        apply.evaluate(path, [], log=quiet)
    data = [f"data.root={tmp_path / 'images'}", "data.shots=2"]
    with pytest.raises(InputError, match="--all"):
        apply.evaluate(path, data, log=quiet)
    assert apply.evaluate(path, data, every=True, log=quiet)["num_test"] == 10


def test_few_patients_are_said(tmp_path):
    write_folder(tmp_path, count=2)
    rows = [f"{name}/{i}.png,{name},p{i}" for name in ("cat", "dog") for i in range(2)]
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    rows = [f"{file},{file.split('/')[0]},p{i % 2}" for i, file in enumerate(files)]
    (tmp_path / "data.csv").write_text("\n".join(["path,label,patient", *rows]))
    config = settings(tmp_path, f"data.root={tmp_path / 'data.csv'}", "data.shots=1")
    with pytest.raises(InputError, match=r"2 patients .* too few"):
        run(config, log=quiet)


def test_logits_keep_their_precision_under_autocast():
    model = vpt.attach(clip(), "coop", class_names=["cat", "dog"], num_tokens=2)
    features = torch.randn(8, model.backbone.feature_dim)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.logits(features)
    assert logits.dtype == torch.float32
    head = vpt.attach(vit(), "vpt_deep", num_classes=3)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(images()).dtype == torch.float32


def test_predicting_does_not_stop_later_training():
    model = vpt.attach(vit(), "vpt_deep", num_classes=3)
    model.double()
    vpt.evaluate(model, [(images().double(), torch.tensor([0, 1, 2]))])
    model.float()
    loss, _ = model.train().loss(images(), torch.tensor([0, 1, 2]))
    loss.backward()
    assert model.prompts.grad is not None


def test_an_artefact_brings_its_own_preprocessing(tmp_path):
    backbone = vit()
    model = vpt.attach(backbone, "vpt_deep", num_classes=3)
    other = model.backbone.preprocess.model_copy(update={"mean": (0.1, 0.2, 0.3)})
    model.backbone.preprocess = other
    path = vpt.save(model, tmp_path / "prompt.safetensors")
    assert vpt.load(path, backbone).backbone.preprocess == other


def test_half_precision_weights_are_refused():
    with pytest.raises(InputError, match=r"give model\.float\(\)"):
        vpt.attach(vit().half(), "vpt_deep", num_classes=3)


def test_a_checkpoint_is_not_kept_twice(tmp_path):
    name = "vit_tiny_patch16_224"
    path = tmp_path / "vit.pth"
    torch.save(timm.create_model(name).state_dict(), path)
    assert "state_dict" not in backbones.load(name, str(path)).model.pretrained_cfg


def test_names_with_dollars_are_drawn_and_plots_kept(tmp_path):
    write_folder(tmp_path / "images", classes=("US$_$", "b$frac"))
    run(settings(tmp_path), log=quiet)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["num_test"] == 6
    assert (tmp_path / "run" / "confusion.png").is_file()
