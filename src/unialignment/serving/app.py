"""The HTTP application: routes on top of an engine. Knows nothing of how the engine schedules."""

from __future__ import annotations

from fastapi import FastAPI

from unialignment import __version__
from unialignment.serving.engine import Engine
from unialignment.serving.settings import ServerSettings


def create_app(engine: Engine, settings: ServerSettings | None = None) -> FastAPI:
    """The application; closing the engine is the caller's task.

    Args:
        engine: Runs the requests.
        settings: Limits and keys.
    """
    settings = settings or ServerSettings()
    app = FastAPI(title=settings.title, version=__version__)
    app.state.engine, app.state.settings = engine, settings
    if settings.web:
        mount_web(app, engine, settings)
    return app


def mount_web(app: FastAPI, engine: Engine, settings: ServerSettings) -> bool:
    """Mount the web page if what it needs is installed; says whether."""
    try:
        from unialignment.serving import web
    except ImportError:
        return False
    web.mount(app, engine, settings)
    return True
