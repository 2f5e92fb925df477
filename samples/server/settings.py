"""What a service is started with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from attnspan.planner.rules import check_int, check_number

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """Everything that the app needs to know. UserError on a value out of range.

    artefact: folder of target `cpu` or `portable`. model: its name in the API; None: the artefact's. rows: most requests that
    are computed at a time. queue: most that wait beyond them. threads: of the model; None: the physical cores. chunk: tokens
    of a prompt computed between two steps of the running requests. kv_bytes: most bytes of the caches of admitted requests;
    None: half of the memory that is available. max_body: bytes of a request. read_seconds: to receive a request's head, and
    its body. write_seconds: to send a piece of an answer. drain_seconds: for running requests to finish at the end. api_key:
    what clients must send; None: nothing.
    """

    artefact: Path
    model: str | None = None
    rows: int = 32
    queue: int = 64
    threads: int | None = None
    chunk: int = 64
    kv_bytes: int | None = None
    max_body: int = 1 << 20
    read_seconds: float = 15.0
    write_seconds: float = 60.0
    drain_seconds: float = 30.0
    api_key: str | None = None

    def __post_init__(self) -> None:
        check_int("rows", self.rows, 1, 1024, "; change --rows")
        check_int("queue", self.queue, 0, 2**20, "; change --queue")
        check_int("chunk", self.chunk, 1, 2**20, "; change --chunk")
        if self.kv_bytes is not None:
            check_int("kv_bytes", self.kv_bytes, 1, 2**50, "; change --kv-memory")
        check_int("max_body", self.max_body, 1024, 2**30, "; change --max-body")
        check_number("read_seconds", self.read_seconds, 0.1, 3600, "; change --read-seconds")
        check_number("write_seconds", self.write_seconds, 0.1, 3600, "; change --write-seconds")
        check_number("drain_seconds", self.drain_seconds, 0, 86400, "; change --drain-seconds")
