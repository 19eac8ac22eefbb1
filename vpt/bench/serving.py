"""The server's part of `vpt bench serve`: on loopback, under half and twice its capacity."""

import functools
import io
import json
import math
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
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from vpt import artifact, backbones, methods
from vpt.bench.load import Reply, load
from vpt.errors import InputError
from vpt.files import write_atomically
from vpt.serve.limits import Limits

TOKEN = "of-this-benchmark-alone"
LIMITS = Limits(queue=64, body_seconds=2, request_seconds=600, drain_seconds=0)
ROOMY = LIMITS.model_copy(update={"queue": 10_000})  # refuses no good request
TOLERANCE = 1e-4  # of probabilities, between batches
GROWTH_MB = 20  # of the server's memory over the hostile load, the first tenth of it apart


class Sizes(NamedTuple):
    """How much is measured."""

    backbone: str
    tasks: int
    requests: int  # of each load
    mixed: int  # a tenth of them hostile, to a server of the embedded CLIP


SMALL = Sizes("tiny_clip", 4, 300, 100)
FULL = Sizes("vit_tiny_patch16_224", 256, 600, 10_000)


class Running(NamedTuple):
    """A server, and the core that its load comes from."""

    process: subprocess.Popen
    port: int
    names: list[str]
    core: int | None

    def send(self, requests: Sequence[bytes], rate: float | None = None) -> list[Reply]:
        """Replies to requests at so many a second; None: at once."""
        return load(self.port, requests, rate, self.core)

    def draw(self, count: int, weights: Sequence[float] | None = None) -> list[bytes]:
        """Requests to tasks drawn at random."""
        names = random.Random(0).choices(self.names, weights, k=count)
        return [_request(f"/v1/tasks/{name}/predict", _jpeg()) for name in names]

    def burst(self) -> tuple[list[Reply], float]:
        """Replies to a full queue, and images a second."""
        replies = self.send(self.draw(LIMITS.queue))
        return replies, len(replies) / max(reply.finished for reply in replies)


def bench(out: Path, small: bool) -> list[str]:
    """Bounds that are broken, a line each; writes out/serve.json and shows its table.

    Raises:
        InputError: a wrong answer, or a hostile request without its refusal.
    """
    sizes = SMALL if small else FULL
    cores = sorted(os.sched_getaffinity(0))
    core = cores[-1] if len(cores) > 1 else None
    others = set(cores) - {core}
    with _running(sizes.backbone, sizes.tasks, LIMITS, others, core) as server:
        rows = list(_loads(server, sizes.requests))
    with _running("tiny_clip", 4, ROOMY, others, core) as server:
        rows.append(_mixed(server, sizes.mixed))
    result = {"suite": "serve", "backbone": sizes.backbone, "tasks": sizes.tasks, "rows": rows}
    result |= {"server_cores": len(others), "torch": torch.__version__}
    write_atomically(out / "serve.json", json.dumps(result, indent=2).encode())
    title = f"{sizes.tasks} tasks on {sizes.backbone}, {len(others)} cores"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("load", no_wrap=True)
    for heading, _ in _COLUMNS:
        table.add_column(heading, justify="right")
    for row in rows:
        numbers = (row.get(key) for _, key in _COLUMNS)
        table.add_row(row["load"], *map(_shown, numbers))
    Console().print(table)
    return [] if small else broken(rows)


def _shown(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:.3g}" if number < 10 else f"{number:.0f}"


_COLUMNS = (
    ("a second", "rate"),
    ("200", "answered"),
    ("429", "refused"),
    ("p50 ms", "p50_ms"),
    ("p99", "p99_ms"),
    ("bound", "bound_ms"),
    ("429's p99", "refused_p99_ms"),
    ("MB grown", "grown_mb"),
)


