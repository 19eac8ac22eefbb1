"""`vpt serve --engine ray`: the same application in replicas on a Ray cluster, and an ingress."""

import asyncio
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ray
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from ray import serve as ray_serve
from ray.exceptions import RayActorError, RayError, WorkerCrashedError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
)
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message

from vpt.errors import InputError
from vpt.progress import Log
from vpt.serve.app import create_app
from vpt.serve.batching import Busy
from vpt.serve.edge import REFUSALS, Edge, authorise, in_time, promised_bytes, read_body
from vpt.serve.limits import Limits, Tenant, read_tokens
from vpt.serve.server import (
    backbone_settings,
    check_address,
    listen,
    load_backbone,
    make_server,
    show_log,
)
from vpt.serve.service import Service
from vpt.serve.uploads import Refused
from vpt.settings import apply_overrides, validate

NAME = "vpt"  # of the application on the cluster
DIED = (RayActorError, WorkerCrashedError)
ATTEMPTS = 5  # of a request, which may itself be what replicas die of
SCOPE = (  # of a request, what can travel
    *("type", "asgi", "http_version", "scheme", "method"),
    *("path", "raw_path", "query_string", "headers", "root_path"),
)
_OWN = {b"connection", b"content-length", b"transfer-encoding"}  # each connection has its own


class Answered(NamedTuple):
    """An answer, whole."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Replica:
    """One copy of the backbone, the bank and the application."""

    def __init__(
        self,
        folder: Path,
        checkpoint: str | None,
        limits: Limits,
        tenants: Mapping[str, Tenant] | None,
    ) -> None:
        self.service = Service(folder, load_backbone(folder, checkpoint), limits)
        if not self.service.tasks.versions:
            raise InputError(f"{folder}: none of its artefacts can be served")
        self.app = create_app(self.service, tenants)
        self.reloads = -1  # before the application has started
        self.running = AsyncExitStack()
        self.lock = asyncio.Lock()

    async def __call__(self, scope: dict[str, Any], body: bytes, reloads: int) -> Answered:
        """The application's answer, from the folder as of the `reloads`-th reload, or later."""
        async with self.lock:
            if self.reloads < 0:
                await self.running.enter_async_context(self.app.router.lifespan_context(self.app))
            if self.reloads < reloads:
                await self.service.reload()
                self.reloads = reloads
        return await ask(self.app, scope, body)


async def ask(app: ASGIApp, scope: dict[str, Any], body: bytes) -> Answered:
    """The answer of an ASGI application to one request."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start, *parts = sent
    headers = [(key, value) for key, value in start["headers"] if key not in _OWN]
    return Answered(start["status"], headers, b"".join(part["body"] for part in parts))


class Ingress:
    """Reads each request whole and sends it to a replica; if that one dies, to another.

    A repeated request does no harm: predictions change nothing.

    Attributes:
        ready: False once no more requests are wanted.
        reloads: how often the folder was to be read again; replicas follow.
        bytes: of bodies under way.
    """

    def __init__(
        self, handle: Any, limits: Limits, tenants: Mapping[str, Tenant] | None = None
    ) -> None:
        self.handle, self.limits, self.tenants = handle, limits, tenants
        self.ready, self.reloads, self.bytes = True, 0, 0
        self.registry = CollectorRegistry()

    def app(self) -> Starlette:
        """The application that uvicorn runs."""
        methods = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
        app = Starlette(
            routes=[
                Route("/healthz", self.alive),
                Route("/readyz", self.is_ready),
                Route("/metrics", self.metrics),
                Route("/{path:path}", self.forward, methods=methods),
            ],
            exception_handlers=REFUSALS,
        )
        app.add_middleware(Edge, service=self, registry=self.registry)
        return app

    async def alive(self, request: Request) -> Response:
        """Say that the process runs."""
        return JSONResponse({"status": "ok"})

    async def is_ready(self, request: Request) -> Response:
        """Say whether requests are wanted."""
        status = "ready" if self.ready else "stopping"
        return JSONResponse({"status": status}, 200 if self.ready else 503)

    async def metrics(self, request: Request) -> Response:
        """Prometheus metrics: requests of all replicas."""
        authorise(self.tenants, request, admin=True)
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    async def reload(self) -> None:
        """Let every replica read the folder again before its next answer."""
        self.reloads += 1

    async def forward(self, request: Request) -> Response:
        """A replica's answer."""
        authorise(self.tenants, request)
        with self._room(promised_bytes(request, self.limits)):
            body = await read_body(request, self.limits)
            scope = {key: request.scope[key] for key in SCOPE}
            with in_time():
                # a replica that lives says itself when its time is over, so that comes first
                async with asyncio.timeout(1.5 * self.limits.request_seconds):
                    status, headers, body = await self._ask(scope, body)
        if request.scope["path"] == "/v1/reload" and status == 200:
            await self.reload()
        response = Response(body, status)
        response.raw_headers += headers
        return response

    async def _ask(self, scope: dict[str, Any], body: bytes) -> Answered:
        for attempt in range(ATTEMPTS):
            try:
                return await self.handle.remote(scope, body, self.reloads)
            except DIED:
                await asyncio.sleep(0.1 * 2**attempt)  # the router learns of it meanwhile
            except BackPressureError:
                raise Busy(1) from None
            except DeploymentUnavailableError:
                raise Refused(503, "no replica can start", {"Retry-After": "60"}) from None
        raise Refused(503, "replicas died: try again later", {"Retry-After": "60"})

    @contextmanager
    def _room(self, size: int) -> Iterator[None]:
        if self.bytes + size > 1e6 * self.limits.bodies_mb:
            raise Busy(1)
        self.bytes += size
        try:
            yield
        finally:
            self.bytes -= size


