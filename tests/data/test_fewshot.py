import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import samples

from vpt.config import DataConfig
from vpt.data.fewshot import split_shots
from vpt.data.images import Samples
from vpt.data.sources import Source, open_source
from vpt.errors import InputError
from vpt.targets.multiclass import Multiclass
from vpt.targets.multilabel import Multilabel

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/fewshot_sampling_a.json").read_text())
DIGITS = open_source(DataConfig(name="digits"))


@pytest.mark.parametrize(
    "case", GOLDEN["selections"], ids=lambda case: f"{case['list']}-{case['seed']}-{case['shots']}"
)
def test_same_selection_as_dassl(case):
    labels = {
        part: [item["label"] for item in GOLDEN["lists"][case["list"]][part]]
        for part in ("train", "val")
    }
    rng = random.Random(case["seed"])
    assert Multiclass().draw(labels["train"], case["shots"], rng) == case["train"]
    assert Multiclass().draw(labels["val"], min(case["shots"], 4), rng) == case["val"]


@pytest.mark.parametrize("num_classes", [4, 5])
def test_half_of_the_classes_of_what_was_drawn_of_all(num_classes):
    """Dassl draws shots of all classes first; base are the first ceil(n / 2) labels."""
    labels = [label for _ in range(9) for label in range(num_classes)]
    names = [f"class {label}" for label in range(num_classes)]
    parts = {part: samples(labels, part=part) for part in ("train", "val", "test")}
    whole = Source("x", DIGITS.card, names, ["{}"], "none", parts)
    both = split_shots(whole, 3, seed=1)
    middle = (num_classes + 1) // 2
    kept = {"base": [*range(middle)], "new": [*range(middle, num_classes)]}
    hashes = {both.hash}
    for half, classes in kept.items():
        assert whole.half(half).class_names == [names[label] for label in classes]
        split = split_shots(whole, 3, seed=1, class_half=half)
        hashes.add(split.hash)
        for part in ("train", "val", "test"):
            found, all_ = getattr(split, part), getattr(both, part)
            chosen = [i for i, label in enumerate(all_.labels) if label in classes]
            assert found.names == [all_.names[i] for i in chosen]
            assert found.labels.tolist() == [all_.labels[i] - classes[0] for i in chosen]
    assert len(hashes) == 3
    assert whole.half(None) is whole


def test_a_card_that_lists_classes_says_the_order():
    """ImageNet's is by WordNet id, whatever the order of its folders."""
    card = DIGITS.card.model_copy(update={"classes": ["d", "b", "a", "c"]})
    parts = {part: samples([0, 1, 2, 3], part=part) for part in ("train", "test")}
    data = Source("x", card, ["a", "b", "c", "d"], ["{}"], "none", parts)
    assert data.half("base").class_names == ["b", "d"]
    test = split_shots(data, 1, seed=1, class_half="base").test
    assert (test.names, test.labels.tolist()) == (["test/1", "test/3"], [0, 1])


def test_a_half_names_its_own_small_classes_and_leaves_the_others_calibration_images():
    labels = np.array([0] * 2 + [1] * 9 + [2] * 9 + [3] * 2)
    parts = {part: samples(labels, part=part) for part in ("train", "test")}
    data = Source("x", DIGITS.card, ["a", "b", "c", "d"], ["{}"], "none", parts)
    split = split_shots(data, 4, seed=1, class_half="new", calibration=6)
    assert split.notes == ("fewer images than data.shots=4, so all train: d (2)",)
    assert set(split.calibration.labels) <= {0, 1}


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 1, 2], "3 classes are too few to halve"), (np.eye(4), "several labels an image")],
)
def test_what_cannot_be_halved(labels, message):
    parts = {part: samples(labels, part=part) for part in ("train", "test")}
    names = [f"class {label}" for label in range(len(labels))]
    with pytest.raises(InputError, match=message):
        split_shots(Source("x", DIGITS.card, names, ["{}"], "none", parts), 1, 1, class_half="base")


@given(st.lists(st.integers(0, 5), max_size=60), st.integers(1, 8), st.integers())
def test_every_class_gives_its_shots(labels, shots, seed):
    chosen = Multiclass().draw(labels, shots, random.Random(seed))
    assert len(set(chosen)) == len(chosen)
    counts = Counter(labels)
    assert Counter(labels[i] for i in chosen) == {c: min(n, shots) for c, n in counts.items()}
    assert list(dict.fromkeys(labels[i] for i in chosen)) == list(dict.fromkeys(labels))
    assert chosen == Multiclass().draw(np.array(labels, dtype=int), shots, random.Random(seed))


