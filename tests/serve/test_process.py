"""`vpt serve` as a process: how it starts, reads its folder again, and stops."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import httpx2 as httpx
import pytest
import torch
from running import png, put, serving
from tiny import vpt_cli

import vpt
from vpt import backbones
from vpt.serve.server import _PatientProtocol, _refuse_new, listen

RAW = {"content-type": "image/png"}
PATH = "/v1/tasks/pets/predict"


@pytest.fixture
def cli(capfd, monkeypatch):
    return partial(vpt_cli, capfd, monkeypatch)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "tasks"
    save(folder / "pets.safetensors", 0)
    return folder


def save(path, seed):
    torch.manual_seed(seed)
    model = vpt.attach(backbones.load("tiny_clip"), "vpt_deep", class_names=["cat", "dog"])
    vpt.save(model, path)


@contextmanager
def process(folder, *arguments):
    """(process, client, lines of stderr) of `vpt serve`, which must end by itself within a time."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vpt.cli", "serve", folder, "--port", port, *arguments]
    server = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(server.stderr), daemon=True)
    reader.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            until = time.monotonic() + 120
            while time.monotonic() < until and server.poll() is None:
                try:
                    client.get("/readyz")
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            assert server.poll() is None, lines
            yield server, client, lines
    finally:
        if server.poll() is None:
            server.kill()
        server.wait(20)
        reader.join(5)


def test_a_stopping_server_answers_what_it_accepted(folder):
    limits = ["drain_seconds=1", "latency_ms=50"]
    with process(folder, *limits) as (server, client, lines):
        stop, statuses = threading.Event(), []

        def ask(seed):
            with httpx.Client(base_url=client.base_url, timeout=30) as own:
                while not stop.is_set():
                    try:
                        reply = own.post(PATH, content=png(seed), headers=RAW)
                    except httpx.ConnectError:
                        return  # only who has no connection gets no answer
                    statuses.append(reply.status_code)

        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask, seed) for seed in range(4)]
            while len(statuses) < 8:
                time.sleep(0.05)
            # one is under way for as long as it takes
            late = socket.create_connection(("127.0.0.1", client.base_url.port), timeout=30)
            body = png()
            head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            late.sendall(head.encode() + body[:100])
            server.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert client.get("/readyz").status_code == 503
            assert client.get("/healthz").status_code == 200
            assert client.post(PATH, content=png(), headers=RAW).status_code == 200
            time.sleep(1.2)
            late.sendall(body[100:])
            assert late.recv(65536).startswith(b"HTTP/1.1 200")
            late.close()
            for future in asked:
                future.result()
            stop.set()
        assert server.wait(20) == 0
        assert set(statuses) == {200}
    assert not any("Traceback" in line for line in lines), lines
    answered = [line for line in lines if re.search(r"POST /v1/tasks/\{task\}/predict 200", line)]
    assert len(answered) == len(statuses) + 2


def test_who_was_connected_when_the_server_stopped_is_answered(tmp_path, monkeypatch):
    monkeypatch.setattr(_PatientProtocol, "last_seconds", 20.0)
    put(tmp_path, "pets", "vpt_deep_clip")
    with serving(tmp_path, body_seconds=30) as (client, _, server):
        address = "127.0.0.1", client.base_url.port
        idle = [socket.create_connection(address, timeout=30) for _ in range(3)]
        server.should_exit = True
        refused = False
        while not refused:  # all that were connected are answered, be it the last moment
            try:
                idle.append(socket.create_connection(address, timeout=30))
            except ConnectionRefusedError:
                refused = True
        assert len(idle) > 3
        for connection in idle:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            connection.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can")
def test_no_connection_is_completed_that_nobody_takes():
    with listen("127.0.0.1", 0) as listening:
        listening.listen()
        early = socket.create_connection(listening.getsockname())
        _refuse_new(listening)
        with pytest.raises(TimeoutError):
            socket.create_connection(listening.getsockname(), timeout=0.2)
        taken, _ = listening.accept()
        early.sendall(b"x")
        assert taken.recv(1) == b"x"
        early.close()
        taken.close()


def test_sighup_reads_the_folder_again(folder):
    with process(folder, "drain_seconds=0") as (server, client, lines):
        before = client.get("/v1/tasks/pets").json()["version"]
        save(folder / "pets.safetensors", 1)
        save(folder / "flowers.safetensors", 2)
        server.send_signal(signal.SIGHUP)
        until = time.monotonic() + 20
        while len(client.get("/v1/tasks").json()) < 2:
            assert time.monotonic() < until, lines
            time.sleep(0.05)
        assert client.get("/v1/tasks/pets").json()["version"] != before
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org", "192.0.2.1", ""])
def test_an_open_address_needs_tokens(folder, cli, host):
    code, _, err = cli("serve", folder, "--host", host)
    assert code == 1
    assert "--tokens" in err
    assert err.count("\n") == 1


def test_what_cannot_be_served(tmp_path, folder, cli):
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.safetensors").write_bytes(b"nothing")
    for arguments, culprit in (
        ([tmp_path / "none"], "no such folder"),
        ([empty], "no NAME.safetensors"),
        ([broken], "not a safetensors file"),
        ([folder, "queues=3"], "did you mean 'queue'"),
        ([folder, "queue=0"], "queue=0"),
        ([folder, "queue"], "not key=value"),
        ([folder, "--tokens", tmp_path / "none.yaml"], "no such file"),
    ):
        code, _, err = cli("serve", *arguments)
        assert code == 1, arguments
        assert culprit in err
        assert err.count("\n") == 1, err


def test_a_port_that_is_taken(folder, cli):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = cli("serve", folder, "--port", taken.getsockname()[1])
    assert code == 1
    assert "in use" in err.splitlines()[-1]


def test_what_is_missing_for_ray_is_an_extra(folder, cli, monkeypatch):
    monkeypatch.delitem(sys.modules, "vpt.serve.cluster", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = cli("serve", folder, "--engine", "ray")
    assert code == 1
    assert err == "vpt: vpt serve needs ray: pip install 'visual-prompt-tuning[serve-ray]'\n"
