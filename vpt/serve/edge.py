"""Around every request: who may ask, a line of log without names, bodies, and refusals."""

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vpt.serve.batching import Busy
from vpt.serve.limits import Limits, Tenant, tenant_of
from vpt.serve.service import Service, note
from vpt.serve.uploads import Refused

log = logging.getLogger("vpt.serve")


class Served(Protocol):
    """Answers requests: a service, or the ingress of several."""

    limits: Limits
    ready: bool

    async def reload(self) -> object:
        """Read the folder of artefacts again."""


class Edge:
    """Wraps the application: nothing that is logged or counted names a task, image or patient."""

    def __init__(self, app: ASGIApp, service: Served, registry: CollectorRegistry) -> None:
        self.app, self.service = app, service
        self.requests = Counter(
            "vpt_requests", "Requests answered", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "vpt_request_seconds", "From request to answer", ["route"], registry=registry
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, self.service)
        started = time.monotonic()
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except Exception as error:
            note(error)
            if exchange.status is None:
                await exchange.send({"type": "http.response.start", "status": 500, "headers": []})
                await exchange.send({"type": "http.response.body", "body": b""})
        finally:
            seconds = time.monotonic() - started
            route = getattr(scope.get("route"), "path", "other")
            self.requests.labels(route, str(exchange.status)).inc()
            self.seconds.labels(route).observe(seconds)
            if route not in {"/healthz", "/readyz", "/metrics"}:
                method = scope["method"] if len(scope["method"]) < 8 else "?"
                log.info("%s %s %s %.0f ms", method, route, exchange.status, seconds * 1000)


class Exchange:
    """A request whose answer may be sent before its body is read.

    The connection then closes, and what still comes is dropped first, for a while: closed with
    bytes unread, it would be reset, and the client might never see the answer. Those of a stopping
    server close with each answer.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, service: Served) -> None:
        self._receive, self._send, self.service = receive, send, service
        headers = dict(scope["headers"])
        self.unread = headers.get(b"content-length", b"0") != b"0" or (
            b"transfer-encoding" in headers
        )
        self.waits = b"expect" in headers  # with its body, until it is told to send it
        self.status: int | None = None

    async def receive(self) -> Message:
        """The next part of the body."""
        message = await self._receive()
        if not message.get("more_body"):
            self.unread = False
        return message

    async def send(self, message: Message) -> None:
        """A part of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.unread or not self.service.ready:
                headers = [*message.get("headers", []), (b"connection", b"close")]
                message = {**message, "headers": headers}
            await self._send(message)
        elif self.unread and not message.get("more_body"):
            await self._send({**message, "more_body": True})
            if not self.waits:
                await self._drain()
            await self._send({"type": "http.response.body", "body": b""})
        else:
            await self._send(message)

    async def _drain(self) -> None:
        limits = self.service.limits
        left = limits.body_bytes
        try:
            async with asyncio.timeout(limits.body_seconds):
                while self.unread and left > 0:
                    left -= len((await self.receive()).get("body", b""))
        except TimeoutError:
            pass


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body, of `limits.body_mb` at most.

    Raises:
        Refused: it is longer, or came too slowly, or the client went away.
    """
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "the client went away")
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limits.body_bytes:
                    raise Refused(413, f"body: give at most {limits.body_mb:g} MB")
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        raise Refused(408, f"the body took more than {limits.body_seconds:g} s") from None


def promised_bytes(request: Request, limits: Limits) -> int:
    """Bytes that a request's body may have: what it says, else the most that is allowed.

    Raises:
        Refused: more than that.
    """
    said: Any = request.headers.get("content-length")
    size = int(said) if said and said.isdecimal() else limits.body_bytes
    if size > limits.body_bytes:
        raise Refused(413, f"body of {size:,} bytes: give at most {limits.body_mb:g} MB")
    return size


def authorise(
    tenants: Mapping[str, Tenant] | None, request: Request, admin: bool = False
) -> Tenant:
    """Whose token the request has.

    Raises:
        Refused: nobody's; with `admin`, one that may not do such things.
    """
    tenant = tenant_of(tenants, request.headers.get("authorization", ""))
    if tenant is None:
        raise Refused(401, "give a token: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
    if admin and not tenant.admin:
        raise Refused(403, "this is for tokens with admin: true")
    return tenant


@contextmanager
def in_time() -> Iterator[None]:
    """Time that has run out as an answer."""
    try:
        yield
    except TimeoutError:
        raise Refused(503, "it took too long: try again", {"Retry-After": "1"}) from None


async def _refused(request: Request, error: Any) -> Response:
    return JSONResponse({"error": error.line}, error.status, error.headers)


async def _busy(request: Request, error: Any) -> Response:
    return JSONResponse({"error": str(error)}, 429, {"Retry-After": str(error.seconds)})


REFUSALS = {Refused: _refused, Busy: _busy}  # handlers of an application


def gauges(service: Service, registry: CollectorRegistry) -> None:
    """Gauges of what is under way, read when they are asked for."""
    batcher = service.batcher
    for name, text, read in (
        ("vpt_images", "Images accepted and not yet answered", lambda: batcher.images),
        ("vpt_body_bytes", "Bytes of bodies under way", lambda: batcher.bytes),
        ("vpt_image_seconds", "Seconds of a pass for one image", lambda: batcher.seconds),
        ("vpt_tasks", "Tasks", lambda: len(service.tasks.versions)),
        ("vpt_passes", "Passes of the backbone", lambda: batcher.passes),
        ("vpt_passed_images", "Images of these passes", lambda: batcher.passed),
    ):
        Gauge(name, text, registry=registry).set_function(read)
