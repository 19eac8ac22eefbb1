"""`vpt serve --engine ray`: a real local Ray cluster with two replicas, one of which is killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx2 as httpx
import psutil
import pytest
import torch
from running import png

import vpt
from vpt import backbones

pytest.importorskip("ray.serve", reason="needs ray[serve]")
RAW = {"content-type": "image/png"}
PATH = "/v1/tasks/pets/predict"


def save(path, seed):
    torch.manual_seed(seed)
    model = vpt.attach(backbones.load("tiny_clip"), "vpt_deep", class_names=["cat", "dog"])
    with torch.no_grad():
        model.head.weight.normal_()
    vpt.save(model, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    return vpt.load(path).fold()


@contextmanager
def cluster(folder, *limits):
    """A client of the ingress, and its process."""
    command = [sys.executable, "-m", "vpt.cli", "serve", folder, "--engine", "ray", "--port", "0"]
    server = subprocess.Popen(
        [*map(str, command), "drain_seconds=0", *limits],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    lines = []
    try:
        for line in server.stderr:
            lines.append(line)
            if "replicas; http://" in line:
                break
        assert server.poll() is None, lines
        threading.Thread(target=lambda: lines.extend(server.stderr), daemon=True).start()
        with httpx.Client(base_url=line.split()[-1], timeout=120) as client:
            while True:
                try:
                    client.get("/readyz")
                    break
                except httpx.ConnectError:
                    time.sleep(0.1)
            yield client, server
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(90) == 0, lines


def replicas():
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "ServeReplica:vpt" in "".join(process.info["cmdline"] or []):
            found.append(process)
    return found


def test_a_killed_replica_loses_no_request_and_all_see_a_new_artefact(tmp_path):
    model = save(tmp_path / "pets.safetensors", 0)
    with cluster(tmp_path) as (client, _):
        version = client.get("/v1/tasks/pets").json()["version"]
        first = replicas()
        assert len(first) == 2
        stop, replies = threading.Event(), []

        def ask(seed):
            with httpx.Client(base_url=client.base_url, timeout=120) as own:
                while not stop.is_set():
                    replies.append((seed, own.post(PATH, content=png(seed), headers=RAW)))

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        while len(replies) < 20:
            time.sleep(0.05)
        first[0].kill()
        after = len(replies) + 40
        while len(replies) < after:
            time.sleep(0.05)
        stop.set()
        for thread in threads:
            thread.join()
        answers = {}
        for seed, reply in replies:
            assert reply.status_code == 200, reply.text
            answers.setdefault(seed, []).append(reply.json()["images"][0]["probabilities"]["cat"])
        for seen in answers.values():  # every one right, whichever replica gave it
            assert max(seen) - min(seen) < 1e-5

        save(tmp_path / "pets.safetensors", 1)
        assert client.post("/v1/reload").json()["replaced"] in (["pets"], [])
        until = time.monotonic() + 60
        while len(replicas()) < 2 and time.monotonic() < until:
            time.sleep(0.2)
        versions = {
            client.post(PATH, content=png(seed), headers=RAW).json()["version"]
            for seed in range(20)
        }
        assert len(versions) == 1
        assert versions != {version}
    assert model.class_names == ["cat", "dog"]


def test_what_a_replica_refuses_the_ingress_answers(tmp_path):
    save(tmp_path / "pets.safetensors", 0)
    with cluster(tmp_path, "queue=1", "images=1", "body_mb=0.1") as (client, _):
        assert client.get("/readyz").status_code == 200
        assert client.post("/v1/tasks/pet/predict", content=png()).status_code == 404
        assert client.post(PATH, content=b"no image", headers=RAW).status_code == 415
        large = client.post(PATH, content=bytes(200_000), headers=RAW)
        assert large.status_code == 413
        statuses = []

        def ask():
            with httpx.Client(base_url=client.base_url, timeout=120) as own:
                for _ in range(5):
                    reply = own.post(PATH, content=png(), headers=RAW)
                    statuses.append(reply.status_code)
                    if reply.status_code == 429:
                        assert int(reply.headers["retry-after"]) >= 1

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200, 429}


def test_replicas_that_cannot_start_are_one_line(tmp_path):
    command = [sys.executable, "-m", "vpt.cli", "serve", tmp_path, "--engine", "ray", "--port", "0"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 1
    assert f"vpt: {tmp_path}: no NAME.safetensors in it" in done.stderr
