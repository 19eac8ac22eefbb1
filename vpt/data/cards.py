"""Data cards: what a data set is, where it comes from, and how its files are read."""

from typing import Literal

from pydantic import Field, PositiveInt

from vpt import resources
from vpt.config import Augment, Published, Strict
from vpt.data import layouts
from vpt.errors import InputError, nearest
from vpt.settings import read_yaml, validate


class Card(Strict):
    """One file under datasets/."""

    title: str
    source: str
    licence: str
    get: str  # where to get it and where to put it, for whoever does not have it
    layout: str  # a module of vpt.data.layouts: how the files below `data.root` are read
    split: str  # the split protocol, in words
    task: Literal["multiclass", "multilabel"] = "multiclass"
    medical: bool = False  # results are shown as not for clinical use
    group: str | None = None  # of a suite's data sets, averaged on its own
    num_classes: PositiveInt | None = None
    classes: list[str] | None = None  # in label order, where the files carry no names
    templates: list[str] = Field(["a photo of a {}."])
    augment: Augment = "none"
    split_file: str | None = None  # zhou: below root
    images: str | None = None  # zhou, fgvc: the folder that the split files' paths start from
    num_images: dict[Literal["train", "val", "test"], PositiveInt] = Field({})  # as published
    image_size: tuple[PositiveInt, PositiveInt] | None = None  # width, height, where all are alike
    lossless: bool = False  # never JPEG: a dump of JPEG files is re-encoded, and costs accuracy
    exclude: list[str] = Field([])  # patterns of files that are left out
    include: list[str] = Field([])  # patterns of files that count though rules leave them out
    checksums: dict[str, str] = Field({})  # file below root: "md5:…" or "sha256:…", where published
    published: list[Published] = Field([])


def load_card(name: str) -> Card:
    """The card called `name` under datasets/.

    Raises:
        InputError: there is none (says the nearest name), or it is not a valid card.
    """
    path = resources.find("datasets", name)
    card = validate(Card, dict(read_yaml(path)), where=str(path))
    if card.layout not in layouts.names():
        hint = nearest(card.layout, layouts.names())
        raise InputError(f"{path}: layout={card.layout!r}: no such layout{hint}")
    if card.classes is not None and card.num_classes != len(card.classes):
        raise InputError(f"{path}: {len(card.classes)} classes, but num_classes={card.num_classes}")
    return card


def plain_card(layout: str) -> Card:
    """The card of one's own data, of a layout that no file under datasets/ is named after."""
    return Card(
        title=f"Your own images: {layout}",
        source="yours",
        licence="yours",
        get=f"Give data.root=PATH, of the layout {layout}.",
        layout=layout,
        split="The data's own parts; without any, all but the shots drawn are the test set.",
    )
