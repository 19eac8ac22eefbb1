"""`vpt serve --engine ray`: a real local Ray cluster with two replicas, one of which is killed."""

import asyncio
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import httpx2 as httpx
import psutil
import pytest
import torch
from running import png

import vpt
from vpt import backbones
from vpt.serve.limits import Limits
from vpt.serve.uploads import read_upload

ray = pytest.importorskip("ray", reason="RAY TESTS need ray[serve]")
ray_serve = pytest.importorskip("ray.serve", reason="RAY TESTS need ray[serve]")
cluster_module = pytest.importorskip("vpt.serve.cluster", reason="RAY TESTS need ray[serve]")
PATH = "/v1/tasks/pets/predict"
pytestmark = pytest.mark.slow
RAW = {"content-type": "image/png"}
QUEUE = 4  # requests that a replica takes, and that wait for one
LIMITS = [f"queue={QUEUE}", "images=1", "body_mb=0.1", "drain_seconds=0", "request_seconds=240"]
CLIENTS = QUEUE + 2  # more than one replica takes


def wait_for(true):
    until = time.monotonic() + 240
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


def save(path, seed):
    """Write an artefact; probabilities of "cat" as it gives them one by one."""
    torch.manual_seed(seed)
    model = vpt.attach(backbones.load("tiny_clip"), "vpt_deep", class_names=["cat", "dog"])
    with torch.no_grad():
        model.head.weight.normal_(std=0.1)
    vpt.save(model, path)

    @torch.no_grad()
    def expected(image):
        preprocess = model.backbone.preprocess
        pixels = torch.from_numpy(read_upload(png(image), preprocess, {}))
        return float(model.eval()(preprocess.normalize(pixels[None])).softmax(-1)[0, 0])

    return [expected(image) for image in range(CLIENTS)]


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two cores, as `ray start` would make it."""
    settings = {"num_cpus": 2, "object_store_memory": 80_000_000, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # it is 15: on a busy machine nothing would start
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init("local", log_to_driver=False, **settings)
        patch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        yield
        ray.shutdown()


def command(folder):
    options = ["--engine", "ray", "--replicas", "2", "--port", "0", *LIMITS]
    return [sys.executable, "-m", "vpt.cli", "serve", str(folder), *options]


@pytest.fixture(scope="module")
def served(tmp_path_factory, cluster):
    """(folder, client of the ingress, what is expected of each image)."""
    folder = tmp_path_factory.mktemp("tasks")
    expected = save(folder / "pets.safetensors", 0)
    lines = []
    with subprocess.Popen(command(folder), stderr=subprocess.PIPE, text=True) as server:
        reader = threading.Thread(target=lambda: lines.extend(server.stderr))
        reader.start()
        try:
            wait_for(lambda: server.poll() is not None or any("replicas; " in x for x in lines))
            assert server.poll() is None, lines
            address = next(line for line in lines if "replicas; " in line).split()[-1]
            with httpx.Client(base_url=address, timeout=240) as client:
                yield folder, client, expected
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(240) == 0, lines
            reader.join()
    assert "vpt" not in ray_serve.status().applications


def replicas():
    """Processes of the replicas, once both run."""

    def states():
        deployment = ray_serve.status().applications["vpt"].deployments["Replica"]
        return {state: count for state, count in deployment.replica_states.items() if count}

    wait_for(lambda: states() == {"RUNNING": 2})
    children = psutil.Process().children(recursive=True)
    found = [child for child in children if "ServeReplica:vpt" in "".join(child.cmdline())]
    assert len(found) == 2
    return found


def post(client, image):
    """The answer, once the request is accepted."""
    while (reply := client.post(PATH, content=png(image), headers=RAW)).status_code == 429:
        time.sleep(0.05)
    assert reply.status_code == 200, reply.text
    return reply.json()


def right(answer, expected):
    return answer["images"][0]["probabilities"]["cat"] == pytest.approx(expected, abs=1e-5)


def test_what_a_replica_refuses_the_ingress_answers(served):
    _, client, expected = served
    assert client.get("/readyz").json() == {"status": "ready"}
    assert right(post(client, 0), expected[0])
    assert [task["task"] for task in client.get("/v1/tasks").json()] == ["pets"]
    assert client.post("/v1/tasks/pet/predict", content=png()).status_code == 404
    assert client.post("/v1/tasks/pe%3Fts/predict", content=png()).status_code == 404
    assert client.post(PATH, content=b"no image", headers=RAW).status_code == 415
    assert client.post(PATH, content=bytes(200_000), headers=RAW).status_code == 413
    assert 'status="415"' in client.get("/metrics").text


def test_too_many_requests_are_told_when_to_come_again(served):
    _, client, expected = served
    replies = []

    def ask(number):
        with httpx.Client(base_url=client.base_url, timeout=240) as own:
            while not any(reply.status_code == 429 for _, reply in replies):
                image = number % CLIENTS
                reply = own.post(PATH, content=png(image), headers=RAW)
                replies.append((image, reply))

    with ThreadPoolExecutor(8 * QUEUE) as pool:
        list(pool.map(ask, range(8 * QUEUE)))
    for image, reply in replies:
        assert reply.status_code in (200, 429)
        if reply.status_code == 200:
            assert right(reply.json(), expected[image])
        else:
            assert int(reply.headers["retry-after"]) >= 1


def test_each_replica_sees_a_replaced_artefact(served):
    folder, client, expected = served
    old = post(client, 0)["version"]
    expected[:] = save(folder / "pets.safetensors", 1)
    assert client.post("/v1/reload").status_code == 200
    answers = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        for other in replicas():
            other.suspend()
            try:
                asked = {pool.submit(post, client, image): image for image in range(CLIENTS)}
                first = next(as_completed(asked))  # of the one that runs
                answers.append((asked[first], first.result()))
            finally:
                other.resume()
            answers += [(image, one.result()) for one, image in asked.items()]
    assert all(right(answer, expected[image]) for image, answer in answers)
    assert len({answer["version"] for _, answer in answers} - {old}) == 1


def test_a_killed_replica_loses_no_request(served):
    _, client, expected = served
    victim, _ = replicas()
    done, stop, answers = [0] * CLIENTS, threading.Event(), []

    def ask(image):
        with httpx.Client(base_url=client.base_url, timeout=240) as own:
            while not stop.is_set():
                answers.append((image, post(own, image)))
                done[image] += 1

    with ThreadPoolExecutor(CLIENTS) as pool:
        asking = [pool.submit(ask, image) for image in range(CLIENTS)]
        try:
            wait_for(lambda: all(done))
            victim.suspend()  # until it holds a request
            waits = False
            while not waits:
                before = list(done)
                wait_for(lambda: sum(done) > sum(before) + 20 * CLIENTS)  # noqa: B023
                waits = any(a == b for a, b in zip(before, done, strict=True))
            victim.kill()
            before = list(done)
            wait_for(lambda: all(a < b for a, b in zip(before, done, strict=True)))
        finally:
            stop.set()
        for one in asking:
            one.result()
    assert all(right(answer, expected[image]) for image, answer in answers)


@pytest.mark.parametrize(
    ("error", "calls", "status"),
    [
        (ray.exceptions.RayActorError(), cluster_module.ATTEMPTS, 503),
        (ray_serve.exceptions.BackPressureError(5, 4), 1, 429),
    ],
)
def test_what_is_no_answer_is_told(error, calls, status):
    class Handle:
        calls = 0

        async def remote(self, *_):
            self.calls += 1
            raise error

    handle = Handle()
    scope = dict.fromkeys(cluster_module.SCOPE, "") | {
        **{"type": "http", "method": "POST", "path": PATH, "headers": []},
    }
    answered = asyncio.run(
        cluster_module.ask(cluster_module.Ingress(handle, Limits()).app(), scope, b"an image")
    )
    assert (handle.calls, answered.status) == (calls, status)
    assert b"retry-after" in dict(answered.headers)
