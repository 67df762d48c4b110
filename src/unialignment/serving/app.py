"""The HTTP application: routes on top of an engine, behind a guard. Knows nothing of how the engine schedules."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from unialignment import __version__
from unialignment.serving import chat_api, embeddings_api, images_api, system_api
from unialignment.serving.docs_page import docs_page
from unialignment.serving.engine import Engine
from unialignment.serving.errors import add_error_handlers
from unialignment.serving.guard import Guard
from unialignment.serving.metrics import Measured, Metrics
from unialignment.serving.service import Service
from unialignment.serving.settings import ServerSettings

_DESCRIPTION = """One diffusion model that draws, edits, composes, perceives, describes and answers, with the routes and
bodies of OpenAI's API: point an OpenAI client at `/v1`. Errors have OpenAI's shape. Fields beyond OpenAI's (`seed`,
`num_inference_steps`, `guidance_scale`, …) go into `extra_body`."""


def create_app(engine: Engine, settings: ServerSettings | None = None) -> FastAPI:
    """The application; closing the engine is the caller's task.

    Args:
        engine: Runs the requests.
        settings: Limits and keys.
    """
    settings = settings or ServerSettings(engine=engine.settings)
    app = FastAPI(
        title=settings.title, version=__version__, description=_DESCRIPTION, redirect_slashes=False,
        docs_url=None, redoc_url=None,  # they load scripts from a public network
    )  # fmt: skip
    app.state.engine, app.state.settings = engine, settings
    app.state.service = Service(engine, settings)
    app.state.metrics = Metrics(engine)
    app.state.created = int(time.time())
    for router in (images_api.router, chat_api.router, embeddings_api.router, system_api.router):
        app.include_router(router)
    add_error_handlers(app)
    if settings.web:
        mount_web(app, engine, settings)
    app.add_middleware(Guard, settings=settings)
    app.add_middleware(Measured, metrics=app.state.metrics)
    _describe(app, settings)

    @app.get("/docs", include_in_schema=False, response_class=HTMLResponse)
    def docs() -> str:
        return docs_page(app.openapi())

    return app


def mount_web(app: FastAPI, engine: Engine, settings: ServerSettings) -> bool:
    """Mount the web page if what it needs is installed; says whether."""
    try:
        from unialignment.serving import web
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "unialignment":
            raise
        return False
    web.mount(app, engine, settings)
    return True


def _describe(app: FastAPI, settings: ServerSettings) -> None:
    """The OpenAPI document: as made from the routes, less FastAPI's 422 (errors here are 400), plus keys."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = make()
        for path, item in document["paths"].items():
            for operation in item.values():
                operation["responses"].pop("422", None)
                if settings.api_keys and path.startswith("/v1/"):
                    operation["security"] = [{"key": []}]
        schemas = document["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        if settings.api_keys:
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return document

    app.openapi = openapi  # type: ignore[method-assign]
