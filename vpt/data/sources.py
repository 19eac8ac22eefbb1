"""Opens the data that a configuration means: card and root → class names, templates, parts."""

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from vpt import resources
from vpt.config import Augment, DataConfig, Half, Window
from vpt.data import layouts, medmnist
from vpt.data.cards import Card, load_card, plain_card
from vpt.data.dicom import patient
from vpt.data.images import Samples, is_dicom
from vpt.data.layouts import Read
from vpt.data.search import composed, matches, say
from vpt.data.survey import survey_images
from vpt.errors import InputError, check_class_names, some
from vpt.targets import Target

__all__ = ["Samples", "Source", "open_source"]


@dataclass(frozen=True, eq=False)
class Source:
    """A data set: parts train + test (+ val), or the one part `all` where it has no test part."""

    name: str
    card: Card
    class_names: list[str]
    templates: list[str]
    augment: Augment
    parts: dict[str, Samples]
    left_out: dict[str, int] = field(default_factory=dict)  # number of each kind
    notes: list[str] = field(default_factory=list)  # lines on how the files were understood

    @property
    def target(self) -> Target:
        """The kind of the labels."""
        return next(iter(self.parts.values())).target

    @property
    def medical(self) -> bool:
        """True if results are not for clinical use: the card says so, or patients are known."""
        return self.card.medical or any(samples.patients for samples in self.parts.values())

    def half(self, which: Half | None) -> "Source":
        """The source of half of the classes; see `DataConfig.class_half`.

        Raises:
            InputError: several labels an image, or a half of less than two classes.
        """
        if which is None:
            return self
        classes = self.half_classes(which)
        return replace(
            self,
            class_names=[self.class_names[label] for label in classes],
            parts={part: samples.of_classes(classes) for part, samples in self.parts.items()},
        )

    def half_classes(self, which: Half) -> list[int]:
        """Labels of that half. Raises as `half`.

        Where the card lists the classes, in its order: ImageNet's is by WordNet id, that of its
        folders is not.
        """
        number = len(self.class_names)
        if not self.target.exclusive:
            raise InputError(f"data.class_half={which}: {self.name} has several labels an image")
        if number < 4:
            raise InputError(
                f"data.class_half={which}: {number} classes are too few to halve: give four or more"
            )
        listed = self.card.classes or []
        order = listed if set(listed) == set(self.class_names) else self.class_names
        base, middle = which == "base", (number + 1) // 2
        chosen = set(order[:middle] if base else order[middle:])
        return [label for label, name in enumerate(self.class_names) if name in chosen]


