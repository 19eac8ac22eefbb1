"""Which images train, validate and test: so many images in all, whatever is in them."""

import hashlib
import random
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np

from vpt.errors import InputError

_TEST, _VAL = 3, 6  # one in so many is held out of data without such a part


class Images(Protocol):
    """Images with their objects, of either kind."""

    names: list[str]
    patients: list[str] | None

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> Self:
        """The images at `indices`."""


Data = TypeVar("Data", bound=Images)


class Split(NamedTuple, Generic[Data]):
    """Images of a run; `hash` is of their names and parts."""

    train: Data
    val: Data
    test: Data
    hash: str
    notes: list[str]


def split_images(parts: dict[str, Data], shots: int | None, seed: int) -> Split[Data]:
    """`shots` images to train on (None: all), as many at most to validate on, and the test part.

    Smaller numbers of shots are parts of larger ones, for one seed. Where the data have no test
    part, a third of the patients (images, where none are known) tests; where they have no
    validation part, a sixth of the others validates.

    Raises:
        InputError: too few images to hold any out; no part to train on.
    """
    rng, test = random.Random(seed), parts.get("test")
    pool = parts.get("all" if test is None else "train")
    if pool is None:
        raise InputError(f"the data have only a {' and a '.join(parts)} part: add one named train")
    if test is None:
        test, pool = _hold_out(pool, _TEST, rng)
    val = parts.get("val")
    if val is None:
        val, pool = _hold_out(pool, _VAL, rng)
    notes = []
    if shots is not None and shots > len(pool):
        notes = [f"{len(pool)} images to train on, fewer than data.shots={shots}: all train"]
    train = pool.take(np.array(rng.sample(range(len(pool)), len(pool))[:shots]))
    val = val.take(np.array(rng.sample(range(len(val)), len(val))[: len(train)]))
    digest = hashlib.sha256()
    for part, images in (("train", train), ("val", val), ("test", test)):
        digest.update("".join(f"{part}\t{name}\n" for name in sorted(images.names)).encode())
    return Split(train, val, test, digest.hexdigest()[:16], notes)


def _hold_out(images: Data, one_in: int, rng: random.Random) -> tuple[Data, Data]:
    """One in so many of the patients or images, and the others."""
    units = np.array(images.patients or images.names)
    known = sorted(set(units.tolist()))
    number = max(1, round(len(known) / one_in))
    if number >= len(known):
        kind = "patients" if images.patients else "images"
        raise InputError(f"{len(known)} {kind} are too few to hold one out: give more")
    held = np.isin(units, rng.sample(known, number))
    return images.take(np.flatnonzero(held)), images.take(np.flatnonzero(~held))
