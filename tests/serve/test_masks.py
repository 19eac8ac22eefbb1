"""A segmenter among the tasks of a server answers as Hugging Face's image segmentation."""

import base64
import io

import numpy as np
import pytest
import torch
from huggingface_hub import InferenceClient
from PIL import Image
from running import png, put, serving
from stored import BACKBONES

from vpt import backbones
from vpt.dense import artefact
from vpt.dense.config import SegmentHeadConfig
from vpt.dense.inference import _masks
from vpt.dense.pyramid import Maps, attach
from vpt.dense.segmenter import Segmenter
from vpt.serve import masks

RAW = {"content-type": "image/png"}
SIZE = (60, 40)


def save(path, names, instances):
    torch.manual_seed(0)
    path.parent.mkdir()
    made = attach(backbones.adapt(BACKBONES["vit"]()), "vpt_deep", names, {})
    model = Segmenter(Maps(made, None, (64, 96)), names, SegmentHeadConfig(channels=32), instances)
    artefact.save(model, path, "vpt_deep", {})


@pytest.fixture
def drawn(tmp_path):
    """Gives the numbers (h, w) that `vpt predict` draws of the image."""
    image = tmp_path / "noise.png"
    image.write_bytes(png(size=SIZE))

    def read(path):
        model = artefact.load(path, BACKBONES["vit"]()).fold()
        (found,) = _masks(model, [image], tmp_path / "out")
        return np.array(Image.open(found["mask"]))

    return read


def pixels(mask):
    return np.array(mask) > 0


def test_objects_of_one_class(tmp_path, drawn):
    path = tmp_path / "tasks" / "nuclei.safetensors"
    save(path, ["nucleus"], True)
    put(path.parent, "pets", "vpt_deep_vit")
    numbers = drawn(path)
    assert numbers.max() > 1
    with serving(path.parent, "vit") as (client, _, _):
        hub = InferenceClient()
        url = str(client.base_url).rstrip("/") + "/models/nuclei"
        found = hub.image_segmentation(png(size=SIZE), model=url)
        assert len(found) == numbers.max()
        assert {each.label for each in found} == {"nucleus"}
        scores = [each.score for each in found]
        assert scores == sorted(scores, reverse=True)
        want = {pixels(numbers == number).tobytes() for number in range(1, numbers.max() + 1)}
        assert {pixels(each.mask).tobytes() for each in found} == want
        assert {each.mask.size for each in found} == {SIZE}
        best = hub.image_segmentation(png(size=SIZE), model=url, threshold=scores[0])
        assert [each.score for each in best] == scores[:1]
        listed = {each["task"]: each["target"] for each in client.get("/v1/tasks").json()}
        assert listed == {"nuclei": "masks", "pets": "multiclass"}
        assert client.post("/models/pets", content=png(), headers=RAW).status_code == 200
        put(path.parent, "nuclei", "vpt_deep_vit")  # of another kind now
        assert client.post("/v1/reload").json()["replaced"] == ["nuclei"]
        assert client.get("/v1/tasks/nuclei").json()["target"] == "multiclass"


def test_classes(tmp_path, drawn, monkeypatch):
    path = tmp_path / "tasks" / "organs.safetensors"
    names = ["liver", "spleen"]
    save(path, names, False)
    numbers = drawn(path)
    monkeypatch.setattr(masks, "MOST", 3 * SIZE[0] * SIZE[1])
    with serving(path.parent, "vit") as (client, _, _):
        reply = client.post("/v1/tasks/organs/predict", content=png(size=SIZE), headers=RAW)
        (image,) = reply.json()["images"]
        found = {each["label"]: each for each in image["segments"]}
        assert found
        assert set(found) == {names[number - 1] for number in np.unique(numbers) if number}
        for label, each in found.items():
            mask = Image.open(io.BytesIO(base64.b64decode(each["mask"])))
            assert np.array_equal(pixels(mask), numbers == 1 + names.index(label))
            assert each["score"] is None
        large = client.post("/models/organs", content=png(size=(61, 40)), headers=RAW)
        assert large.status_code == 422 and "2,400 have masks at most" in large.json()["error"]
