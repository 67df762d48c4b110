"""``/v1/models``, health, readiness and metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse

from unialignment.serving.images_api import ERRORS
from unialignment.serving.schemas import Model, ModelList, Status
from unialignment.serving.service import Service

router = APIRouter()


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


@router.get("/v1/models", response_model=ModelList, responses={401: ERRORS[401]}, tags=["models"])
async def models(request: Request) -> Any:
    """The models that are served."""
    created = request.app.state.created
    return ModelList(data=[Model(id=name, created=created) for name in _service(request).models])


@router.get(
    "/v1/models/{model:path}", response_model=Model, responses={401: ERRORS[401], 404: ERRORS[404]}, tags=["models"]
)
async def model(request: Request, model: str) -> Any:
    """One of them."""
    return Model(id=_service(request).check_model(model), created=request.app.state.created)


@router.get("/healthz", response_model=Status, tags=["operation"])
async def healthz() -> Any:
    """Whether the process answers."""
    return Status(status="ok")


@router.get("/readyz", response_model=Status, responses={503: {"model": Status}}, tags=["operation"])
async def readyz(request: Request) -> Any:
    """Whether requests would be taken."""
    if _service(request).engine.alive:
        return Status(status="ok")
    return JSONResponse({"status": "unavailable"}, 503)


@router.get("/metrics", response_class=PlainTextResponse, tags=["operation"])
async def metrics(request: Request) -> Any:
    """Counters in Prometheus' format."""
    return request.app.state.metrics.response()
