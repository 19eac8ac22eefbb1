"""Image features computed once: the same training as from images, never stale, never broken."""

import os

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny import NAMES, attach, clip, images, loader, samples, vit, write_image

import vpt
from vpt.config import EngineConfig, TrainConfig, load_run
from vpt.data.images import Samples
from vpt.errors import InputError
from vpt.folder import check_cache
from vpt.run import run
from vpt.training import features

CONFIG = TrainConfig(epochs=4, lr=1e-2, warmup_epochs=1)


LABELS = np.arange(10) % len(NAMES)
SAMPLES = samples(LABELS)


def fit(method="coop", options=None, augment="none", frozen=True, data=None, seed=1, **settings):
    """Losses, what was trained, how often the image tower ran, and what the run said."""
    options = {"num_tokens": 3} if options is None else options
    model = attach(settings.pop("backbone", None) or clip(), method, **options)
    if not frozen:
        model.frozen_features = False
    passes, lines = [], []
    pooled = model.backbone.pooled
    model.backbone.pooled = lambda *inputs: passes.append(1) or pooled(*inputs)
    batches = loader(model, data or SAMPLES, 4, augment=augment, seed=seed)
    engine = EngineConfig(feature_cache=settings.pop("folder", None))
    config = CONFIG.model_copy(update=settings)
    history = vpt.fit(model, batches, config=config, engine=engine, log=lines.append)
    losses = [record.get("loss", 0) for record in history]
    return losses, model.artifact_tensors(), len(passes), "\n".join(lines)


