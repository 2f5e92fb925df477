"""Refusals in the shape of OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

__all__ = ["ApiError", "describe", "error_response", "install"]

TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
"""Types of errors by status; others are `invalid_request_error`."""
MOST_SHOWN = 300
"""Characters of a message; what a client sent may be long."""


class ApiError(Exception):
    """An answer that is an error. param: the field at fault. code: a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


def describe(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message[:MOST_SHOWN], "type": kind, "param": param, "code": code}}


def error_response(error: ApiError) -> Response:
    """The answer that an error is."""
    # ASCII: a message may quote half of a surrogate pair, which UTF-8 cannot hold.
    body = json.dumps(describe(error.status, error.message, error.param, error.code))
    return Response(body, error.status, error.headers, media_type="application/json")


def install(app: FastAPI) -> None:
    """Let every error of the app be answered in this shape."""

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        # Names of fields and places in lists; the rest are pydantic's names of alternatives.
        where = [str(part) for part in first["loc"][1:] if isinstance(part, int) or part.isidentifier()]
        if first["type"] == "json_invalid":
            return error_response(
                ApiError(400, f"the body is no JSON: {first.get('ctx', {}).get('error', '')}", code="invalid_json")
            )
        message = f"{'.'.join(where) or 'the body'}: {first['msg']}"
        return error_response(ApiError(400, message, param=where[0] if where else None, code="invalid_value"))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return error_response(ApiError(error.status_code, str(error.detail), headers=error.headers))

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> Response:
        return error_response(ApiError(500, "the server made a mistake"))
