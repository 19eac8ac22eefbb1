"""Requests that are wrong, hostile or too many: each gets its own refusal, and good ones go on."""

import base64
import io
import logging
import os
import socket
import struct
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian
from running import png, put, serving

import vpt
from vpt.serve.limits import Limits, Tenant, read_tokens

RAW = {"content-type": "image/png"}
PATH = "/v1/tasks/pets/predict"
TENANTS = {
    "one": Tenant(token="a" * 20, tasks=["pets", "x-*"]),
    "two": Tenant(token="b" * 20, tasks=["flowers"]),
    "root": Tenant(token="c" * 20, tasks=["*"], admin=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name in ("pets", "flowers", "x-ray"):
        put(folder, name, "vpt_deep_clip")
    return folder


@pytest.fixture(scope="module")
def running(folder):
    with serving(folder, body_mb=1.0, images=3) as running:
        yield running


@pytest.fixture
def client(running):
    yield running[0]
    assert running[0].post(PATH, content=png(), headers=RAW).status_code == 200
    assert running[1].batcher.images == running[1].batcher.bytes == 0


def huge_png(width, height):
    """A whole PNG of zeros, a thousandth of its size."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    packed = zlib.compressobj(9)
    rows = b"".join(packed.compress(bytes(width + 1)) for _ in range(min(height, 64)))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", rows + packed.flush()) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def dicom(syntax=ExplicitVRLittleEndian):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    data.PatientID = "secret-patient"
    data.Modality, data.PhotometricInterpretation = "MR", "MONOCHROME2"
    data.Rows = data.Columns = 40
    data.SamplesPerPixel, data.BitsAllocated, data.BitsStored, data.HighBit = 1, 16, 12, 11
    data.PixelRepresentation, data.PixelData = 0, bytes(range(256)) * 12 + bytes(128)
    file = io.BytesIO()
    pydicom.dcmwrite(file, data, enforce_file_format=True)
    return file.getvalue()


BAD_IMAGES = {
    "truncated": (png()[:-900], 422),
    "nothing": (b"", 400),
    "text": (b"hello" * 100, 415),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415),
    "huge": (huge_png(2**15, 2**15), 422),
    "wide": (huge_png(2**20, 1), 422),
    "deflated": (dicom(DeflatedExplicitVRLittleEndian), 422),
    "half a dicom": (dicom()[:400], 422),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
@pytest.mark.parametrize("form", ["raw", "multipart", "json"])
def test_bad_images(client, name, form):
    data, status = BAD_IMAGES[name]
    if form == "raw":
        reply = client.post(PATH, content=data, headers=RAW)
    elif form == "multipart":
        reply = client.post(PATH, files={"file": ("x", data)})
    else:
        reply = client.post(PATH, json={"inputs": base64.b64encode(data).decode()})
    assert reply.status_code == status, reply.text
    (line,) = reply.json().values()
    assert "\n" not in line
    assert "secret" not in line


def test_dicom(client):
    for kind in ("application/dicom", "application/octet-stream"):
        reply = client.post(PATH, content=dicom(), headers={"content-type": kind})
        assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("text/plain", b"hello", 415),
        ("application/x-www-form-urlencoded", b"a=b", 415),
        ("multipart/form-data", b"hello", 400),
        ("multipart/form-data; boundary=x", b"--x\r\nnothing", 400),
        ("multipart/form-data; boundary=x", b"--x--\r\n", 400),
        ("application/json", b"{", 400),
        ("application/json", b"[" * 100_000, 400),
        ("application/json", b"[]", 400),
        ("application/json", b'{"inputs": 3}', 400),
        ("application/json", b'{"inputs": [3]}', 400),
        ("application/json", b'{"inputs": []}', 400),
        ("application/json", b'{"inputs": "*"}', 400),
        ("application/json", b'{"inputs": "\xff"}', 400),
        ("application/json", b'{"inputs": "AAAA", "parameters": 3}', 400),
    ],
)
def test_bad_bodies(client, kind, body, status):
    reply = client.post(PATH, content=body, headers={"content-type": kind})
    assert reply.status_code == status, reply.text
    assert reply.json().keys() == {"error"}


@pytest.mark.parametrize("parameters", [{"top_k": 0}, {"top_k": "x"}, {"function_to_apply": []}])
def test_bad_parameters(client, parameters):
    inputs = base64.b64encode(png()).decode()
    reply = client.post("/models/pets", json={"inputs": inputs, "parameters": parameters})
    assert reply.status_code == 400


def test_too_many_images_or_bytes(client):
    files = [("file", ("x.png", png(), "image/png"))] * 4
    assert client.post(PATH, files=files).status_code in {400, 413}
    inputs = [base64.b64encode(png()).decode()] * 4
    assert client.post(PATH, json={"inputs": inputs}).status_code == 413
    assert client.post(PATH, content=bytes(1_000_001), headers=RAW).status_code == 413

    def chunks():
        for _ in range(40):
            yield bytes(50_000)

    assert client.post(PATH, content=chunks(), headers=RAW).status_code == 413


@pytest.mark.parametrize(
    "path",
    [
        "/v1/tasks/../../etc/passwd",
        "/v1/tasks/..%2F..%2Fetc%2Fpasswd/predict",
        "/v1/tasks/%2e%2e/predict",
        "/v1/tasks//predict",
        "/v1/tasks/pets%00/predict",
        "/v1/tasks/pets.safetensors/predict",
        "/v1/tasks/" + "x" * 5000 + "/predict",
        "/v1/tasks/%FF%FE/predict",
        "/models/.",
        "//v1/tasks",
    ],
)
def test_path_tricks(running, client, path):
    port = client.base_url.port
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 3\r\n"
    assert raw(port, head.encode() + b"\r\nabc").startswith(b"HTTP/1.1 40")


def raw(port, data, seconds=5, pause=0.3):
    """All that the server answers before it closes, or pauses, or for so long."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(data)
        parts = []
        try:
            while part := connection.recv(65536):
                parts.append(part)
                if b"\r\n\r\n" in part:
                    connection.settimeout(pause)
        except TimeoutError:
            pass
        return b"".join(parts)


@pytest.mark.parametrize(
    "data",
    [b"\x00" * 100, b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 66_000],
)
def test_no_http(client, data):
    """A head over 64 KiB among it, but by little: what is not read resets a connection."""
    assert raw(client.base_url.port, data).startswith(b"HTTP/1.1 400")


def test_slow_bodies_and_heads(client):
    port = client.base_url.port
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    started = time.monotonic()
    answer = raw(port, head.encode() + b"Content-Length: 100\r\n\r\nabc")
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"connection: close" in answer.lower()
    assert raw(port, head.encode()) == b""  # a head without an end: closed
    assert raw(port, b"") == b""
    whole = f"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n{head}"
    assert raw(port, whole.encode(), pause=5).count(b"HTTP/1.1") == 1  # nor a second one
    assert time.monotonic() - started < 12


def test_a_client_that_goes_away(client):
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {10**5}\r\n\r\nabc"
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", client.base_url.port)) as connection:
            connection.sendall(head.encode())
    time.sleep(0.3)


def test_tenants_see_their_own_tasks(folder):
    with serving(folder, tenants=TENANTS) as (client, _, _):

        def status(token, path, method="POST"):
            value = b"Bearer " + token.encode()
            body = {"content": png()} if method == "POST" else {}
            headers = {"authorization": value, "content-type": "image/png"}
            return client.request(method, path, headers=headers, **body)

        one, two, root = (tenant.token for tenant in TENANTS.values())
        assert status(one, PATH).status_code == 200
        assert status(one, "/models/x-ray").status_code == 200
        hidden = status(two, PATH)
        assert hidden.status_code == 404
        assert hidden.json() == status(two, "/v1/tasks/none/predict").json()
        assert [t["task"] for t in status(one, "/v1/tasks", "GET").json()] == ["pets", "x-ray"]
        assert [t["task"] for t in status(two, "/v1/tasks", "GET").json()] == ["flowers"]
        assert status(two, "/v1/tasks/pets", "GET").status_code == 404
        for path, method in (("/metrics", "GET"), ("/v1/reload", "POST")):
            assert status(one, path, method).status_code == 403
            assert status(root, path, method).status_code == 200
        for bad in ("-", "a", "a" * 19, "a" * 21, "é", "a" * 20 + " b"):
            reply = status(bad, PATH)
            assert reply.status_code == 401
            assert reply.headers["www-authenticate"] == "Bearer"
        basic = {"authorization": "Basic " + one}
        assert client.post(PATH, content=png(), headers=basic).status_code == 401
        assert client.get("/v1/tasks").status_code == 401
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200


def test_a_full_server_refuses_before_the_body(folder):
    with serving(folder, queue=4, images=4, body_seconds=3.0) as (client, service, _):
        port = client.base_url.port
        gate = threading.Event()
        run = service.batcher.run
        service.batcher.run = lambda items: (gate.wait(10), run(items))[1]
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(client.post, PATH, content=png(), headers=RAW) for _ in range(4)]
            while service.batcher.images < 4:
                time.sleep(0.01)
            started = time.monotonic()
            # the body never comes
            head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n"
            with socket.create_connection(("127.0.0.1", port), timeout=3) as connection:
                connection.sendall(head.encode())
                answer = connection.recv(65536)
            assert time.monotonic() - started < 1
            assert answer.startswith(b"HTTP/1.1 429")
            assert b"retry-after: 1" in answer.lower()
            # who sends it all the same is not cut off before having read that
            body = bytes(15 * 10**6)
            head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            assert raw(port, head.encode() + body).startswith(b"HTTP/1.1 429")
            gate.set()
            assert [future.result().status_code for future in asked] == [200] * 4
        assert client.post(PATH, content=png(), headers=RAW).status_code == 200


def test_bodies_are_bounded_together(folder):
    with (
        serving(folder, body_mb=1.0, bodies_mb=1.5) as (client, service, _),
        service.batcher.admit(1, 10**6),
    ):
        assert client.post(PATH, content=bytes(900_000), headers=RAW).status_code == 429
        assert client.post(PATH, content=png(), headers=RAW).status_code == 200


def test_an_answer_in_time_or_none(folder):
    with serving(folder, request_seconds=0.3) as (client, service, _):
        run = service.batcher.run
        service.batcher.run = lambda items: (time.sleep(0.6), run(items))[1]
        reply = client.post(PATH, content=png(), headers=RAW)
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        assert service.batcher.images == 0


WATCHING = []
sys.addaudithook(lambda event, arguments: [watch(event, arguments) for watch in WATCHING])


def test_nothing_is_written_to_disk(folder):
    opened = []

    def forbid(event, arguments):
        if event == "open" and isinstance(arguments[0], str):
            flags = arguments[2] or 0
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                opened.append(arguments[0])

    big = png(size=(900, 900))
    assert len(big) > 2 * 10**6
    with serving(folder) as (client, _, _):
        client.post(PATH, content=png(), headers=RAW)
        WATCHING.append(forbid)
        try:
            for _ in range(2):
                assert client.post(PATH, content=big, headers=RAW).status_code == 200
                assert client.post(PATH, files={"file": ("x.png", big)}).status_code == 200
                inputs = base64.b64encode(big).decode()
                assert client.post(PATH, json={"inputs": inputs}).status_code == 200
                tiff = png(size=(900, 900), kind="TIFF", compression="tiff_lzw")
                assert client.post(PATH, content=tiff, headers=RAW).status_code == 200
                assert client.post(PATH, content=dicom()).status_code == 200
        finally:
            WATCHING.clear()
    assert not opened


def test_no_names_in_logs(folder, caplog):
    caplog.set_level(logging.DEBUG)
    with serving(folder, tenants=TENANTS) as (client, service, _):
        token = {"authorization": "Bearer " + "a" * 20}
        client.post(PATH, content=dicom(), headers=token)
        client.post(PATH, content=dicom()[:500], headers=token)
        client.post(PATH, files={"secret": ("secret-patient.png", png())}, headers=token)
        client.post("/v1/tasks/secret-patient/predict", content=png(), headers=token)
        client.post(PATH + "?patient=secret", content=png(), headers=token)
        client.post("/secret", headers={"authorization": "Bearer secret"})

        def fail(items):
            raise RuntimeError("secret")

        service.batcher.run = fail
        assert client.post(PATH, content=png(), headers=token).status_code == 500
    lines = [r.getMessage() for r in caplog.records if r.name.startswith(("vpt", "uvicorn"))]
    assert any("/v1/tasks/{task}/predict 200" in line for line in lines)
    assert any("RuntimeError at" in line for line in lines)
    for record in caplog.records:
        if not record.name.startswith(("httpx", "httpcore")):  # the client's
            assert "secret" not in record.getMessage() + str(record.exc_info)
            assert "aaaa" not in record.getMessage()


def test_many_requests_of_which_a_tenth_is_hostile(folder):
    """Every good one is answered right, every bad one refused, and memory stays."""
    kinds = [(data, status) for data, status in BAD_IMAGES.values()]
    with serving(folder, body_mb=1.0) as (client, service, _):
        want = client.post(PATH, content=png(), headers=RAW).json()["images"]

        def ask(number):
            data, status = kinds[number // 10 % len(kinds)] if number % 10 == 0 else (png(), 200)
            reply = client.post(PATH, content=data, headers=RAW)
            if reply.status_code == 200:
                (image,) = reply.json()["images"]
                same = image["probabilities"] == pytest.approx(want[0]["probabilities"], abs=1e-5)
                return status == 200 and same
            return reply.status_code == status

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(ask, range(200)))
        before = memory()
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(ask, range(400)))
        assert memory() - before < 64 * 2**20
        assert service.batcher.images == service.batcher.bytes == 0


def memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("", "no tenants"),
        ("one: {token: short, tasks: [a]}", "one.token"),
        ("one: {token: 12345678901234567890, tasks: [a]}", "one.token"),
        ("one: {token: üüüüüüüüüüüüüüüüüüüü, tasks: [a]}", "one.token"),
        ("one: {tasks: [a]}", "one.token"),
        ("one: x", "one.token"),
        ("one: {token: aaaaaaaaaaaaaaaaaaaa, tasks: []}", "tasks"),
        ("one: {token: aaaaaaaaaaaaaaaaaaaa, task: [a]}", "task"),
        (
            "one: {token: aaaaaaaaaaaaaaaaaaaa, tasks: [a]}\n"
            "two: {token: aaaaaaaaaaaaaaaaaaaa, tasks: [a]}",
            "two.token",
        ),
    ],
)
def test_bad_token_files(tmp_path, text, culprit):
    path = tmp_path / "tokens.yaml"
    path.write_text(text)
    with pytest.raises(vpt.InputError, match=culprit) as error:
        read_tokens(path)
    assert "aaaa" not in str(error.value)
    assert "short," not in str(error.value)


def test_limits_that_let_nothing_in():
    with pytest.raises(ValueError, match="images is more than queue"):
        Limits(queue=3)