def serve(
    folder: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    tokens: Path | None = None,
    checkpoint: str | None = None,
    overrides: Sequence[str] = (),
    replicas: int = 2,
    log: Log = print,
) -> None:
    """Serve `folder` by replicas on the cluster that runs (`ray start`), else one on this machine.

    Args:
        folder: as `server.serve`; all nodes have it at this path.
        host: of the ingress, which runs in this process.
        port: 0 is any that is free.
        tokens: a file as `read_tokens` reads.
        checkpoint: the backbone's weights, where they have moved.
        overrides: `Limits` of each replica as KEY=VALUE; those of bodies are of the ingress too.
        replicas: how many, each with a core, and a GPU where the cluster has any.
        log: takes lines for the user.

    Raises:
        InputError: as `server.serve`; replicas that can't start.
    """
    limits = validate(Limits, apply_overrides(Limits, {}, overrides), where="vpt serve")
    tenants = read_tokens(tokens) if tokens else None
    check_address(host, tenants)
    backbone_settings(folder)  # whether it can be served at all
    with listen(host, port) as listening:
        if not ray.is_initialized():
            os.environ.setdefault("RAY_worker_niceness", "0")  # 15 is for work that can wait
            ray.init(log_to_driver=False, include_dashboard=False)
        ray_serve.start(http_options={"location": "NoServer"})
        try:
            handle = _start(folder.resolve(), checkpoint, limits, tenants, replicas)
            listening.listen()  # whoever reads the address can connect
            log(f"{replicas} replicas; http://{host}:{listening.getsockname()[1]}")
            show_log()
            ingress = Ingress(handle, limits, tenants)
            make_server(ingress, ingress.app()).run([listening])
        finally:
            ray_serve.delete(NAME)
            ray.shutdown()


def _start(
    folder: Path,
    checkpoint: str | None,
    limits: Limits,
    tenants: Mapping[str, Tenant] | None,
    replicas: int,
) -> Any:
    """A handle on the replicas, once all run."""
    resources = ray.cluster_resources()
    gpus = 1 if resources.get("GPU") else 0
    kind = "GPU" if gpus else "CPU"
    if replicas > (has := resources.get(kind, 0)):
        raise InputError(f"--replicas {replicas}: give {has:g}, the {kind}s of the cluster")
    deployment = ray_serve.deployment(
        num_replicas=replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        max_ongoing_requests=limits.queue,  # the application itself says when there are too many
        max_queued_requests=limits.queue,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=limits.request_seconds,
    )(Replica)
    try:
        application = deployment.bind(folder, checkpoint, limits, tenants)
        return ray_serve.run(application, name=NAME, route_prefix=None)
    except (RuntimeError, RayError, RayServeException):
        said = ray_serve.status().applications[NAME].deployments["Replica"].message.splitlines()
        known = [line.split("InputError: ")[-1] for line in said if "InputError" in line]
        raise InputError(f"replicas of {folder} do not start: {(known or said)[-1]}") from None
