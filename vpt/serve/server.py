"""`vpt serve`: the application on a port, until SIGTERM has been answered."""

import asyncio
import ctypes
import ipaddress
import logging
import select
import signal
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vpt import artifact, backbones
from vpt.backbones.base import Backbone
from vpt.errors import InputError
from vpt.progress import Log
from vpt.serve.app import create_app
from vpt.serve.edge import Served
from vpt.serve.limits import Limits, Tenant, read_tokens
from vpt.serve.service import Service
from vpt.settings import apply_overrides, validate


def serve(
    folder: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    tokens: Path | None = None,
    checkpoint: str | None = None,
    overrides: Sequence[str] = (),
    log: Log = print,
) -> None:
    """Serve the artefacts of `folder` until SIGTERM or SIGINT.

    Args:
        folder: holds NAME.safetensors of each task, all of one backbone.
        host: an address of this machine; other than loopback needs tokens.
        port: 0 is any that is free.
        tokens: a file as `read_tokens` reads.
        checkpoint: the backbone's weights, where they have moved.
        overrides: `Limits` as KEY=VALUE.
        log: takes lines for the user.

    Raises:
        InputError: no such folder, nothing in it that can be served, a limit or a token that is
            wrong, an open address without tokens.
    """
    limits = validate(Limits, apply_overrides(Limits, {}, overrides), where="vpt serve")
    tenants = read_tokens(tokens) if tokens else None
    check_address(host, tenants)
    service = Service(folder, load_backbone(folder, checkpoint), limits)
    for name, reason in service.loaded["refused"].items():
        log(f"{name}: left out: {reason}")
    if not service.tasks.versions:
        raise InputError(f"{folder}: none of its artefacts can be served")
    show_log()
    with listen(host, port) as listening:
        port = listening.getsockname()[1]
        listening.listen()  # whoever reads the address can connect
        log(f"{len(service.tasks.versions)} tasks on http://{host}:{port}")
        make_server(service, create_app(service, tenants)).run([listening])


def load_backbone(folder: Path, checkpoint: str | None) -> Backbone:
    """The backbone of the first artefact of `folder` that can be read, on the GPU if there is one.

    Raises:
        InputError: as `backbone_settings` and `backbones.load`.
    """
    settings = backbone_settings(folder)
    backbone = backbones.load(settings["name"], checkpoint or settings.get("checkpoint"))
    return backbone.to("cuda" if torch.cuda.is_available() else "cpu")


def backbone_settings(folder: Path) -> dict[str, Any]:
    """Name and checkpoint of the backbone of the first artefact of `folder` that can be read.

    Raises:
        InputError: there is none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    reasons = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            _, metadata = artifact.read(path)
        except InputError as error:
            reasons.append(str(error))
            continue
        settings = artifact.backbone_settings(metadata)
        if "name" in settings:
            return settings
        reasons.append(f"{path}: does not know its backbone's name")
    raise InputError(reasons[0] if reasons else f"{folder}: no NAME.safetensors in it")


def make_server(service: Served, app: Any) -> "Server":
    """The server of `app`, not yet running: give its `run` sockets that listen."""
    seconds = service.limits.body_seconds

    class Protocol(_PatientProtocol):
        head_seconds = seconds

    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,  # its lines have paths
        server_header=False,
    )
    return Server(config, service)


class Server(uvicorn.Server):
    """Stops by steps: not ready any more, no new connections, all requests answered.

    A connection counts as taken once the kernel has completed it.
    """

    def __init__(self, config: uvicorn.Config, service: Served) -> None:
        super().__init__(config)
        self.service = service

    async def startup(self, sockets: list | None = None) -> None:
        """Take connections, and SIGHUP as `POST /v1/reload`."""
        await super().startup(sockets)
        self.loop = asyncio.get_running_loop()
        if signal.getsignal(signal.SIGTERM) == self.handle_exit:  # in a thread there are no signals
            self.loop.add_signal_handler(signal.SIGHUP, self._reload)

    def _reload(self) -> None:
        self._reloading = self.loop.create_task(self.service.reload())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Fail /readyz at once, and stop when a balancer has had time to see it, or is told again.

        The signal is not raised again, so that the process ends with 0.
        """
        if not self.service.ready or not self.started:
            self.should_exit = True
            return
        self.service.ready = False
        self.loop.call_soon_threadsafe(self._stop_later)

    def _stop_later(self) -> None:
        self.loop.call_later(self.service.limits.drain_seconds, setattr, self, "should_exit", True)

    async def shutdown(self, sockets: list | None = None) -> None:
        """Take the connections that wait, and no more; answer all, and end."""
        self.service.ready = False
        waiting = select.poll()
        for listening in sockets or []:
            _refuse_new(listening)
            waiting.register(listening, select.POLLIN)
        while waiting.poll(0):
            await asyncio.sleep(0)  # a turn of the loop, in which it takes one or all
        for _ in range(10):  # and those in which it sets the last ones up
            await asyncio.sleep(0)
        await super().shutdown(sockets)


class _PatientProtocol(H11Protocol):
    """Closes a connection on which no whole head of a request has come in time."""

    head_seconds: float
    last_seconds = 1.0  # on stopping, for a request that is on its way
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._expect_head()

    def shutdown(self) -> None:
        """Close when the request under way is answered, or one that still comes."""
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(self.last_seconds, self._stop)
        else:
            self._stop()

    def _stop(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    def _expect_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.head_seconds, self._check, self.cycle)

    def _check(self, before: Any) -> None:
        self._timer = None
        if self.cycle is before and not self.transport.is_closing():
            self.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to this address.

    Raises:
        InputError: it can't be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's delay off only for sockets that say they are TCP
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise InputError(f"{host} port {port}: {error.strerror}: give another") from None
    return bound


def check_address(host: str, tenants: Mapping[str, Tenant] | None) -> None:
    """Refuses an address that others can reach, where whoever does sees everything.

    Raises:
        InputError: it is not loopback, and there are no tokens.
    """
    if tenants is None and not _is_loopback(host):
        raise InputError(f"--host {host}: others can reach it: give --tokens FILE")


def _refuse_new(listening: socket.socket) -> None:
    """Have the kernel complete no further connection; those that wait can still be taken.

    It drops what asks for one, so that who asks again after the close is refused. Elsewhere than
    on Linux, connections of the moments before the close are lost.
    """
    if sys.platform == "linux":
        drop = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))  # BPF: keep 0 bytes
        program = struct.pack("HL", 1, ctypes.addressof(drop))
        listening.setsockopt(socket.SOL_SOCKET, 26, program)  # SO_ATTACH_FILTER


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def show_log() -> None:
    """Show the server's log on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("vpt.serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(handler)
        logger.propagate = False  # a handler of the root would say it twice
