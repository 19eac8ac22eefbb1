"""COCO: a .json of images, annotations and categories for each part."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from vpt.data.boxes import Annotated, Read
from vpt.data.boxes._find import Images, below, read_text, split_part
from vpt.data.layouts._files import train_and_test
from vpt.errors import InputError

_KEYS = {"images", "annotations", "categories"}


def recognise(root: Path) -> bool:
    """True if a .json below `root` has COCO's keys."""
    return any(_is_coco(path) for path in below(root, "*.json"))


def read(root: Path) -> Read:
    """Boxes are x, y, width, height; category ids are any numbers; crowds are left out.

    The part is that which the path of the .json names, else all. `patient` or `patient_id` of an
    image is its patient.

    Raises:
        InputError: a broken .json; parts with other categories; an annotation of no image or
            category.
    """
    images, names, crowds = Images(root), {}, 0
    parts: dict[str, list[Annotated]] = {}
    for path in below(root, "*.json"):
        content = _content(path)
        if not content:
            continue
        categories = {each["id"]: str(each["name"]) for each in content["categories"]}
        names = names or categories
        if categories != names:
            raise InputError(f"{path}: other categories than another part's: give all the same")
        part = split_part(path.relative_to(root).as_posix()) or "train"
        if part in parts:
            raise InputError(f"{path}: a second .json for the part {part}: keep one")
        objects = defaultdict(list)
        for each in content["annotations"]:
            if each.get("iscrowd"):
                crowds += 1
            elif "bbox" not in each or len(each["bbox"]) != 4 or each["category_id"] not in names:
                raise InputError(
                    f"{path}: annotation {each.get('id')}: no box or category: mend it"
                )
            else:
                objects[each["image_id"]].append(each)
        known = {each["id"] for each in content["images"]}
        if unknown := objects.keys() - known:
            raise InputError(f"{path}: annotations of image {min(unknown)}, which it lacks: add it")
        parts[part] = [
            _annotated(each, objects[each["id"]], names, images, path) for each in content["images"]
        ]
    notes = [f"{crowds} crowd annotations left out"] if crowds else []
    return Read([names[key] for key in sorted(names)], train_and_test(parts), notes)


def _annotated(
    image: dict[str, Any],
    objects: list[dict[str, Any]],
    names: dict[int, str],
    images: Images,
    where: Path,
) -> Annotated:
    boxes = [(x, y, x + width, y + height) for x, y, width, height in (o["bbox"] for o in objects)]
    sides = image.get("width"), image.get("height")
    patient = image.get("patient", image.get("patient_id"))
    return Annotated(
        images.find(image["file_name"], where),
        f"{where.name}, {image['file_name']}",
        boxes,
        [names[each["category_id"]] for each in objects],
        sides if all(sides) else None,
        None if patient is None else str(patient),
    )


def _is_coco(path: Path) -> bool:
    try:
        return bool(_content(path))
    except InputError:
        return False


def _content(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error}): mend or remove it") from None
    return content if isinstance(content, dict) and content.keys() >= _KEYS else None
