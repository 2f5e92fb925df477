"""Text of a protobuf message: what Triton reads as config.pbtxt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["Enum", "text"]


class Enum(str):
    """A value that is written without quotes."""


def text(message: Mapping[str, Any]) -> str:
    """A message in protobuf's text format: mappings are messages, sequences repeated fields; None is left out."""
    return "".join(f"{line}\n" for line in _lines(message))


def _lines(message: Mapping[str, Any]) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, Mapping):
            yield from _block(name, value)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            if value and isinstance(value[0], Mapping):
                for each in value:
                    yield from _block(name, each)
            else:
                yield f"{name}: [{', '.join(map(_scalar, value))}]"
        elif value is not None:
            yield f"{name}: {_scalar(value)}"


def _block(name: str, message: Mapping[str, Any]) -> Iterator[str]:
    yield f"{name} {{"
    yield from (f"  {line}" for line in _lines(message))
    yield "}"


def _scalar(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value) if isinstance(value, str) else str(value)
