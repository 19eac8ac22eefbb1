"""Boxes of the same pictures in three layouts are the same; odd ones are named by file."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scenes import CLASSES, draw, write_coco, write_voc, write_yolo

from vpt.data.boxes import read_boxes
from vpt.errors import InputError

WRITERS = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo}
PARTS = {"train": draw(4), "val": draw(2, seed=1), "test": draw(3, seed=2)}


@pytest.mark.parametrize("layout", WRITERS)
def test_each_layout_has_the_drawn_boxes(tmp_path, layout):
    data = read_boxes(WRITERS[layout](tmp_path / "data", PARTS))
    assert (data.layout, data.class_names, data.notes) == (layout, CLASSES, [])
    assert {part: len(images) for part, images in data.parts.items()} == {
        "train": 4, "val": 2, "test": 3,
    }  # fmt: skip
    for part, images in data.parts.items():
        order = np.argsort(images.names)
        for at, (picture, objects) in zip(order, PARTS[part], strict=True):
            assert images.sizes[at] == picture.size
            drawn = {(CLASSES.index(name), *box) for name, box in objects}
            rows = zip(images.labels[at], images.boxes[at].round(3), strict=True)
            assert {(int(label), *map(float, box)) for label, box in rows} == drawn


def test_a_picture_without_objects_is_one(tmp_path):
    parts = {"train": [*draw(2), (Image.new("RGB", (64, 48)), [])], "test": draw(1)}
    for layout, write in WRITERS.items():
        train = read_boxes(write(tmp_path / layout, parts)).parts["train"]
        assert sorted(map(len, train.boxes))[0] == 0
        assert train.boxes[2].shape == (0, 4)


def test_odd_boxes_are_left_out_or_cut_and_named(tmp_path):
    root = write_coco(tmp_path, {"train": draw(1, most=1), "test": draw(1)})
    path = root / "annotations/instances_train.json"
    content = json.loads(path.read_text())
    first = content["annotations"][0]
    odd = [[5, 5, 0, 9], [200, 5, 9, 9], [150, 5, 20, 9], first["bbox"]]
    content["annotations"] += [first | {"id": 10 + i, "bbox": box} for i, box in enumerate(odd)]
    content["annotations"] += [first | {"id": 20, "iscrowd": 1}]
    path.write_text(json.dumps(content))
    data = read_boxes(root)
    boxes = data.parts["train"].boxes[0]
    assert len(boxes) == 2 and boxes[1].tolist() == [150, 5, 160, 14]
    notes = "\n".join(data.notes)
    for said in ("without area", "outside of their image", "come twice", "reach beyond", "1 crowd"):
        assert said in notes
    assert notes.count("instances_train.json, train0.png") == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][0].update(category_id=8), "no box or category"),
        (lambda c: c["annotations"][0].update(image_id=99), "image 99, which it lacks"),
        (lambda c: c["images"][0].update(width=999), "give the original image"),
        (lambda c: c["images"][0].update(file_name="gone.png"), "no image below"),
    ],
)
def test_wrong_coco_files_are_refused(tmp_path, change, message):
    root = write_coco(tmp_path, {"train": draw(2), "test": draw(1)})
    path = root / "annotations/instances_train.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_boxes(root)


def test_wrong_rows_of_yolo_are_named(tmp_path):
    root = write_yolo(tmp_path, {"train": draw(1), "test": draw(1)})
    (root / "labels/train/train0.txt").write_text("0 .5 .5 .1 .1\n9 .5 .5 .1 .1\n")
    with pytest.raises(InputError, match=r"train0.txt, line 2: '9 .5 .5 .1 .1' is not CLASS X"):
        read_boxes(root)


def test_entities_of_xml_are_refused(tmp_path):
    root = write_voc(tmp_path, {"train": draw(1), "test": draw(1)})
    path = root / "Annotations/train0.xml"
    path.write_text('<!DOCTYPE a [<!ENTITY x "y">]>' + path.read_text())
    with pytest.raises(InputError, match="declares entities"):
        read_boxes(root)


def test_folders_without_boxes_are_refused(tmp_path):
    with pytest.raises(InputError, match="has no boxes"):
        read_boxes(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        read_boxes(tmp_path / "gone")


def test_patients_come_from_coco_or_a_table_and_are_in_one_part(tmp_path):
    parts = {"train": draw(2), "test": draw(2)}
    root = write_coco(tmp_path / "a", parts, patients=lambda part, number: f"{part}-{number}")
    assert read_boxes(root).parts["test"].patients == ["test-0", "test-1"]
    root = write_coco(tmp_path / "b", parts, patients=lambda part, number: f"{number}")
    with pytest.raises(InputError, match="2 patients are in both test and train: 0, 1"):
        read_boxes(root)
    root, table = write_voc(tmp_path / "c", parts), tmp_path / "patients.csv"
    table.write_text("image,patient\ntrain0.png,a\ntrain1,a\ntest0,b\ntest1,c\n")
    assert read_boxes(root, table).parts["train"].patients == ["a", "a"]
    table.write_text("image,patient\ntrain0.png,a\n")
    with pytest.raises(InputError, match="have no patient"):
        read_boxes(root, table)


def test_degenerate_boxes_of_real_files(tmp_path):
    if "VPT_REAL_DATA" not in os.environ:
        pytest.skip("VPT_REAL_DATA is not set: no BCCD here")
    import tarfile

    with tarfile.open(Path(os.environ["VPT_REAL_DATA"]) / "bccd.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    data = read_boxes(tmp_path / "BCCD")
    assert data.class_names == ["Platelets", "RBC", "WBC"]
    assert data.parts["test"].class_counts(3) == [69, 805, 71]
    said = ["2 boxes without area, left out: BloodImage_00338.xml, BloodImage_00343.xml"]
    assert data.notes == said
