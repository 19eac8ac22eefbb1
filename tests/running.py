"""A real server on loopback, in a thread of this process, and images for it."""

import io
import threading
import time
from contextlib import contextmanager

import httpx2 as httpx
import numpy as np
from PIL import Image
from stored import BACKBONES, FOLDER

from vpt.serve.app import create_app
from vpt.serve.limits import Limits
from vpt.serve.server import listen, make_server
from vpt.serve.service import Service

FAST = {"drain_seconds": 0.2, "body_seconds": 1.0}


@contextmanager
def serving(folder, kind="clip", tenants=None, **limits):
    """(client, service, server) of the artefacts in `folder`, until the block ends."""
    service = Service(folder, BACKBONES[kind](), Limits(**FAST | limits))
    server = make_server(service, create_app(service, tenants))
    listening = listen("127.0.0.1", 0)
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        with httpx.Client(base_url=address, timeout=30) as client:
            yield client, service, server
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


def put(folder, name, stored):
    """A stored artefact as the task `name`, exchanged as `vpt.save` does."""
    partial = folder / f".{name}.partial"
    partial.write_bytes((FOLDER / f"{stored}.safetensors").read_bytes())
    return partial.rename(folder / f"{name}.safetensors")


def png(seed=0, size=(40, 36), kind="PNG", **options):
    """A noisy image as a file's bytes."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind, **options)
    return file.getvalue()
