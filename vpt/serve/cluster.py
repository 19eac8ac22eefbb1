"""`vpt serve --engine ray`: the same application in replicas on a Ray cluster, and an ingress."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ray
from prometheus_client import CollectorRegistry
from ray import serve as ray_serve
from ray.exceptions import RayActorError, RayError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vpt.errors import InputError
from vpt.progress import Log
from vpt.serve.app import create_app, in_time
from vpt.serve.batching import Busy
from vpt.serve.edge import Edge, promised_bytes, read_body
from vpt.serve.limits import Limits, Tenant, read_tokens, tenant_of
from vpt.serve.server import check_address, listen, load_backbone, make_server, show_log
from vpt.serve.service import Service
from vpt.serve.uploads import Refused
from vpt.settings import apply_overrides, validate

NAME = "vpt"  # of the application on the cluster
DIED = (RayActorError, WorkerCrashedError)
_OWN = {b"connection", b"content-length", b"transfer-encoding"}  # each connection has its own


class Sent(NamedTuple):
    """A request as a replica gets it, whole."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Answered(NamedTuple):
    """An answer as the ingress gets it, whole."""

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
        self.reloads: int | None = None
        self.running = AsyncExitStack()
        self.lock = asyncio.Lock()

    async def __call__(self, request: Sent, reloads: int) -> Answered:
        """The application's answer, from the folder as the `reloads`-th reload left it or later."""
        async with self.lock:
            if self.reloads is None:
                await self.running.enter_async_context(self.app.router.lifespan_context(self.app))
            if self.reloads != reloads:
                await self.service.reload()
                self.reloads = reloads
        return await ask(self.app, request)


async def ask(app: Any, request: Sent) -> Answered:
    """The answer of an ASGI application to one request."""
    messages = [
        {"type": "http.disconnect"},
        {"type": "http.request", "body": request.body, "more_body": False},
    ]
    found: dict[str, Any] = {"body": b""}

    async def receive() -> dict[str, Any]:
        return messages.pop() if len(messages) > 1 else messages[0]

    async def send(message: Mapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            found.update(status=message["status"], headers=message.get("headers", []))
        else:
            found["body"] += message.get("body", b"")

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "method": request.method,
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query,
        "headers": request.headers,
        "client": None,
        "server": None,
        "root_path": "",
    }
    await app(scope, receive, send)
    headers = [(key, value) for key, value in found["headers"] if key.lower() not in _OWN]
    return Answered(found["status"], headers, found["body"])


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

    def app(self) -> Starlette:
        """The application that uvicorn runs."""
        methods = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
        app = Starlette(
            routes=[
                Route("/healthz", self.alive),
                Route("/readyz", self.is_ready),
                Route("/{path:path}", self.forward, methods=methods),
            ],
            exception_handlers={Refused: _refused, Busy: _busy},
        )
        app.add_middleware(Edge, limits=self.limits, registry=CollectorRegistry())
        return app

    async def alive(self, request: Request) -> Response:
        """Say that the process runs."""
        return JSONResponse({"status": "ok"})

    async def is_ready(self, request: Request) -> Response:
        """Say whether requests are wanted."""
        status = "ready" if self.ready else "stopping"
        return JSONResponse({"status": status}, 200 if self.ready else 503)

    async def reload(self) -> None:
        """Let every replica read the folder again before its next answer."""
        self.reloads += 1

    async def forward(self, request: Request) -> Response:
        """A replica's answer."""
        if tenant_of(self.tenants, request.headers.get("authorization", "")) is None:
            raise Refused(401, "give a token: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
        with self._room(promised_bytes(request, self.limits)):
            body = await read_body(request, self.limits)
            path, query = request.url.path, request.scope["query_string"]
            sent = Sent(request.method, path, query, request.headers.raw, body)
            with in_time():
                # the replica's own limit says more, so it comes first
                async with asyncio.timeout(1.5 * self.limits.request_seconds):
                    answered = await self._ask(sent)
        if path == "/v1/reload" and answered.status == 200:
            await self.reload()
        response = Response(answered.body, answered.status)
        own = [(k, v) for k, v in response.raw_headers if k in _OWN]
        response.raw_headers = [*answered.headers, *own]
        return response

    async def _ask(self, sent: Sent) -> Answered:
        while True:
            try:
                return await self.handle.remote(sent, self.reloads)
            except DIED:
                await asyncio.sleep(0.05)  # the router learns of it meanwhile
            except BackPressureError:
                raise Busy(1) from None

    @contextmanager
    def _room(self, size: int) -> Iterator[None]:
        if self.bytes + size > 1e6 * self.limits.bodies_mb:
            raise Busy(1)
        self.bytes += size
        try:
            yield
        finally:
            self.bytes -= size


async def _refused(request: Request, error: Any) -> Response:
    return JSONResponse({"error": error.line}, error.status, error.headers)


async def _busy(request: Request, error: Any) -> Response:
    return JSONResponse({"error": str(error)}, 429, {"Retry-After": str(error.seconds)})


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
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    with listen(host, port) as listening:
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        try:
            handle = _start(folder.resolve(), checkpoint, limits, tenants, replicas)
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
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    deployment = ray_serve.deployment(
        num_replicas=replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        max_ongoing_requests=limits.queue,  # the application itself says when there are too many
        max_queued_requests=limits.queue,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=limits.request_seconds,
    )(Replica)
    ray_serve.start(http_options={"location": "NoServer"})
    try:
        application = deployment.bind(folder, checkpoint, limits, tenants)
        return ray_serve.run(application, name=NAME, route_prefix=None)
    except (RuntimeError, RayError, RayServeException) as error:
        known = [line for line in str(error).splitlines() if "InputError" in line]
        reason = (known or str(error).splitlines() or [type(error).__name__])[-1]
        raise InputError(f"replicas of {folder} do not start: {reason.strip()}") from None
