"""The web application: routes, limits and pages over one engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse

from server import errors
from server.engine import Engine
from server.limits import Limits
from server.routes import router
from server.settings import Settings

__all__ = ["create_app"]

STATIC = Path(__file__).parent / "static"


def create_app(settings: Settings, engine: Engine | None = None) -> FastAPI:
    """An app over an artefact, or over an engine that is open already; the engine runs while the app does.

    Weights are read when the app starts. `app.state.engine` is the engine, `app.state.model` the name of its model. UserError
    when the folder is no artefact.
    """
    engine = Engine(settings) if engine is None else engine

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(engine.start)
        try:
            yield
        finally:
            engine.begin_drain()
            await run_in_threadpool(engine.close)

    app = FastAPI(title="attnspan", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.engine = engine
    app.state.settings = settings
    app.state.model = settings.model or _name(engine)
    app.include_router(router(engine, app.state.model))
    errors.install(app)
    app.add_middleware(Limits, settings=settings, metrics=engine.metrics)
    for file in sorted(STATIC.glob("*.*")):
        _serve_file(app, file)
    _describe(app)
    return app


def _serve_file(app: FastAPI, file: Path) -> None:
    """A route for a file of the page: a folder mounted at / would answer 404 where a route has no such method."""

    async def send() -> FileResponse:
        return FileResponse(file)

    for path in [f"/{file.name}", *(["/"] if file.name == "index.html" else [])]:
        app.add_api_route(path, send, methods=["GET", "HEAD"], include_in_schema=False)


def _name(engine: Engine) -> str:
    """Of the model that was exported, without folders."""
    return Path(engine.artefact.model_id).name.removesuffix(".gguf") or engine.artefact.folder.name


def _describe(app: FastAPI) -> None:
    """Let the OpenAPI document tell what is answered: mistakes in a body are 400, not FastAPI's 422."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
        if app.state.settings.api_key is not None:
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for name, path in document["paths"].items():
                for operation in path.values():
                    operation["security"] = [{"key": []}] if name.startswith("/v1/") else []
        return document

    app.openapi = openapi  # type: ignore[method-assign]