def open_source(config: DataConfig, among: Sequence[str] | None = None) -> Source:
    """The data that `data.name` and `data.root` mean.

    Image files are listed, and read only to leave out the broken ones, if `data.skip_broken`.

    Args:
        config: which data.
        among: class names, of which the data may lack some.

    Raises:
        InputError: missing or wrong files, a layout that `data.root` does not have, names or
            templates that do not fit.
    """
    root = None if config.root is None else config.root.expanduser()
    name = config.name or _recognise(root)
    card = _card(name, root)
    root = root or medmnist.downloaded(name)
    layout = layouts.find(card.layout)
    if root is None or not layout.recognise(root):
        _check_root(root, layout.ROOT, name, card)
    if root is not None:
        _check_sums(root, card)
    patterns = {"exclude": config.exclude, "include": config.include}
    given = {key: value for key, value in patterns.items() if value is not None}
    card = card.model_copy(update=given)
    found, parts, kinds, notes = Read(*layout.read(root, card))
    parts, kinds = _exclude(parts, dict(kinds), card)
    _check_dump(parts, card, where=f"data.root={root}")
    if config.skip_broken:
        broken = _broken(parts, config.windows)
        parts = {part: _without(samples, broken) for part, samples in parts.items()}
        kinds |= dict.fromkeys(broken, "images that can't be read")
        notes = [*notes, *(f"left out {name}: {why}" for name, why in broken.items())]
    if config.windows and any(isinstance(s.images, np.ndarray) for s in parts.values()):
        raise InputError(f"data.windows={','.join(config.windows)}: {name} is not DICOM: drop it")
    patients = _patients(parts)
    parts = {
        part: replace(samples, patients=patients[part], windows=config.windows)
        for part, samples in parts.items()
    }
    target = next(iter(parts.values())).target
    names = [composed(name) for name in config.classes] if config.classes else None
    among = names or among
    distinct = among and len(set(among)) == len(among)
    if target.exclusive and distinct and set(found) < set(among):
        class_names = list(among)
    else:
        class_names = _class_names(found, names, card, where=f"data.root={root}")
    _check_distinct(class_names, f"data.root={root}")
    if class_names != found and set(found) <= set(class_names):  # labels follow the names
        order = np.array([class_names.index(name) for name in found])
        parts = {
            part: replace(samples, labels=target.reorder(samples.labels, order))
            for part, samples in parts.items()
        }
    templates = card.templates if config.templates is None else config.templates
    for template in templates or [""]:
        if template.count("{}") != 1:
            raise InputError(f"data.templates: {template!r} needs {{}} once, for the class name")
    return Source(
        name=name,
        card=card,
        class_names=class_names,
        templates=templates,
        augment=config.augment or card.augment,
        parts=parts,
        left_out=dict(sorted(Counter(kinds.values()).items())),
        notes=[*notes, *_say_left_out(kinds, card)],
    )


def _exclude(
    parts: dict[str, Samples], kinds: dict[str, str], card: Card
) -> tuple[dict[str, Samples], dict[str, str]]:
    """Parts without samples that the card excludes, of a layout that has not left them out."""
    for samples in parts.values():
        for name in samples.names:
            pattern = next((p for p in card.exclude if matches(name, p)), None)
            if pattern and not any(matches(name, p) for p in card.include):
                kinds[name] = f"excluded by {pattern}"
    return {part: _without(samples, kinds) for part, samples in parts.items()}, kinds


def _without(samples: Samples, names: Collection[str]) -> Samples:
    kept = [i for i, name in enumerate(samples.names) if name not in names]
    return samples if len(kept) == len(samples) else samples.take(kept)


def _broken(parts: dict[str, Samples], windows: tuple[Window, ...] | None) -> dict[str, str]:
    """Names of the samples that can't be read, each with the reason."""
    files = {
        path: name
        for samples in parts.values()
        if not isinstance(samples.images, np.ndarray)
        for path, name in zip(samples.images, samples.names, strict=True)
    }
    broken = survey_images(list(files), windows).broken
    return {files[path]: reason for path, reason in broken.items()}


def _say_left_out(kinds: dict[str, str], card: Card) -> list[str]:
    used = set(kinds.values())
    unused = [p for p in card.exclude if f"excluded by {p}" not in used]
    said = [f"left out {say(kinds)}"] if kinds else []
    return [*said, *(f"no file matches data.exclude={pattern}" for pattern in unused)]


def _check_distinct(names: list[str], where: str) -> None:
    try:
        check_class_names(names)
    except InputError as error:
        raise InputError(f"{where}: {error}, in data.classes=[…]") from None


def _class_names(found: list[str], given: list[str] | None, card: Card, where: str) -> list[str]:
    """The names `given`, else the card's, else those `found` in the files."""
    if card.num_classes not in (None, len(found)):
        raise InputError(f"{where}: {len(found)} classes, not {card.num_classes}: {card.get}")
    if len(found) < 2:
        raise InputError(
            f"{where}: only one class, {found[0]!r}: give two or more, or the folder of the "
            "class folders"
        )
    if given is not None:
        if len(given) != len(found):
            raise InputError(
                f"data.classes has {len(given)} names, but the data has {len(found)} "
                "classes: give one name a class"
            )
        return given
    # Files may carry no names (arrays), codes (ImageNet's n01440764) or the card's own names. In
    # the last case theirs is the label order.
    if card.classes is None or set(card.classes) == set(found):
        return found
    if set(card.classes) & set(found):
        differing = some(set(card.classes) ^ set(found))
        raise InputError(f"{where}: classes differ from the card's: {differing}: {card.get}")
    return card.classes