def assert_same_training(one, two):
    assert one[0] == pytest.approx(two[0], rel=1e-5)
    for name, tensor in one[1].items():
        torch.testing.assert_close(tensor, two[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
@pytest.mark.parametrize(
    ("method", "options"),
    [("coop", {"num_tokens": 4}), ("random_prompts", {"num_tokens": 3, "head": "random"})],
)
def test_features_train_as_images_do(method, options, augment):
    once, always = (fit(method, options, augment, frozen) for frozen in (True, False))
    assert_same_training(once, always)
    assert (once[2], always[2]) == (1 if augment == "none" else 4, 4 * 3)
    said = "one view" if augment == "none" else "each epoch's own views"
    assert said in once[3]


@pytest.mark.parametrize("room", [10**3, 10**6])
def test_columns_that_do_not_fit_are_computed_in_each_step(monkeypatch, room):
    """Those that a method can do without; the others are kept."""
    options = {"first_block": 2, "dim": 8, "templates": ["a {}."]}
    kept = fit("mmrlpp", options, backbone=clip(layers=3))
    monkeypatch.setattr(features, "CACHE_BYTES", room)
    bounded = fit("mmrlpp", options, backbone=clip(layers=3))
    assert_same_training(bounded, kept)
    line = "MB of 'lower' do not fit into the 0 MiB for frozen columns"
    assert (line in bounded[3]) == (room == 10**3)
    assert "do not fit" not in kept[3]


def test_stored_views_take_turns():
    two = fit(augment="crop_flip", views=2)
    assert two[2] == 2
    assert "of 2 stored views" in two[3]
    own = fit(augment="crop_flip")
    assert two[0][:2] == own[0][:2]
    assert two[0][2:] != own[0][2:]


@pytest.mark.parametrize("method", ["coop", "linear_probe", "random_prompts"])
def test_a_later_run_reads_the_features(tmp_path, method):
    options = {} if method == "linear_probe" else None
    first = fit(method, options, folder=tmp_path)
    second = fit(method, options, folder=tmp_path)
    assert_same_training(second, first)
    assert (first[2], second[2]) == (1, 0)
    assert "image features: from" in second[3]


def test_images_that_come_later_get_features_of_their_own(tmp_path):
    labels = np.arange(130) % len(NAMES)  # ten more than a batch
    pixels = np.random.default_rng(0).integers(0, 256, (130, 32, 32, 3), dtype=np.uint8)
    for folder, counts in (("grown", (115, 130)), ("whole", (130,))):
        for count in counts:
            data = samples(labels[:count], pixels=pixels[:count])
            fit("linear_probe", {}, data=data, folder=tmp_path / folder)
    files = [next((tmp_path / folder).iterdir()) for folder in ("grown", "whole")]
    grown, whole = (safetensors.torch.load_file(file) for file in files)
    for name in whole:
        torch.testing.assert_close(grown[name], whole[name], rtol=1e-5, atol=1e-6)


def test_methods_that_see_the_same_features_share_them(tmp_path):
    fit(folder=tmp_path)
    assert fit("linear_probe", {}, folder=tmp_path)[2] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"data": samples(LABELS, seed=1)},
        {"backbone": clip(seed=1)},
        {"method": "random_prompts"},
        {"method": "prolip", "options": {}},
        {"augment": "crop"},
        {"precision": "bf16"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_images_weights_or_settings_are_other_features(tmp_path, change):
    fit(folder=tmp_path)
    assert fit(**change, folder=tmp_path)[2] > 0


def test_augmented_views_belong_to_their_seed(tmp_path):
    fit(augment="crop", views=1, folder=tmp_path)
    assert fit(augment="crop", views=1, folder=tmp_path)[2] == 0
    assert fit(augment="crop", views=1, folder=tmp_path, seed=2)[2] == 1


def test_stored_views_are_kept_apart(tmp_path):
    first = fit(augment="crop_flip", views=2, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    again = fit(augment="crop_flip", views=2, folder=tmp_path)
    assert_same_training(again, first)
    assert again[2] == 0


def test_prompts_of_other_layers_are_other_features(tmp_path):
    for layer in (0, 1):
        options = {"num_tokens": 3, "layers": [layer]}
        assert fit("random_prompts", options, folder=tmp_path)[2] > 0


def test_an_edited_image_file_is_seen(tmp_path):
    paths = [write_image(tmp_path / f"{i}.png", i % 3, i) for i in range(9)]
    files = Samples(paths, np.arange(9) % 3, [path.name for path in paths])
    fit(data=files, folder=tmp_path / "cache")
    assert fit(data=files, folder=tmp_path / "cache")[2] == 0
    write_image(paths[4], 0, 99)
    assert fit(data=files, folder=tmp_path / "cache")[2] == 1


def test_only_new_images_are_computed(tmp_path):
    """In any order, and twice where an image is there twice."""
    first = fit(data=SAMPLES.take(np.arange(6)), folder=tmp_path)
    order = np.array([9, 4, 0, 7, 0, 5, 8])
    mixed = fit(data=SAMPLES.take(order), folder=tmp_path)
    assert (first[2], mixed[2]) == (1, 1)
    plain = fit(data=SAMPLES.take(order))
    assert_same_training(mixed, plain)
    assert fit(data=SAMPLES.take(np.arange(10)[[0, 4, 8, 9]]), folder=tmp_path)[2] == 0
    (path,) = tmp_path.iterdir()
    assert len(safetensors.torch.load_file(path)["names"]) == 9


def test_all_new_images_are_computed_whatever_a_whole_set_leaves_of_its_batches(tmp_path):
    """Five of 122 are new, where 122 leave 2 in their last batch."""
    data = samples(np.arange(122) % len(NAMES))
    fit(data=data.take(np.arange(117)), folder=tmp_path, epochs=1)
    fit(data=data, folder=tmp_path, epochs=1)
    (path,) = tmp_path.iterdir()
    assert len(safetensors.torch.load_file(path)["names"]) == 122


@pytest.mark.parametrize("broken", [lambda b: b[:-9], lambda b: b"", lambda b: b[:-1] + b"\x7f"])
def test_a_broken_file_is_made_again(tmp_path, broken):
    first = fit(folder=tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(broken(whole))
    again = fit(folder=tmp_path)
    assert_same_training(again, first)
    assert again[2] == 1
    assert f"broken, so made again: {path}" in again[3]
    assert path.read_bytes() == whole


def test_a_run_keeps_its_features_where_it_is_told(tmp_path):
    lines = []
    settings = ["data.shots=2", "train.epochs=1", f"engine.feature_cache={tmp_path / 'cache'}"]
    for seed in (1, 1, 2):
        config = load_run(
            "digits_coop", [*settings, f"data.seed={seed}", f"out={tmp_path}/{len(lines)}"]
        )
        run(config, log=lines.append)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    said = [line for line in lines if "features: from" in line]
    assert len(said) == 2  # the first run has seen all images, for training or for testing


def test_a_folder_that_cannot_be_written_is_refused_before_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "cache"
    config = load_run("digits_coop", [f"engine.feature_cache={cache}", f"out={tmp_path / 'out'}"])
    with pytest.raises(InputError, match=rf"engine\.feature_cache={cache}: .*give another folder"):
        run(config)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_may_be_read_only(tmp_path, monkeypatch):
    """It may be whole already."""
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    check_cache(tmp_path)
    with pytest.raises(InputError, match="cannot be made"):
        check_cache(tmp_path / "new")


def test_test_images_from_the_folder_give_the_same_metrics(tmp_path):
    settings = ["data.shots=2", "train.epochs=1"]
    plain, first, again = (
        run(
            load_run(
                "digits_coop",
                [*settings, "method.name=tip_adapter", f"out={tmp_path}/{number}", *cache],
            ),
            log=lambda line: None,
        )
        for number, cache in enumerate([[], *[[f"engine.feature_cache={tmp_path / 'cache'}"]] * 2])
    )
    assert first["accuracy"] == again["accuracy"] == plain["accuracy"]
    assert first["ece"] == pytest.approx(plain["ece"], abs=1e-6)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_what_trains_the_image_tower_is_left_alone(tmp_path):
    model = vpt.attach(vit(), "vpt_deep", num_classes=3)
    engine = EngineConfig(feature_cache=tmp_path)
    vpt.fit(model, loader(model, SAMPLES, 4), config=CONFIG, engine=engine)
    assert not list(tmp_path.iterdir())
    assert model(images()).isfinite().all()
