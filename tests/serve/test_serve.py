"""The calls of a server: answers as the artefacts give them one by one."""

import asyncio
import base64
import io
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from huggingface_hub import InferenceClient
from PIL import Image
from running import png, put, serving
from stored import BACKBONES, FOLDER
from tiny import NAMES

import vpt
from vpt.evaluation.decision import Decision
from vpt.serve.uploads import read_upload

STORED = {
    "pets": "vpt_deep_clip",
    "xray": "decision_clip",
    "flowers": "coop_clip",
    "tags": "multilabel_clip",
    "cache": "tip_adapter_clip",
    "weights": "lora_clip",
    "pixels": "pixel_prompts_clip",
}
RAW = {"content-type": "image/png"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, stored in STORED.items():
        put(folder, name, stored)
    return folder


@pytest.fixture(scope="module")
def running(folder):
    with serving(folder) as running:
        yield running


@pytest.fixture
def client(running):
    return running[0]


@torch.no_grad()
def expected(stored, data):
    """As one by one, with the decision of the artefact."""
    model = vpt.load(FOLDER / f"{stored}.safetensors", BACKBONES["clip"]())
    pixels = torch.from_numpy(read_upload(data, model.backbone.preprocess, model.metadata))
    logits = model(model.backbone.preprocess.normalize(pixels[None]))[0]
    decision = Decision(**model.metadata.get("decision", {}))
    return decision.describe(model.target, logits, model.class_names)


def check(image, stored, data):
    want = expected(stored, data)
    assert image["probabilities"] == pytest.approx(want.pop("probabilities"), abs=1e-5)
    for key in ("probability",):
        if key in want:
            assert image[key] == pytest.approx(want.pop(key), abs=1e-5)
    assert {key: image[key] for key in want} == want
    scores = [label["score"] for label in image["predictions"]]
    assert scores == sorted(scores, reverse=True)
    assert {x["label"]: x["score"] for x in image["predictions"]} == image["probabilities"]


@pytest.mark.parametrize("task", STORED)
def test_a_raw_image(client, task):
    reply = client.post(f"/v1/tasks/{task}/predict", content=png(), headers=RAW)
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    check(answer["images"][0], STORED[task], png())
    assert answer["task"] == task
    assert len(answer["version"]) == 12
    assert answer["calibrated"] == (task == "xray")
    assert "notice" not in answer


def test_several_images_in_multipart_and_json(client):
    files = [png(seed) for seed in range(3)]
    parts = [("file", (f"{i}.png", data, "image/png")) for i, data in enumerate(files)]
    texts = [base64.b64encode(data).decode() for data in files]
    for arguments in ({"files": parts}, {"json": {"inputs": texts}}):
        reply = client.post("/v1/tasks/xray/predict", **arguments)
        assert reply.status_code == 200, reply.text
        for image, data in zip(reply.json()["images"], files, strict=True):
            check(image, STORED["xray"], data)
            assert "set" in image
            assert "refer" in image


def test_many_clients_and_tasks_at_once(running):
    client, service, _ = running
    jobs = [(task, seed) for seed in range(6) for task in STORED]
    before = service.batcher.passes

    def ask(job):
        task, seed = job
        return client.post(f"/v1/tasks/{task}/predict", content=png(seed), headers=RAW)

    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(ask, jobs))
    for (task, seed), reply in zip(jobs, replies, strict=True):
        assert reply.status_code == 200, reply.text
        check(reply.json()["images"][0], STORED[task], png(seed))
    assert service.batcher.passes - before < len(jobs)  # some shared a pass
    assert service.batcher.images == service.batcher.bytes == 0


def test_orientation_of_exif(client):
    upright = Image.open(io.BytesIO(png(size=(40, 80))))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    upright.rotate(90, expand=True).save(turned, "PNG", exif=exif)
    replies = [
        client.post("/v1/tasks/pets/predict", content=data, headers=RAW).json()["images"]
        for data in (png(size=(40, 80)), turned.getvalue())
    ]
    assert replies[0] == replies[1]


