"""Few-shot splits: which images are learned from, and which are tested on."""

import hashlib
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vpt.config import DataConfig, Half, Parts, Sampling
from vpt.data.sources import Samples, Source
from vpt.errors import InputError

Per = Literal["image", "patient"]
_VAL_SHOTS = 4  # at most, as in CoOp


@dataclass(frozen=True, eq=False)
class Split:
    """Training and test images of a run; `hash` is the same wherever the data lie.

    Decisions are fitted on `calibration`: a random sample of the training part, classes as
    frequent as there, taken before the shots are drawn. No image of it, and no patient of its
    images, is in another part.
    """

    train: Samples
    val: Samples | None
    test: Samples
    hash: str
    calibration: Samples | None = None
    notes: tuple[str, ...] = ()  # lines on classes of which there is less than was asked for


def split_data(source: Source, data: DataConfig) -> Split:
    """The split that `data` asks for; see `split_shots`. `source` is of all classes."""
    return split_shots(
        source,
        data.shots,
        data.seed,
        data.split,
        per=data.shots_per,
        sampling=data.sampling,
        calibration=data.calibration,
        class_half=data.class_half,
    )


def split_shots(
    source: Source,
    shots: int | None,
    seed: int,
    parts: Parts = "train-test",
    *,
    per: Per = "image",
    sampling: Sampling = "balanced",
    calibration: float | None = None,
    class_half: Half | None = None,
) -> Split:
    """At most `shots` images a class (None: all) to train on, 4 to validate on, and the test part.

    A class with fewer is kept whole, as in CoOp, and the split's notes say so. The target says what
    a shot is (see `Target.draw`). With `sampling` natural, as many images as that is with balanced
    classes, drawn whatever their class: classes keep their proportions, and a rare one may get
    none.

    Data without a test part gives all that is not drawn to the test; if it names patients, those
    of the test are held out first, so that none is in both.

    Args:
        source: the data.
        shots: of each class.
        seed: of what is drawn.
        parts: trainval-test trains on the validation images too; train-val makes them the test,
            for choosing settings without a look at the test part.
        per: patient: a shot is a patient, with all its images of the class.
        calibration: patients (images, where none are known) of `Split.calibration`: their number,
            an int, or their proportion, below 1, of the training part, or of all without one.
        class_half: whose images are kept of what was drawn of all classes, as in Dassl.

    Raises:
        InputError: a class has no images, a patient is in two parts, patients are not known
            where a shot is one, or there is no val part to choose by.
    """
    rng = random.Random(seed)
    val = test = None
    if "all" in source.parts:
        if shots is None:
            raise InputError(
                f"{source.name}: the data has no test part: give data.shots=NUMBER, and the other "
                "images are the test"
            )
        pool = source.parts["all"]
        if pool.patients is not None:
            pool, test = _split_patients(pool, seed)
    else:
        _check_patients(source.parts)
        pool, test = source.parts["train"], source.parts["test"]
        val = source.parts.get("val") or None  # none, or empty
    if per == "patient" and pool.patients is None:
        raise InputError(
            f"data.shots_per=patient: {source.name} names no patients: add a patient column"
        )
    held = None
    if calibration is not None:
        held, pool = _hold_out(pool, calibration, rng)
    if shots and sampling == "balanced":
        least = shots
    else:  # VTAB-1k's 800 training images leave classes out: SUN397 has 397
        least = int(test is not None and source.card.layout != "vtab")
    whole = _check_counts(source, pool, least, per)
    train = pool
    if shots is not None:
        train = pool.take(_draw(source, pool, shots, per, sampling, rng))
        val_shots = min(shots, _VAL_SHOTS)
        val = val and val.take(_draw(source, val, val_shots, per, sampling, rng))
    if test is None:
        test = pool.take(np.flatnonzero(~np.isin(pool.names, train.names)))
    if class_half:
        classes, source = source.half_classes(class_half), source.half(class_half)
        train, test = train.of_classes(classes), test.of_classes(classes)
        val, held = val and val.of_classes(classes), held and held.of_classes(classes)
        whole = {name: count for name, count in whole.items() if name in source.class_names}
    if len(test) == 0:
        raise InputError(f"{source.name}: the test part is empty: add images, or lower data.shots")
    if not train.target.learnable(train.labels):
        raise InputError(
            f"{source.name}: all {len(train)} images drawn to train on are of one class: raise "
            "data.shots, or give data.sampling=balanced"
        )
    if parts == "train-val":
        if val is None:
            raise InputError(f"{source.name}: data.split=train-val needs a val part: add one")
        val, test = None, val
    elif parts == "trainval-test" and val is not None:
        train, val = train.join(val), None
    hashed = {"train": train, "val": val, "test": test, "calibration": held}
    notes = []
    if whole:
        counts = ", ".join(f"{name} ({count})" for name, count in whole.items())
        notes.append(f"fewer {per}s than data.shots={shots}, so all train: {counts}")
    notes += absent_classes(source, [test])
    return Split(train, val, test, _hash(hashed), held, tuple(notes))


