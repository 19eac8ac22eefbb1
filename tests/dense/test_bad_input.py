"""What is wrong with data or folders of boxes and masks is one line, and nothing is written."""

import json

import numpy as np
import pytest
from PIL import Image
from scenes import draw, write_coco, write_voc

from vpt.config import load_run
from vpt.dense.config import load_dense
from vpt.dense.run import run
from vpt.errors import InputError

KEYS = ["backbone.name=tiny_clip", "train.steps=2"]


def bare(pictures):
    """The pictures without their objects."""
    return [(picture, []) for picture, _ in pictures]


def refused(folder, *keys, kind="detect"):
    """The line that refuses the run."""
    with pytest.raises(InputError) as caught:
        run(load_dense(kind, [*KEYS, *keys, f"out={folder}"]), log=print, progress=False)
    assert not folder.exists() and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_part_without_boxes(tmp_path, part):
    parts = {"train": draw(4), "val": draw(2, seed=1), "test": draw(2, seed=2)}
    data = write_voc(tmp_path / "cells", {**parts, part: bare(parts[part])})
    said = refused(tmp_path / "run", f"data.root={data}")
    assert said.startswith(f"no box in the {len(parts[part])} images of the {part} part: ")


def test_masks_without_an_object(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for number in range(6):
            image = Image.fromarray(np.zeros((32, 32), np.uint8))
            image.convert("RGB" if folder == "images" else "L").save(
                tmp_path / f"data/{folder}/{number}.png"
            )
    keys = [f"data.root={tmp_path / 'data'}", "data.masks=instance"]
    assert "no object in the" in refused(tmp_path / "run", *keys, kind="segment")


def test_a_test_part_alone(tmp_path):
    data = write_coco(tmp_path / "cells", {"test": draw(3)})
    assert "add one named train" in refused(tmp_path / "run", f"data.root={data}")


def test_a_broken_part(tmp_path):
    data = write_coco(tmp_path / "cells", {"train": draw(3), "test": draw(2, seed=1)})
    path = next(path for path in data.rglob("*.json") if "train" in path.name)
    path.write_text("{half")
    assert f"{path}: not JSON" in refused(tmp_path / "run", f"data.root={data}")


@pytest.mark.parametrize("method", ["class_means", "ranpac", "linear_probe", "coop"])
def test_a_method_without_prompts(tmp_path, method):
    data = write_voc(tmp_path / "cells", {"train": draw(4), "test": draw(2, seed=2)})
    said = refused(tmp_path / "run", f"data.root={data}", f"method.name={method}")
    assert said == f"{method} leaves the image tower alone: take head_only"


def test_the_folder_of_another_kind_of_run(tmp_path):
    data = write_voc(tmp_path / "cells", {"train": draw(4), "test": draw(2, seed=2)})
    (tmp_path / "run").mkdir()
    config = load_run("linear_probe", ["data.name=digits"]).model_dump(mode="json")
    (tmp_path / "run/config.yaml").write_text(json.dumps(config))
    settings = load_dense("detect", [*KEYS, f"data.root={data}", f"out={tmp_path / 'run'}"])
    with pytest.raises(InputError, match=r"holds no run of this kind .* give another out=DIR"):
        run(settings, resume=True, log=print)


def test_a_section_that_is_no_section():
    with pytest.raises(InputError, match=r"method='vpt_deep': not a section: give method.KEY="):
        load_run("vpt_deep", ["data.name=digits", "method=vpt_deep"])