def source(**parts):
    return Source("x", DIGITS.card, ["cat", "dog"], ["{}"], "none", parts)


def test_given_parts():
    parts = {part: samples([0, 1] * 20, part=part) for part in ("train", "val", "test")}
    split = split_shots(source(**parts), 8, seed=1)
    assert [len(split.train), len(split.val), len(split.test)] == [16, 8, 40]
    assert all(name.startswith("val/") for name in split.val.names)
    assert split.test is parts["test"]
    assert len(split_shots(source(**parts), 2, seed=1).val) == 4  # no more than to train on
    whole = split_shots(source(**parts), None, seed=1)
    assert [len(whole.train), len(whole.val), len(whole.test)] == [40, 40, 40]
    parts["val"] = samples([], part="val")
    assert split_shots(source(**parts), 8, seed=1).val is None
    del parts["val"]
    without = split_shots(source(**parts), 8, seed=1)
    assert without.val is None and without.train.names == split.train.names


def test_validation_images_train_or_test():
    parts = {part: samples([0, 1] * 20, part=part) for part in ("train", "val", "test")}
    plain = split_shots(source(**parts), 8, seed=1)
    both = split_shots(source(**parts), 8, seed=1, parts="trainval-test")
    assert both.train.names == plain.train.names + plain.val.names
    assert both.train.labels.tolist() == [*plain.train.labels, *plain.val.labels]
    assert len(both.train.images) == 24
    assert both.val is None and both.test is parts["test"]
    chosen = split_shots(source(**parts), 8, seed=1, parts="train-val")
    assert chosen.train.names == plain.train.names
    assert chosen.val is None and chosen.test.names == plain.val.names
    assert len({plain.hash, both.hash, chosen.hash}) == 3

    del parts["val"]
    without = split_shots(source(**parts), 8, seed=1, parts="trainval-test")
    assert without.hash == split_shots(source(**parts), 8, seed=1).hash
    with pytest.raises(InputError, match="needs a val part"):
        split_shots(source(**parts), 8, seed=1, parts="train-val")


def test_one_part_gives_the_rest_to_the_test():
    split = split_shots(DIGITS, 16, seed=1)
    assert len(split.train) == 160 and len(split.test) == 1797 - 160 and split.val is None
    assert not set(split.train.names) & set(split.test.names)
    assert np.bincount(split.train.labels).tolist() == [16] * 10
    assert split.train.names != split_shots(DIGITS, 16, seed=2).train.names


def test_patients_are_kept_apart():
    labels = [0, 1] * 60
    patients = [f"p{i // 4}" for i in range(120)]  # 30 patients of 4 images
    one = source(all=samples(labels, patients, part="all"))
    split = split_shots(one, 8, seed=1)
    assert np.bincount(split.train.labels).tolist() == [8, 8]
    assert not set(split.train.patients) & set(split.test.patients)
    assert 0.2 < len(set(split.test.patients)) / 30 < 0.45
    assert split.hash == split_shots(one, 8, seed=1).hash != split_shots(one, 8, seed=2).hash
    whole = split_shots(one, 50, seed=1)
    assert whole.notes == ("fewer images than data.shots=50, so all train: cat (40), dog (40)",)
    assert whole.test.names == split.test.names


@pytest.mark.parametrize(("labels", "number"), [([0, 1] * 6, 2), ([0, 1] * 2, 4)])
def test_a_third_of_too_few_patients_is_not_held_out(labels, number):
    patients = [f"p{i % number}" for i in range(len(labels))]
    one = source(all=samples(labels, patients, part="all"))
    with pytest.raises(
        InputError, match=f"{number} patients with {len(labels)} images are too few to hold a third"
    ):
        split_shots(one, 1, seed=1)


