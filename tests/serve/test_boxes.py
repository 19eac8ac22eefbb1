"""A detector among the tasks of a server answers as Hugging Face's object detection."""

import pytest
import torch
from huggingface_hub import InferenceClient
from running import png, put, serving
from stored import BACKBONES

from vpt import backbones
from vpt.dense import artefact
from vpt.dense.config import DetectHeadConfig
from vpt.dense.detector import Detector
from vpt.dense.pyramid import Maps, attach

RAW = {"content-type": "image/png"}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    made = attach(backbones.adapt(BACKBONES["vit"]()), "vpt_deep", ["disc", "square"], {})
    head = DetectHeadConfig(channels=32, convs=1)
    model = Detector(Maps(made, None, (64, 96)), ["disc", "square"], head)
    model.threshold = 0.0
    artefact.save(model, tmp_path / "cells.safetensors", "vpt_deep", {}, medical=True)
    put(tmp_path, "pets", "vpt_deep_vit")
    return tmp_path


def test_a_detector_is_served_beside_classifiers(folder):
    size = (60, 40)
    with serving(folder, "vit") as (client, _, _):
        hub = InferenceClient()
        url = str(client.base_url).rstrip("/") + "/models/cells"
        found = hub.object_detection(png(size=size), model=url)
        assert found and {each.label for each in found} <= {"disc", "square"}
        for each in found:
            assert 0 <= each.box.xmin <= each.box.xmax <= size[0]
            assert 0 <= each.box.ymin <= each.box.ymax <= size[1]
        best = found[0].score
        fewer = hub.object_detection(png(size=size), model=url, threshold=best)
        assert [each.score for each in fewer] == [best]
        answered = client.post(
            "/v1/tasks/cells/predict", content=png(size=size), headers=RAW
        ).json()
        assert len(answered["images"][0]["objects"]) == len(found)
        assert answered["notice"] == "Not for clinical use."
        listed = {each["task"]: each["target"] for each in client.get("/v1/tasks").json()}
        assert listed == {"cells": "boxes", "pets": "multiclass"}
        wrong = client.post(
            "/models/cells", json={"inputs": "aGk=", "parameters": {"threshold": "high"}}
        )
        assert wrong.status_code == 400 and "threshold" in wrong.json()["error"]
        broken = client.post("/models/cells", content=b"no image", headers=RAW)
        assert broken.status_code == 415
        assert client.post("/models/pets", content=png(), headers=RAW).status_code == 200
        put(folder, "cells", "vpt_deep_vit")  # of another kind now
        assert client.post("/v1/reload").json()["replaced"] == ["cells"]
        assert client.get("/v1/tasks/cells").json()["target"] == "multiclass"
        (folder / "cells.safetensors").unlink()
        assert client.post("/v1/reload").json()["removed"] == ["cells"]
