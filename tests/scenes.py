"""Pictures of drawn objects, and their boxes in each layout of files."""

import json

import numpy as np
import yaml
from PIL import Image, ImageDraw

CLASSES = ["disc", "square"]
SIZE = (160, 128)


def draw(count=4, seed=0, size=SIZE, most=3):
    """(picture, [(class, (left, top, right, bottom))]) of whole pixels, far apart."""
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        picture = Image.new("RGB", size, (40, 40, 60))
        pen, objects = ImageDraw.Draw(picture), []
        places = rng.permutation(6)[: rng.integers(1, most + 1)]
        for place in places:
            side = int(rng.integers(24, 40))
            left = int(place % 3 * size[0] // 3 + rng.integers(0, size[0] // 3 - side))
            top = int(place // 3 * size[1] // 2 + rng.integers(0, size[1] // 2 - side))
            label = int(rng.integers(2))
            shape = (pen.ellipse, pen.rectangle)[label]
            shape(
                (left, top, left + side - 1, top + side - 1),
                fill=((220, 60, 60), (60, 220, 90))[label],
            )
            objects.append((CLASSES[label], (left, top, left + side, top + side)))
        pictures.append((picture, objects))
    return pictures


def write_voc(root, parts):
    """Pascal VOC's folders of {part: pictures}."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for part, pictures in parts.items():
        stems = [f"{part}{number}" for number in range(len(pictures))]
        (root / f"ImageSets/Main/{part}.txt").write_text("\n".join(stems))
        for stem, (picture, objects) in zip(stems, pictures, strict=True):
            picture.save(root / f"JPEGImages/{stem}.png")
            boxes = "".join(
                f"<object><name>{name}</name><bndbox><xmin>{left + 1}</xmin><ymin>{top + 1}</ymin>"
                f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
                for name, (left, top, right, bottom) in objects
            )
            width, height = picture.size
            (root / f"Annotations/{stem}.xml").write_text(
                f"<annotation><filename>{stem}.png</filename><size><width>{width}</width>"
                f"<height>{height}</height></size>{boxes}</annotation>"
            )
    return root


def write_yolo(root, parts):
    """images/PART, labels/PART and data.yaml of {part: pictures}."""
    for part, pictures in parts.items():
        for folder in ("images", "labels"):
            (root / folder / part).mkdir(parents=True)
        for number, (picture, objects) in enumerate(pictures):
            picture.save(root / f"images/{part}/{part}{number}.png")
            width, height = picture.size
            rows = [
                f"{CLASSES.index(name)} {(left + right) / 2 / width} {(top + bottom) / 2 / height} "
                f"{(right - left) / width} {(bottom - top) / height}\n"
                for name, (left, top, right, bottom) in objects
            ]
            if rows:
                (root / f"labels/{part}/{part}{number}.txt").write_text("".join(rows))
    described = {part: f"images/{part}" for part in parts} | {"names": dict(enumerate(CLASSES))}
    (root / "data.yaml").write_text(yaml.safe_dump(described))
    return root


def write_coco(root, parts, ids=(7, 90), patients=None):
    """PART/*.png and annotations/instances_PART.json of {part: pictures}, ids of classes sparse."""
    (root / "annotations").mkdir(parents=True)
    for part, pictures in parts.items():
        (root / part).mkdir()
        images, annotations = [], []
        for number, (picture, objects) in enumerate(pictures):
            name = f"{part}{number}.png"
            picture.save(root / part / name)
            width, height = picture.size
            image = {"id": number, "file_name": name, "width": width, "height": height}
            images.append(image | ({"patient": patients(part, number)} if patients else {}))
            annotations += [
                {"id": len(annotations) + i, "image_id": number, "iscrowd": 0,
                 "category_id": ids[CLASSES.index(label)],
                 "bbox": [left, top, right - left, bottom - top]}
                for i, (label, (left, top, right, bottom)) in enumerate(objects)
            ]  # fmt: skip
        categories = [{"id": i, "name": name} for i, name in zip(ids, CLASSES, strict=True)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{part}.json").write_text(json.dumps(content))
    return root