def broken(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each bound of `rows` that is broken."""
    lines = [
        f"server, {row['load']}: p99 {row['p99_ms']:.0f} ms, above {row['bound_ms']:.0f} ms"
        for row in rows
        if row["p99_ms"] > (row["bound_ms"] or math.inf)
    ]
    return lines + [
        f"server, {row['load']}: {row['grown_mb']:.0f} MB grown, above {GROWTH_MB} MB"
        for row in rows
        if row.get("grown_mb", 0) > GROWTH_MB
    ]


def _loads(server: Running, count: int) -> Iterator[dict[str, Any]]:
    for first in range(0, len(server.names), LIMITS.queue):  # each is loaded before it is timed
        some = server.names[first : first + LIMITS.queue]
        server.send([_request(f"/v1/tasks/{name}/predict", _jpeg()) for name in some])
    replies, capacity = server.burst()
    yield _row("all at once", capacity, replies)
    zipf = [1 / rank for rank in range(1, len(server.names) + 1)]
    replies = server.send(server.draw(count, zipf), capacity * 2)
    slowest = min(capacity, server.burst()[1])  # other work on the machine may have come or gone
    bound = LIMITS.latency_ms / 1e3 + (LIMITS.queue + LIMITS.batch) / slowest
    yield _row("twice, Zipf", capacity * 2, replies, bound)
    for label, weights in (("half, uniform", None), ("half, Zipf", zipf)):
        replies = server.send(server.draw(count, weights), capacity / 2)
        yield _row(label, capacity / 2, replies)


def _row(
    label: str, rate: float, replies: Sequence[Reply], bound: float | None = None
) -> dict[str, Any]:
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


def _mixed(server: Running, count: int) -> dict[str, Any]:
    """A tenth of the requests is hostile: each answer is checked, and the server's memory."""
    body, path = _jpeg(), f"/v1/tasks/{server.names[0]}/predict"
    good = _request(path, body)
    hostile = _hostile(path, body)
    (reference,) = server.send([good])
    rate = server.burst()[1] / 2
    sent = [
        hostile[number // 10 % len(hostile)] if number % 10 == 0 else (good, 200)
        for number in range(count)
    ]
    replies = server.send([request for request, _ in sent[: count // 10]], rate)
    before = _resident_mb(server.process)
    replies += server.send([request for request, _ in sent[count // 10 :]], rate)
    grown = _resident_mb(server.process) - before
    for (request, status), reply in zip(sent, replies, strict=True):
        if reply.status != status:
            line = request.split(b"\r\n")[0].decode(errors="replace")[:80]
            raise InputError(f"{line}: answered {reply.status}, not {status}")
        if status == 200 and not _same(reply, reference):
            raise InputError("a good request has another answer than alone")
    row = _row("a tenth hostile", rate, [reply for reply in replies if reply.status == 200])
    return row | {"hostile": count // 10, "grown_mb": grown}


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


@functools.cache
def _jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((320, 280)).save(file, "JPEG", quality=90)
    return file.getvalue()


def _write_tasks(folder: Path, name: str, count: int) -> list[str]:
    """Random prompts on a backbone that `vpt serve` finds by their names."""
    torch.manual_seed(0)
    checkpoint = None
    if name != "tiny_clip":
        checkpoint = str(folder / "weights" / "backbone.safetensors")
        Path(checkpoint).parent.mkdir()
        model = timm.create_model(name, num_classes=0)
        safetensors.torch.save_file(model.state_dict(), checkpoint)
    model = methods.attach(backbones.load(name, checkpoint), "vpt_deep", num_classes=10)
    names = [f"task{number}" for number in range(count)]
    for task in names:
        for parameter in model.tunable_parameters().values():
            nn.init.normal_(parameter, std=0.1)
        artifact.save(model, folder / f"{task}.safetensors")
    (folder / "tokens.yaml").write_text(f'all: {{token: {TOKEN}, tasks: ["*"], admin: true}}')
    return names


@contextmanager
def _running(
    name: str, tasks: int, limits: Limits, cores: set[int], core: int | None
) -> Iterator[Running]:
    """`vpt serve` of so many tasks on the backbone called `name`, on these cores."""
    with TemporaryDirectory() as folder:
        names = _write_tasks(Path(folder), name, tasks)
        with _process(Path(folder), limits, cores) as (process, port):
            yield Running(process, port, names, core)


@contextmanager
def _process(
    folder: Path, limits: Limits, cores: set[int]
) -> Iterator[tuple[subprocess.Popen, int]]:
    """`vpt serve` on these cores, and its port."""
    keys = [f"{key}={value:g}" for key, value in limits.model_dump(exclude_defaults=True).items()]
    command = [sys.executable, "-m", "vpt.cli", "serve", str(folder), "--port", "0", *keys]
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