def test_positives_that_come_along_count_as_shots():
    labels = np.zeros((30, 3), np.float32)
    labels[:20, 0] = labels[:6, 1] = 1  # whoever has the rare label has the common one
    labels[20:24, 2] = 1
    chosen = Multilabel().draw(labels, 3, random.Random(1))
    assert len(chosen) == len(set(chosen))
    assert labels[chosen].sum(0).tolist() == [3, 3, 3]
    assert (~labels[chosen].any(1)).sum() == 3
    assert len(chosen) == 9
    assert labels[Multilabel().draw(labels, 5, random.Random(1))].sum(0).tolist() == [5, 5, 4]


@pytest.mark.parametrize("other", ["test", "val"])
def test_patients_in_two_parts_are_listed(other):
    parts = {
        "train": samples([0, 1] * 4, [f"p{i}" for i in range(8)], part="train"),
        "test": samples([0, 1] * 4, [f"q{i}" for i in range(8)], part="test"),
    }
    parts[other] = samples([0, 1] * 4, [f"p{i}" for i in range(1, 9)], part=other)
    listed = ", ".join(f"p{i}" for i in range(1, 8))
    with pytest.raises(
        InputError, match=f"7 patients are in both train and {other}: {listed}: move"
    ):
        split_shots(source(**parts), 1, seed=1)


def parts_of(split):
    return [s for s in (split.train, split.val, split.calibration, split.test) if s is not None]


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("per", ["image", "patient"])
def test_no_image_or_patient_is_in_two_parts(given, known, per):
    def part(name):
        patients = [f"{name}{i // 5}" for i in range(200)] if known else None
        return samples([int(i % 7 == 0) for i in range(200)], patients, part=name)

    data = source(**{name: part(name) for name in (["train", "val", "test"] if given else ["all"])})
    if per == "patient" and not known:
        with pytest.raises(InputError, match=r"data\.shots_per=patient: x names no patients: add"):
            split_shots(data, 3, seed=1, per=per)
        return
    split = split_shots(data, 3, seed=1, per=per, calibration=0.25)
    names = [name for samples in parts_of(split) for name in samples.names]
    assert len(names) == len(set(names)) and len(parts_of(split)) == 3 + given
    if known:
        patients = [patient for samples in parts_of(split) for patient in set(samples.patients)]
        assert len(patients) == len(set(patients))
        pool = 40 if given else 40 - len(set(split.test.patients))
        assert len(set(split.calibration.patients)) == round(0.25 * pool)
    else:
        assert len(split.calibration) == 50
    assert split.hash != split_shots(data, 3, seed=1, per=per).hash


def test_calibration_keeps_the_classes_frequency():
    pool = samples([int(i % 10 == 0) for i in range(2000)], part="train")
    data = source(train=pool, test=samples([0, 1], part="test"))
    split = split_shots(data, 16, seed=1, calibration=500)
    assert len(split.calibration) == 500 and 0.06 < split.calibration.labels.mean() < 0.14
    whole = split_shots(data, None, seed=1, calibration=500)
    assert len(whole.train) == 1500 and whole.calibration.names == split.calibration.names
    assert split.calibration.names != split_shots(data, 16, 2, calibration=500).calibration.names


@pytest.mark.parametrize(("amount", "number"), [(40, 40), (41, 41), (0.001, 0), (0.999, 40)])
def test_calibration_leaves_some_on_either_side(amount, number):
    data = source(train=samples([0, 1] * 20, part="train"), test=samples([0, 1], part="test"))
    with pytest.raises(
        InputError, match=rf"data\.calibration={amount}: {number} of 40 images to train on: it must"
    ):
        split_shots(data, 1, seed=1, calibration=amount)


def test_a_shot_may_be_a_patient():
    # patient 3k has three cats, 3k+1 two dogs, 3k+2 one of each
    kinds = [[0, 0, 0], [1, 1], [0, 1]] * 10
    labels = [label for kind in kinds for label in kind]
    patients = [f"p{i}" for i, kind in enumerate(kinds) for _ in kind]
    test = samples([0, 1], ["q", "r"], part="test")
    data = source(train=samples(labels, patients, part="train"), test=test)
    split = split_shots(data, 4, seed=1, per="patient")
    drawn = list(zip(split.train.labels.tolist(), split.train.patients, strict=True))
    assert Counter(label for label, _ in set(drawn)) == {0: 4, 1: 4}
    there = Counter(zip(labels, patients, strict=True))
    assert Counter(drawn) == {unit: there[unit] for unit in drawn}  # each with all its images
    assert split.notes == ()
    whole = split_shots(data, 21, seed=1, per="patient")
    assert whole.notes == ("fewer patients than data.shots=21, so all train: cat (20), dog (20)",)
    assert whole.train.names == data.parts["train"].names


