"""`vpt bench serve`: a server on loopback under a load of its capacity, half and twice of it."""

import io
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import timm
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from vpt import artifact, backbones, methods
from vpt.bench.load import Reply, load
from vpt.errors import InputError
from vpt.files import write_atomically
from vpt.serve.limits import Limits

BACKBONE = "vit_base_patch32_224"
TOKEN = "of-this-benchmark-alone"
LIMITS = Limits(queue=64, body_seconds=2, drain_seconds=0)
TOLERANCE = 1e-4  # of probabilities, between batches


class Sizes(NamedTuple):
    """How much is measured."""

    backbone: str
    tasks: int
    requests: int  # of each load
    mixed: int  # of which a tenth is hostile


SMALL, FULL = Sizes("tiny_clip", 4, 300, 100), Sizes(BACKBONE, 256, 1000, 10_000)


def bench(out: Path, small: bool) -> None:
    """Write out/serve.json and show its table.

    Raises:
        InputError: an answer that is wrong, or a hostile request without its refusal.
    """
    sizes = SMALL if small else FULL
    cores = sorted(os.sched_getaffinity(0))
    own = cores[-1] if len(cores) > 1 else None
    with TemporaryDirectory() as folder:
        names = _write_tasks(Path(folder), sizes)
        with _server(Path(folder), set(cores) - {own}) as (process, port):
            rows = list(_measure(process, port, names, sizes, own))
    result = {"suite": "serve", "backbone": sizes.backbone, "tasks": sizes.tasks, "rows": rows}
    result |= {"server_cores": len(set(cores) - {own}), "torch": torch.__version__}
    write_atomically(out / "serve.json", json.dumps(result, indent=2).encode())
    table = Table("load", "images/s", "answered", "429", "p50 ms", "p99 ms", "bound", "429 p99 ms")
    for row in rows:
        numbers = (row[key] for key in _COLUMNS)
        table.add_row(row["load"], *("" if n is None else f"{n:.4g}" for n in numbers))
    Console().print(table)


_COLUMNS = ("rate", "answered", "refused", "p50_ms", "p99_ms", "bound_ms", "refused_p99_ms")


def _measure(
    process: subprocess.Popen, port: int, names: Sequence[str], sizes: Sizes, core: int | None
) -> Iterator[dict[str, Any]]:
    body = _jpeg()
    rng = random.Random(0)
    zipf = [1 / rank for rank in range(1, len(names) + 1)]

    def requests(count: int, weights: Sequence[float] | None = None) -> list[bytes]:
        chosen = rng.choices(names, weights, k=count)
        return [_request(f"/v1/tasks/{name}/predict", body) for name in chosen]

    for first in range(0, len(names), LIMITS.queue):  # each is loaded before it is timed
        some = names[first : first + LIMITS.queue]
        load(port, [_request(f"/v1/tasks/{name}/predict", body) for name in some], None, core)
    at_once = load(port, requests(min(LIMITS.queue, sizes.requests)), None, core)
    capacity = len(at_once) / max(reply.finished for reply in at_once)
    yield _row("all at once", capacity, at_once, None)
    bound = LIMITS.latency_ms / 1e3 + (LIMITS.queue + LIMITS.batch) / capacity
    for label, weights in (("half, uniform", None), ("half, Zipf", zipf)):
        replies = load(port, requests(sizes.requests, weights), capacity / 2, core)
        yield _row(label, capacity / 2, replies, None)
    replies = load(port, requests(sizes.requests, zipf), capacity * 2, core)
    yield _row("twice", capacity * 2, replies, bound)
    yield _mixed(process, port, names, sizes.mixed, capacity / 2, core)


def _row(label: str, rate: float, replies: Sequence[Reply], bound: float | None) -> dict[str, Any]:
    seconds = {status: [r.seconds for r in replies if r.status == status] for status in (200, 429)}
    lost = [reply.status for reply in replies if reply.status not in seconds]
    if lost:
        raise InputError(f"{label}: {len(lost)} requests were answered {sorted(set(lost))}")
    return {
        "load": label,
        "rate": rate,
        "answered": len(seconds[200]),
        "refused": len(seconds[429]),
        "p50_ms": _percentile(seconds[200], 50),
        "p99_ms": _percentile(seconds[200], 99),
        "bound_ms": bound and bound * 1e3,
        "refused_p99_ms": _percentile(seconds[429], 99),
    }


def _percentile(seconds: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(seconds, percent)) * 1e3 if seconds else None


