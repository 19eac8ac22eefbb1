"""The HTTP calls of `vpt serve`, as a FastAPI application."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException

from vpt.dense.model import Dense
from vpt.resources import package_version
from vpt.serve.answers import (
    Answer,
    Described,
    Label,
    answer,
    answer_objects,
    describe,
    labels,
    ranked,
)
from vpt.serve.boxes import Found, threshold_of
from vpt.serve.edge import REFUSALS, Edge, authorise, gauges, in_time, promised_bytes, read_body
from vpt.serve.limits import Tenant
from vpt.serve.masks import Segment
from vpt.serve.service import Service
from vpt.serve.uploads import Refused, Upload, kind_of

_TEXT = {"type": "string"}
_BINARY = {"type": "string", "format": "binary"}
_TEXTS = {"type": "array", "items": _TEXT}
_INPUTS = {"oneOf": [_TEXT, _TEXTS], "description": "Image files in base64, one or several"}
_JSON = {"inputs": _INPUTS, "parameters": {"type": "object"}}
_FILES = {"file": {"type": "array", "items": _BINARY}}
BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": _BINARY},
            "multipart/form-data": {"schema": {"type": "object", "properties": _FILES}},
            "application/json": {"schema": {"type": "object", "properties": _JSON}},
        },
    }
}
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "Not such a body"},
    401: {"description": "No token, or nobody's"},
    404: {"description": "No such task"},
    408: {"description": "The body came too slowly"},
    413: {"description": "More bytes, images or classes than are allowed"},
    415: {"description": "Not a known type of image or body"},
    422: {"description": "A damaged or too large image"},
    429: {"description": "Too many images under way; Retry-After says for how many seconds"},
    503: {"description": "It took too long"},
}


def create_app(service: Service, tenants: Mapping[str, Tenant] | None = None) -> FastAPI:
    """The application of `service`; without `tenants`, whoever reaches it sees everything."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batches = asyncio.create_task(service.batcher.serve())
        await service.warm_up()
        yield
        batches.cancel()
        with suppress(asyncio.CancelledError):
            await batches

    registry = CollectorRegistry()
    gauges(service, registry)
    limits = service.limits
    app = FastAPI(
        title="vpt",
        version=package_version(),
        lifespan=lifespan,
        docs_url=None,  # the page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers=REFUSALS,
        telemetry=dict.fromkeys(("tracing", "metrics", "logs", "auto_configure"), False),
    )
    app.add_middleware(Edge, service=service, registry=registry)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return JSONResponse({"error": "a parameter is missing or wrong"}, 400)

    bearer = Annotated[Any, Depends(HTTPBearer(auto_error=False))]

    async def caller(request: Request, _: bearer) -> Tenant:
        return authorise(tenants, request)

    async def administrator(request: Request, _: bearer) -> Tenant:
        return authorise(tenants, request, admin=True)

    Caller = Annotated[Tenant, Depends(caller)]
    Admin = Annotated[Tenant, Depends(administrator)]

    @asynccontextmanager
    async def accepted(request: Request) -> AsyncIterator[Upload]:
        """The images of a request for which there is room; decided before its body is read."""
        kind = kind_of(request.headers.get("content-type", ""))
        most = 1 if kind == "raw" else limits.images
        with service.batcher.admit(most, promised_bytes(request, limits)) as keep:
            body = await read_body(request, limits)
            with in_time():
                async with asyncio.timeout(limits.request_seconds):
                    upload = await service.parse(body, request.headers)
                    keep(len(upload.files))
                    yield upload

    @app.get("/healthz", tags=["health"])
    async def alive() -> dict[str, str]:
        """Say that the process runs."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"], responses={503: {"description": "It is stopping"}})
    async def ready(response: Response) -> dict[str, str]:
        """Say whether requests are wanted."""
        response.status_code = 200 if service.ready else 503
        return {"status": "ready" if service.ready else "stopping"}

    @app.get("/metrics", tags=["health"], response_class=Response)
    async def metrics(tenant: Admin) -> Response:
        """Prometheus metrics."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/tasks", responses={200: {"model": list[Described]}})
    async def list_tasks(tenant: Caller) -> JSONResponse:
        """List the caller's tasks."""
        names = service.names(tenant)
        return JSONResponse(
            [describe(n, service.find(n, tenant), service.version(n)) for n in names]
        )

    @app.get("/v1/tasks/{task}", responses={200: {"model": Described}, 404: ERRORS[404]})
    async def describe_task(task: str, tenant: Caller) -> JSONResponse:
        """Describe a task."""
        return JSONResponse(describe(task, service.find(task, tenant), service.version(task)))

    @app.post(
        "/v1/tasks/{task}/predict",
        responses={200: {"model": Answer}, **ERRORS},
        openapi_extra=BODY,
    )
    async def predict(task: str, request: Request, tenant: Caller) -> JSONResponse:
        """Decide on images, as `vpt predict --json` prints it, or find objects or segments."""
        version, found = service.version(task), service.find(task, tenant)
        async with accepted(request) as upload:
            if isinstance(found, Dense):
                objects = await service.find_objects(upload, found)
                return JSONResponse(answer_objects(task, found, version, objects))
            return JSONResponse(answer(*await service.predict(upload, task, tenant)))

    @app.post(
        "/models/{task}",
        responses={200: {"model": list[Label] | list[Found] | list[Segment]}, **ERRORS},
        openapi_extra=BODY,
        tags=["Hugging Face"],
    )
    async def classify(task: str, request: Request, tenant: Caller) -> JSONResponse:
        """Classify an image, or find objects or segments, as Hugging Face's servers answer."""
        kind = service.find(task, tenant)
        async with accepted(request) as upload:
            if len(upload.files) != 1:
                raise Refused(400, "give one image; /v1/tasks/TASK/predict takes several")
            if isinstance(kind, Dense):
                threshold = threshold_of(upload.parameters)
                return JSONResponse((await service.find_objects(upload, kind, threshold))[0])
            found, _, (logits,) = await service.predict(upload, task, tenant)
            return JSONResponse(labels(found, logits, upload.parameters))

    @app.post("/v1/base", responses=ERRORS, openapi_extra=BODY)
    async def base(
        request: Request,
        tenant: Caller,
        classes: Annotated[list[str], Query()] = [],  # noqa: B006
    ) -> JSONResponse:
        """Classify images by class names of the caller's, without any prompt (zero-shot).

        Names are `classes`, or in JSON `parameters.candidate_labels`.
        """
        if not hasattr(service.backbone, "encode_texts"):
            raise Refused(404, "the backbone has no text tower")
        async with accepted(request) as upload:
            names = classes or upload.parameters.get("candidate_labels")
            if not isinstance(names, list):
                raise Refused(400, "give class names: ?classes=cat&classes=dog")
            rows = await service.zero_shot(upload, names)
            scores = [dict(zip(names, row.tolist(), strict=True)) for row in rows]
            return JSONResponse({"images": [{"predictions": ranked(score)} for score in scores]})

    @app.post("/v1/reload", tags=["administration"])
    async def reload(tenant: Admin) -> dict[str, Any]:
        """Read the folder of artefacts again."""
        return await service.reload()

    return app