def test_hugging_faces_client(client):
    hub = InferenceClient(token="none")
    url = str(client.base_url.join("/models/xray"))
    want = expected(STORED["xray"], png())["probabilities"]
    found = hub.image_classification(png(), model=url)
    assert {x.label: x.score for x in found} == pytest.approx(want, abs=1e-5)
    assert found[0].score == max(x.score for x in found)
    (best,) = hub.image_classification(png(), model=url, top_k=1, function_to_apply="softmax")
    assert best.label == found[0].label
    assert best.score != found[0].score  # without the temperature


def test_zero_shot_with_names_of_the_clients(client):
    names = ["a ship", "a cat"]
    model = vpt.attach(BACKBONES["clip"](), "zero_shot", class_names=names)
    pixels = torch.from_numpy(read_upload(png(), model.backbone.preprocess, {}))
    with torch.no_grad():
        logits = model(model.backbone.preprocess.normalize(pixels[None]))[0]
    want = dict(zip(names, logits.softmax(-1).tolist(), strict=True))
    replies = [
        client.post("/v1/base", params={"classes": names}, content=png(), headers=RAW),
        client.post(
            "/v1/base",
            json={
                "inputs": base64.b64encode(png()).decode(),
                "parameters": {"candidate_labels": names},
            },
        ),
    ]
    for reply in replies:
        (image,) = reply.json()["images"]
        found = {x["label"]: x["score"] for x in image["predictions"]}
        assert found == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize(
    ("names", "status"),
    [(["cat"], 400), (["cat", "cat"], 400), ([], 400), (["x" * 300, "y"], 400), (None, 413)],
)
def test_class_names_that_are_none(client, names, status):
    names = [str(n) for n in range(101)] if names is None else names
    reply = client.post("/v1/base", params={"classes": names}, content=png(), headers=RAW)
    assert reply.status_code == status, reply.text


def test_a_backbone_without_texts(tmp_path):
    put(tmp_path, "pets", "vpt_deep_vit")
    with serving(tmp_path, "vit") as (client, _, _):
        post = {"content": png(), "headers": RAW}
        assert client.post("/v1/tasks/pets/predict", **post).status_code == 200
        reply = client.post("/v1/base?classes=a&classes=b", **post)
        assert reply.status_code == 404


def test_tasks_are_listed_and_described(client):
    listed = client.get("/v1/tasks").json()
    assert [task["task"] for task in listed] == sorted(STORED)
    one = client.get("/v1/tasks/tags").json()
    assert one in listed
    assert one["class_names"] == NAMES
    assert (one["method"], one["target"]) == ("vpt_deep", "multilabel")
    reply = client.get("/v1/tasks/flower")
    assert reply.status_code == 404
    assert "'flowers'" in reply.json()["error"]


def test_health_metrics_and_openapi(client):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}
    client.post("/v1/tasks/pets/predict", content=png(), headers=RAW)
    text = client.get("/metrics").text
    assert 'vpt_requests_total{route="/v1/tasks/{task}/predict",status="200"}' in text
    assert f"vpt_tasks {len(STORED)}" in text
    assert "flowers" not in text
    described = client.get("/openapi.json").json()
    body = described["paths"]["/v1/tasks/{task}/predict"]["post"]["requestBody"]["content"]
    assert body.keys() == {"image/*", "multipart/form-data", "application/json"}
    assert client.get("/docs").status_code == 404  # it would load scripts from elsewhere


def test_medical_data_has_its_notice(tmp_path):
    model = vpt.load(FOLDER / "vpt_deep_vit.safetensors", BACKBONES["vit"]())
    vpt.save(model, tmp_path / "scan.safetensors", medical=True)
    with serving(tmp_path, "vit") as (client, _, _):
        reply = client.post("/v1/tasks/scan/predict", content=png(), headers=RAW).json()
        assert reply["notice"] == client.get("/v1/tasks").json()[0]["notice"] != ""