def _patients(parts: dict[str, Samples]) -> dict[str, list[str] | None]:
    """Patients of each part: from the data, else, of DICOM, each named by its first file.

    So no value of a header leaves memory.
    """
    first: dict[str, str] = {}
    patients = {}
    for part, samples in parts.items():
        patients[part] = samples.patients
        if samples.patients or isinstance(samples.images, np.ndarray):
            continue
        dicom = [path for path in samples.images if is_dicom(path)]
        if dicom and len(dicom) < len(samples):
            raise InputError(
                f"{len(dicom)} of {len(samples)} images of {part} are DICOM, first {dicom[0]}, and "
                "the others name no patients: keep one kind, or give a CSV with a patient column"
            )
        if dicom:
            patients[part] = [
                first.setdefault(patient(path), f"patient of {name}")
                for path, name in zip(dicom, samples.names, strict=True)
            ]
    return patients


def _recognise(root: Path | None) -> str:
    if root is None:
        raise InputError("no data: give data.root=PATH or data.name=NAME")
    if not root.exists():
        raise InputError(f"data.root={root}: no such file or folder: mend the path")
    return medmnist.card_name(root) or layouts.recognise(root)


def _card(name: str, root: Path | None) -> Card:
    """The card called `name`; a layout of one's own may be named without one."""
    own = name in layouts.names() and name not in resources.names("datasets")
    if own and root is not None and layouts.find(name).recognise(root):
        return plain_card(name)
    return load_card(name)


def _check_root(root: Path | None, expected: str | None, name: str, card: Card) -> None:
    if expected is None:
        if root is not None:
            raise InputError(f"data.root={root}: data.name={name} reads no files: drop one of them")
        return
    if root is None:
        raise InputError(f"data.name={name} needs data.root=PATH: {card.get}")
    if not root.exists():
        raise InputError(f"data.root={root}: no such file or folder: {card.get}")
    found = "folder" if root.is_dir() else root.suffix.lower()
    if found != expected:
        wanted, given = (kind if kind == "folder" else f"{kind} file" for kind in (expected, found))
        raise InputError(
            f"data.root={root}: data.name={name} expects a {wanted}, not a {given}: {card.get}"
        )


def _check_dump(parts: dict[str, Samples], card: Card, where: str) -> None:
    """Refuses what is not the published data set: images missing, resized or re-encoded."""
    for part, published_number in card.num_images.items():
        number = len(parts.get(part, ()))
        if number != published_number:
            raise InputError(
                f"{where}: {number} {part} images, not the published {published_number}: {card.get}"
            )
    for samples in filter(len, parts.values()):
        name = samples.names[0]
        if card.image_size and (size := samples.read(0).size) != card.image_size:
            raise InputError(
                f"{where}: {name} has {size} pixels, the original images {card.image_size}: "
                f"{card.get}"
            )
        if card.lossless and name.lower().endswith((".jpg", ".jpeg")):
            raise InputError(
                f"{where}: {name} is a JPEG, which the original images are not; re-encoding them "
                f"costs accuracy: {card.get}"
            )


def _check_sums(root: Path, card: Card) -> None:
    paths = [root / name for name in card.checksums] if root.is_dir() else [root]
    for path in paths:
        published = card.checksums.get(path.name)
        if published is None or not path.is_file():
            continue
        algorithm, _, digest = published.partition(":")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, algorithm).hexdigest()
        if found != digest:
            raise InputError(
                f"{path}: checksum {algorithm}:{found} differs from the published {published}: "
                "download it again"
            )
