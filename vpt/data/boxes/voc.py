"""Pascal VOC: an .xml of each image, and parts by ImageSets/Main/*.txt or by folders."""

from pathlib import Path
from xml.etree import ElementTree

from vpt.data.boxes import Annotated, Read
from vpt.data.boxes._find import Images, below, read_text, split_part
from vpt.data.layouts._files import train_and_test
from vpt.errors import InputError

_SIDES = ("xmin", "ymin", "xmax", "ymax")


def recognise(root: Path) -> bool:
    """True if the first .xml below `root` is an annotation."""
    first = next(iter(below(root, "*.xml")), None)
    return first is not None and "<annotation" in read_text(first)[:1000]


def read(root: Path) -> Read:
    """Corners count from 1 and belong to the box: 1 is subtracted from the lower ones.

    Raises:
        InputError: an .xml that can't be read, or has an object without a name or a box.
    """
    images = Images(root)
    listed = {
        stem: path.stem
        for path in below(root, "ImageSets/Main/*.txt")
        if path.stem in {"train", "val", "test"}
        for stem in read_text(path).split()
    }
    parts: dict[str, list[Annotated]] = {}
    for path in below(root, "*.xml"):
        part = listed.get(path.stem) if listed else split_part(str(path.relative_to(root)))
        if part or not listed:
            parts.setdefault(part or "train", []).append(_annotated(path, images))
    names = {label for part in parts.values() for each in part for label in each.labels}
    return Read(sorted(names), train_and_test(parts))


def _annotated(path: Path, images: Images) -> Annotated:
    text = read_text(path)
    try:
        if "<!ENTITY" in text:
            raise ValueError("it declares entities")
        tree = ElementTree.fromstring(text)
        boxes, labels = [], []
        for each in tree.iter("object"):
            left, top, right, bottom = (float(each.findtext(f"bndbox/{s}", "")) for s in _SIDES)
            # a slip of the hand, not one pixel: the box keeps no area, and is left out
            boxes.append((left - (left < right), top - (top < bottom), right, bottom))
            labels.append((each.findtext("name") or "").strip())
        if not all(labels):
            raise ValueError("an object without a name")
        sides = (int(tree.findtext(f"size/{side}", "0")) for side in ("width", "height"))
        width, height = sides
    except (ElementTree.ParseError, ValueError) as error:
        raise InputError(f"{path}: not an annotation of Pascal VOC ({error}): mend it") from None
    name = (tree.findtext("filename") or "").strip()
    image = images.find(name if Path(name).stem == path.stem else path.stem, path)
    size = (width, height) if width and height else None
    return Annotated(image, path.name, boxes, labels, size)
