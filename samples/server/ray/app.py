"""`server.ray.app:build`, the import path of serve.yaml."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from attnspan.planner.errors import UserError
from server.app import create_app
from server.settings import Settings

__all__ = ["build"]


def build(args: dict[str, Any]) -> Application:
    """The application, of one deployment named `chat`; args: the fields of `Settings`. UserError when one is wrong.

    Nothing is read here: each replica opens the artefact itself.
    """
    settings = read_settings(args)

    def app() -> FastAPI:
        return create_app(settings)

    @serve.deployment(name="chat")
    @serve.ingress(app)
    class Chat:
        """A replica: a process with a session and a queue of its own."""

        def check_health(self) -> None:
            """Ray replaces a replica that raises here."""
            replica: Any = self
            if replica.app.state.engine.failed:
                raise RuntimeError("the engine has failed")

    deployment: Any = Chat  # what the decorators make of the class
    application: Application = deployment.bind()
    return application


def read_settings(args: dict[str, Any]) -> Settings:
    """Settings of the `args` of serve.yaml. UserError on a name that is none, or without an artefact."""
    names = [field.name for field in fields(Settings)]
    for name in args:
        if name not in names:
            raise UserError(f"args of serve.yaml has {name!r}: must be one of {', '.join(names)}")
    folder = Path(str(args.get("artefact", "")))
    if not (folder / "attnspan.json").is_file():
        raise UserError(f"artefact is {str(folder)!r}, no artefact folder: set args.artefact of serve.yaml to one")
    return Settings(**args | {"artefact": folder.absolute()})