def _mixed(
    process: subprocess.Popen,
    port: int,
    names: Sequence[str],
    count: int,
    rate: float,
    core: int | None,
) -> dict[str, Any]:
    """A tenth of the requests is hostile: each answer is checked, and the memory of the server."""
    body, path = _jpeg(), f"/v1/tasks/{names[0]}/predict"
    good = _request(path, body)
    hostile = _hostile(path, body)
    (reference,) = load(port, [good], None, core)
    sent = [
        hostile[number // 10 % len(hostile)] if number % 10 == 0 else (good, 200)
        for number in range(count)
    ]
    before = _resident_mb(process)
    replies = load(port, [request for request, _ in sent], rate, core)
    for (request, status), reply in zip(sent, replies, strict=True):
        if reply.status != status:
            line = request.split(b"\r\n")[0].decode(errors="replace")[:80]
            raise InputError(f"{line}: answered {reply.status}, not {status}")
        if status == 200 and not _same(reply, reference):
            raise InputError("a good request has another answer than alone")
    row = _row("a tenth hostile", rate, [r for r in replies if r.status == 200], None)
    return row | {"hostile": count // 10, "grown_mb": _resident_mb(process) - before}


def _same(reply: Reply, reference: Reply) -> bool:
    one, other = (json.loads(r.body)["images"][0]["probabilities"] for r in (reply, reference))
    return all(abs(one[name] - other[name]) < TOLERANCE for name in other)


def _hostile(path: str, body: bytes) -> list[tuple[bytes, int]]:
    """Requests, each with the status that it has to get."""
    bomb = io.BytesIO()
    Image.new("L", (2**15, 2**14)).save(bomb, "PNG")
    late = _request(path, body)
    return [
        (_request(path, body[: len(body) // 2]), 422),
        (_request(path, bomb.getvalue()), 422),
        (_request(path, b"no image" * 99), 415),
        (_request(path, body, kind="text/html"), 415),
        (_request(path, body, token="x" * 20), 401),
        (_request("/v1/tasks/..%2f..%2fetc%2fpasswd/predict", body), 404),
        (_request(path, b"", length=10**10), 413),
        (late[: len(late) - len(body) // 2], 408),  # the rest never comes
    ]


def _request(
    path: str, body: bytes, kind: str = "image/jpeg", token: str = TOKEN, length: int | None = None
) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Authorization: Bearer {token}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body) if length is None else length}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((320, 280)).save(file, "JPEG", quality=90)
    return file.getvalue()


def _write_tasks(folder: Path, sizes: Sizes) -> list[str]:
    """Random prompts on a backbone that `vpt serve` finds by their names."""
    torch.manual_seed(0)
    checkpoint = None
    if sizes.backbone != "tiny_clip":
        checkpoint = str(folder / "weights" / "backbone.safetensors")
        Path(checkpoint).parent.mkdir()
        model = timm.create_model(sizes.backbone, num_classes=0)
        safetensors.torch.save_file(model.state_dict(), checkpoint)
    backbone = backbones.load(sizes.backbone, checkpoint)
    names = [f"task{number}" for number in range(sizes.tasks)]
    for name in names:
        model = methods.attach(backbone, "vpt_deep", num_classes=10)
        artifact.save(model, folder / f"{name}.safetensors")
    (folder / "tokens.yaml").write_text(f'all: {{token: {TOKEN}, tasks: ["*"], admin: true}}')
    return names


@contextmanager
def _server(folder: Path, cores: set[int]) -> Iterator[tuple[subprocess.Popen, int]]:
    """`vpt serve` on these cores, and its port."""
    limits = [f"{key}={value:g}" for key, value in LIMITS.model_dump(exclude_defaults=True).items()]
    command = [sys.executable, "-m", "vpt.cli", "serve", str(folder), "--port", "0", *limits]
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--tokens", str(folder / "tokens.yaml")],
            stderr=file,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
            env={**os.environ, "OMP_NUM_THREADS": str(len(cores))},
        )
    try:
        while not (found := re.search(r"tasks on http://127.0.0.1:(\d+)", log.read_text())):
            if process.poll() is not None:
                raise InputError(f"vpt serve ended: {log.read_text()[-200:].strip()}")
            time.sleep(0.1)
        yield process, int(found[1])
    finally:
        process.terminate()
        code = process.wait(60)
    if code:
        raise InputError(f"vpt serve ended with {code}")


def _resident_mb(process: subprocess.Popen) -> float:
    text = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1e3