@pytest.mark.parametrize(
    ("parts", "shots", "match"),
    [
        ({"all": [0, 1, 1]}, None, "x: the data has no test part: give data.shots"),
        ({"all": [0, 0, 1]}, 2, "the test part is empty"),
        ({"all": [0, 0]}, 1, "class 'dog' has 0 images: add images"),
        ({"train": [0, 0], "test": [0]}, None, "class 'dog' has 0 images"),
        ({"train": [0, 1], "test": []}, 1, "the test part is empty"),
    ],
)
def test_what_cannot_be_split(parts, shots, match):
    with pytest.raises(InputError, match=match):
        split_shots(source(**{k: samples(v, part=k) for k, v in parts.items()}), shots, seed=1)


def test_a_class_with_fewer_images_than_shots_is_kept_whole_and_named():
    parts = {"train": [0] * 9 + [1] * 3, "test": [0, 0, 1]}
    data = source(**{part: samples(labels, part=part) for part, labels in parts.items()})
    split = split_shots(data, 4, seed=1)
    assert Counter(split.train.labels.tolist()) == {0: 4, 1: 3}
    assert split.notes == ("fewer images than data.shots=4, so all train: dog (3)",)
    enough = split_shots(data, 3, seed=1)
    assert enough.notes == () and Counter(enough.train.labels.tolist()) == {0: 3, 1: 3}
    one = split_shots(source(all=samples([0] * 9 + [1] * 3, part="all")), 3, seed=1)
    assert one.notes == ("classes without a test image, which metrics leave out: dog",)
    assert Counter(one.test.labels.tolist()) == {0: 6}


def test_patients_with_several_labels_are_kept_apart():
    labels = np.eye(2, dtype=np.float32)[np.arange(60) % 2]
    labels[::3] = 1
    split = split_shots(source(all=samples(labels, [f"p{i // 4}" for i in range(60)])), 4, seed=1)
    assert not set(split.train.patients) & set(split.test.patients)
    assert len(set(split.test.patients)) == 5


def test_hash_tells_data_apart_but_not_places(tmp_path):
    base = split_shots(DIGITS, 2, seed=1).hash
    assert base == "d744eeb3a386427a"
    altered = DIGITS.parts["all"].images.copy()
    altered[5, 0, 0] ^= 1
    part = DIGITS.parts["all"]
    other = Samples(altered, part.labels, part.names)
    relabelled = Samples(part.images, 9 - part.labels, part.names)
    for changed in (other, relabelled):
        again = Source("digits", DIGITS.card, DIGITS.class_names, ["{}"], "none", {"all": changed})
        assert split_shots(again, 2, seed=1).hash != base

    def folder_hash(root, content=b"x"):
        for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        return split_shots(open_source(DataConfig(root=root)), 1, seed=1).hash

    assert folder_hash(tmp_path / "here") == folder_hash(tmp_path / "there")
    assert folder_hash(tmp_path / "here") != folder_hash(tmp_path / "changed", b"xy")


def test_natural_sampling_keeps_the_classes_shares():
    rare = [1 if i % 10 == 0 else 0 for i in range(400)]
    parts = {part: samples(rare, part=part) for part in ("train", "val", "test")}
    split = split_shots(source(**parts), 50, seed=1, sampling="natural")
    assert [len(split.train), len(split.val), len(split.test)] == [100, 8, 400]
    assert 3 <= split.train.labels.sum() <= 20
    assert len(set(split.train.names)) == 100
    balanced = split_shots(source(**parts), 20, seed=1)
    assert np.bincount(balanced.train.labels).tolist() == [20, 20]
    assert split.hash == split_shots(source(**parts), 50, seed=1, sampling="natural").hash
    one = split_shots(source(all=samples(rare, part="all")), 50, seed=1, sampling="natural")
    assert [len(one.train), len(one.test)] == [100, 300]
    with pytest.raises(InputError, match="all 2 images drawn to train on are of one class"):
        split_shots(source(**parts), 1, seed=1, sampling="natural")
    with pytest.raises(InputError, match="the test part is empty"):
        split_shots(source(all=samples(rare, part="all")), 200, seed=1, sampling="natural")