def absent_classes(source: Source, tests: Sequence[Samples]) -> list[str]:
    """A line on the classes without an image in `tests`, if there are any."""
    counts = sum(test.class_counts(len(source.class_names)) for test in tests)
    absent = [name for name, n in zip(source.class_names, counts, strict=True) if n == 0]
    found = f"classes without a test image, which metrics leave out: {', '.join(absent)}"
    return [found] if absent else []


def _draw(
    source: Source, samples: Samples, shots: int, per: Per, sampling: Sampling, rng: random.Random
) -> list[int]:
    total = shots * len(source.class_names)
    if per == "image" and sampling == "natural":
        return rng.sample(range(len(samples)), min(total, len(samples)))
    if per == "image":
        return samples.target.draw(samples.labels, shots, rng)
    if sampling == "natural":
        known = sorted(set(samples.patients))
        drawn = rng.sample(known, min(total, len(known)))
        return np.flatnonzero(np.isin(samples.patients, drawn)).tolist()
    units = _units(source, samples)
    shown = list(dict.fromkeys(units))
    labels = np.array([label for label, _ in shown])
    chosen = {shown[i] for i in samples.target.draw(labels, shots, rng)}
    return [i for i, unit in enumerate(units) if unit in chosen]


def _units(source: Source, samples: Samples) -> list[tuple[int, str]]:
    """(class, patient) of each sample."""
    if not samples.target.exclusive:
        raise InputError(
            f"{source.name}: shots of patients need one label an image: give "
            "data.sampling=natural, or data.shots_per=image"
        )
    return list(zip(samples.labels.tolist(), samples.patients, strict=True))


def _hold_out(samples: Samples, amount: float, rng: random.Random) -> tuple[Samples, Samples]:
    """The samples of `amount` of the patients (images, where none are known), and the others."""
    units = samples.patients or samples.names
    known = sorted(set(units))
    number = amount if isinstance(amount, int) else round(amount * len(known))
    if not 0 < number < len(known):
        kind = "patients" if samples.patients else "images"
        raise InputError(
            f"data.calibration={amount}: {number} of {len(known)} {kind} to train on: it must "
            "leave some on either side"
        )
    held = np.isin(units, rng.sample(known, number))
    return samples.take(np.flatnonzero(held)), samples.take(np.flatnonzero(~held))


def _split_patients(samples: Samples, seed: int) -> tuple[Samples, Samples]:
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    patients, exclusive = len(set(samples.patients)), samples.target.exclusive
    if patients < 3 or (exclusive and np.bincount(samples.labels).max() < 3):
        raise InputError(
            f"{patients} patients with {len(samples)} images are too few to hold a third of them "
            "out: give three of each, or a split column"
        )
    # One of three: sklearn keeps the classes' proportions alike in both, as far as patients allow.
    splitter = StratifiedGroupKFold if exclusive else GroupKFold
    splits = splitter(n_splits=3, shuffle=True, random_state=seed)
    pool, test = next(splits.split(samples.labels, samples.labels, samples.patients))
    return samples.take(pool), samples.take(test)


def _check_counts(source: Source, samples: Samples, shots: int, per: Per) -> dict[str, int]:
    """Classes, each with its number, of which there are fewer than `shots`.

    Raises:
        InputError: there are none of a class, where one is wanted.
    """
    counts = samples.class_counts(len(source.class_names))
    if per == "patient" and samples.target.exclusive:
        labels = [label for label, _ in set(_units(source, samples))]
        counts = np.bincount(labels, minlength=len(source.class_names))
    fewer = {
        name: count
        for name, count in zip(source.class_names, counts.tolist(), strict=True)
        if count < shots
    }
    for name, count in fewer.items():
        if count == 0:
            group = " of the patients to train on" if samples.patients and per == "image" else ""
            raise InputError(f"class {name!r} has 0 {per}s{group}: add {per}s, or remove the class")
    return fewer


def _check_patients(parts: dict[str, Samples]) -> None:
    for (one, a), (other, b) in itertools.combinations(parts.items(), 2):
        shared = sorted(set(a.patients or []) & set(b.patients or []))
        if shared:
            raise InputError(
                f"{len(shared)} patients are in both {one} and {other}: "
                f"{', '.join(shared)}: move each to one part"
            )


def _hash(parts: dict[str, Samples | None]) -> str:
    digest = hashlib.sha256()
    for part, samples in parts.items():
        if samples is None:
            continue
        for name, label in zip(samples.names, samples.labels, strict=True):
            digest.update(f"{part}\t{name}\t{label.tolist()}\n".encode())
        if isinstance(samples.images, np.ndarray):
            digest.update(np.ascontiguousarray(samples.images).reshape(-1))
        else:
            digest.update(" ".join(str(path.stat().st_size) for path in samples.images).encode())
    return digest.hexdigest()[:16]