def test_replaced_under_load_it_is_the_old_or_the_new(tmp_path):
    versions = ["project_clip", "decision_clip"]  # of other logits, and other decisions
    put(tmp_path, "task", versions[0])
    want = [expected(stored, png())["probabilities"] for stored in versions]
    assert want[0] != pytest.approx(want[1], abs=1e-3)
    names = {}
    with serving(tmp_path, batch=1) as (client, _, _):  # a request's images are in many passes
        files = [("file", ("x.png", png(), "image/png"))] * 4

        def ask(_):
            return client.post("/v1/tasks/task/predict", files=files).json()

        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(ask, number) for number in range(120)]
            for number in range(1, 7):
                put(tmp_path, "task", versions[number % 2])
                done = client.post("/v1/reload").json()
                assert not done["refused"]  # a request may have taken the file already
                time.sleep(0.2)
            for future in asked:
                answer = future.result()
                # of the decision's artefact and its prediction sets, all of it or nothing
                new = answer["calibrated"]
                for image in answer["images"]:
                    assert image["probabilities"] == pytest.approx(want[new], abs=1e-5)
                    assert ("set" in image) == new
                names.setdefault(answer["version"], set()).add(new)
    assert len(names) == 2
    assert all(len(kinds) == 1 for kinds in names.values())


def test_reload_adds_removes_and_refuses(tmp_path):
    put(tmp_path, "a", "vpt_deep_clip")
    put(tmp_path, "b", "coop_clip")
    with serving(tmp_path) as (client, _, _):
        post = {"content": png(), "headers": RAW}
        (tmp_path / "b.safetensors").unlink()
        put(tmp_path, "c", "coop_clip")
        put(tmp_path, "other", "vpt_deep_vit")
        (tmp_path / "broken.safetensors").write_bytes(b"nothing")
        (tmp_path / "a.safetensors").write_bytes(b"nothing")
        done = client.post("/v1/reload").json()
        assert (done["added"], done["removed"], done["replaced"]) == (["c"], ["b"], [])
        assert done["refused"].keys() == {"a", "broken", "other"}
        assert [task["task"] for task in client.get("/v1/tasks").json()] == ["a", "c"]
        assert client.post("/v1/tasks/b/predict", **post).status_code == 404
        assert client.post("/v1/tasks/c/predict", **post).status_code == 200


def test_a_file_exchanged_before_it_was_loaded(tmp_path):
    put(tmp_path, "a", "vpt_deep_clip")
    put(tmp_path, "b", "coop_clip")
    with serving(tmp_path) as (client, _, _):
        put(tmp_path, "a", "decision_clip")
        answer = client.post("/v1/tasks/a/predict", content=png(), headers=RAW).json()
        check(answer["images"][0], "decision_clip", png())
        (tmp_path / "b.safetensors").write_bytes(b"nothing")
        reply = client.post("/v1/tasks/b/predict", content=png(), headers=RAW)
        assert reply.status_code == 503


def test_an_item_that_fails_takes_no_other_with_it(running, monkeypatch):
    client, service, _ = running
    bank = service.bank

    class Broken:
        task = bank.task

        def __call__(self, images, tasks):
            if "flowers" in tasks:
                raise RuntimeError("secret")
            return bank(images, tasks)

    monkeypatch.setattr(service, "bank", Broken())
    with ThreadPoolExecutor(8) as pool:
        replies = pool.map(
            lambda task: client.post(f"/v1/tasks/{task}/predict", content=png(), headers=RAW),
            ["pets", "flowers", "xray", "pets"] * 3,
        )
        assert [reply.status_code for reply in replies] == [200, 500, 200, 200] * 3


def test_batches_wait_no_longer_than_they_may():
    from vpt.serve.batching import Batcher

    sizes = []

    def run(items):
        sizes.append(len(items))
        return items

    async def scenario():
        batcher = Batcher(run, batch=4, latency=0.05, max_images=100, max_bytes=100)
        serving = asyncio.create_task(batcher.serve())
        loop = asyncio.get_running_loop()
        with batcher.admit(1, 1):  # alone: at once
            started = loop.time()
            assert await batcher("x") == "x"
            assert loop.time() - started < 0.04
        with batcher.admit(3, 1):  # of three, one never comes
            started = loop.time()
            assert await asyncio.gather(batcher(1), batcher(2)) == [1, 2]
            assert 0.04 < loop.time() - started < 0.5
        with batcher.admit(9, 1):
            assert await asyncio.gather(*map(batcher, range(9))) == list(range(9))
        serving.cancel()

    asyncio.run(scenario())
    assert sizes == [1, 2, 4, 4, 1]
