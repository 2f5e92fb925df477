"""samples/server as its users start it: a process on a free port."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


@dataclass
class Running:
    """A server: its address and its process."""

    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def running(artefact: Path, log: Path, *options: str, seconds: float = 240) -> Iterator[Running]:
    """Start the server on a free port, stop it at the end; `log` takes what it prints."""
    command = [sys.executable, str(ROOT / "samples" / "server"), str(artefact), "--port", "0", *options]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
    try:
        end = time.monotonic() + seconds
        while not (found := re.search(r"^serving .* on (http://\S+)", log.read_text(errors="replace"), re.MULTILINE)):
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < end, f"not ready after {seconds} s:\n{log.read_text(errors='replace')}"
            time.sleep(0.05)
        yield Running(found[1], process)
        assert process.poll() is None, f"the server has died:\n{log.read_text(errors='replace')}"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def load_program() -> ModuleType:
    """samples/server/load.py as a module."""
    spec = importlib.util.spec_from_file_location("server_load", ROOT / "samples" / "server" / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
