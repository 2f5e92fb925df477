"""The program: arguments, the socket, the server."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from attnspan.planner.errors import UserError
from server.settings import Settings

__all__ = ["main"]

KEY = "ATTNSPAN_API_KEY"
FINISH_SECONDS = 5
"""For last bytes to be sent once every generation has ended."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status: 0 after SIGTERM, 1 failed, 2 a user's mistake, 130 after Ctrl-C."""
    try:
        return _serve(_parser().parse_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="server", description="Serve an artefact by OpenAI's API.", allow_abbrev=False)
    default = Settings(Path())
    parser.add_argument("artefact", metavar="DIR", type=Path, help="artefact folder, as made by attnspan export")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0: any that is free (default %(default)s)")
    parser.add_argument("--model-name", metavar="NAME", help="name of the model in the API (default: the model's own)")
    parser.add_argument(
        "--rows", metavar="N", type=int, default=default.rows, help="requests computed at a time (default %(default)s)"
    )
    parser.add_argument(
        "--queue", metavar="N", type=int, default=default.queue, help="requests that may wait (default %(default)s)"
    )
    parser.add_argument(
        "--kv-memory", metavar="SIZE", help="most memory of KV caches, as 1.5GB (default: half of what is available)"
    )
    parser.add_argument("--threads", metavar="N", type=int, help="threads of the model (default: the physical cores)")
    parser.add_argument(
        "--chunk", metavar="N", type=int, default=default.chunk, help="tokens of a prompt between two steps (default %(default)s)"
    )
    parser.add_argument("--max-body", metavar="SIZE", default="1MiB", help="largest request (default %(default)s)")
    for name, what in (
        ("read", "for a request's head, and for its body"),
        ("write", "for a client to take a piece of an answer"),
        ("drain", "for running requests to finish at the end"),
    ):
        value = getattr(default, f"{name}_seconds")
        parser.add_argument(f"--{name}-seconds", metavar="S", type=float, default=value, help=f"{what} (default {value:g})")
    parser.add_argument(
        "--api-key-file", metavar="FILE", type=Path, help=f"file with the key that clients must send (else ${KEY})"
    )
    return parser


def _serve(args: argparse.Namespace) -> int:
    settings = Settings(
        artefact=args.artefact,
        model=args.model_name,
        rows=args.rows,
        queue=args.queue,
        threads=args.threads,
        chunk=args.chunk,
        kv_bytes=None if args.kv_memory is None else _size(args.kv_memory, "--kv-memory"),
        max_body=_size(args.max_body, "--max-body"),
        read_seconds=args.read_seconds,
        write_seconds=args.write_seconds,
        drain_seconds=args.drain_seconds,
        api_key=_key(args.api_key_file),
    )
    listener = _listen(args.host, args.port)
    try:
        import uvicorn

        from server.app import create_app
        from server.engine import Engine
        from server.serving import Server, protocol
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'attnspan[server]'") from None
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    engine = Engine(settings)
    engine.open()
    app = create_app(settings, engine)
    config = uvicorn.Config(
        app,
        http=protocol(settings.read_seconds),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=FINISH_SECONDS,
    )
    host, port = listener.getsockname()[:2]
    ready = f"serving {app.state.model} on http://{f'[{host}]' if ':' in host else host}:{port}"
    server = Server(config, engine, settings, ready)
    server.run(sockets=[listener])
    return 130 if server.signalled == signal.SIGINT else 1 if engine.failed else 0


def _listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address: taken before weights are read, opened to clients once they are."""
    if not 0 <= port <= 65535:
        raise UserError(f"port is {port}: must be from 0 to 65535; change --port")
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, number)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; change --host or --port") from None
    return listener


def _size(text: str, option: str) -> int:
    """Bytes of `1.5GB`, `512MiB`, `1000000`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?", text.strip())
    if found is None:
        raise UserError(f"{option} is {text!r}: must be a size, as 1.5GB or 512MiB")
    unit = 1024 if found[3] else 1000
    return int(float(found[1]) * unit ** ["", "k", "m", "g", "t"].index(found[2].lower()))


def _key(file: Path | None) -> str | None:
    """The API key; never an argument, which other users of the machine could read."""
    if file is None:
        return os.environ.get(KEY) or None
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {getattr(error, 'strerror', None) or 'not UTF-8'}; change --api-key-file") from None
    if not key:
        raise UserError(f"{file} is empty: it must hold the key; change --api-key-file")
    return key
