"""samples/server/load.py sees every fault that it is there to see, on a fake server; and passes on the real one."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import demo_model
import pytest
from fake_chat import FakeChat, serve
from fastapi import Request
from server_sample import load_program, running
from tiny_models import export_tiny

QUICK = ["--clients", "4", "--seconds", "1", "--prompts", "3", "--tokens", "4,12", "--cancel", "0.3", "--timeout", "1"]
ALONE = 6  # requests before the load: each of the three prompts twice


@pytest.fixture(scope="module")
def load() -> ModuleType:
    """samples/server/load.py as a module."""
    return load_program()


def test_figures(load: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeChat()
    with serve(fake.app) as url:
        code = load.main([f"{url}/v1", *QUICK, "--pid", str(os.getpid()), "--json", str(tmp_path / "load.json")])
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err
    report: dict[str, Any] = json.loads((tmp_path / "load.json").read_text())
    assert report["failures"] == []
    assert set(report["outcomes"]) == {"completed", "left"}
    assert sum(report["outcomes"].values()) == report["requests"] == len(fake.seen)
    assert fake.left > 0
    assert report["ratio"] == pytest.approx(report["tokens_per_second"] / report["tokens_per_second_alone"], rel=0.05)
    assert report["rss_bytes"][0] > 10_000_000
    for words in ("first token, p99, ms", "between tokens, p50, ms", "tokens/s, one at a time", "memory after, MB"):
        assert words in printed.out


def test_arithmetic(load: ModuleType) -> None:
    """Ten tokens in five events, one of them after the load has ended; one that was left; alone, 20 tokens in 4 seconds."""
    whole = load.Answer(0, start=1.0, end=7.0, tokens=10, times=[2.0, 3.0, 4.0, 4.5, 6.5], finish="stop")
    left = load.Answer(1, start=1.0, end=5.0, times=[1.5, 2.5, 4.0], cancelled=True)
    alone = [load.Answer(0, start=0.0, end=4.0, tokens=20)]
    report = load.figures([whole, left], alone, 1.0, 6.0)
    assert report["tokens_per_second"] == (8 + 3) / 5
    assert report["tokens_per_second_alone"] == 5
    assert report["ratio"] == 0.44
    assert report["first_token_ms"] == {"p50": 750.0, "p99": 995.0}
    assert report["between_tokens_ms"]["p50"] == 1000
    assert report["between_tokens_ms"]["p99"] == 1975


@pytest.mark.parametrize(
    ("fault", "words"),
    [("differs", "differs from the reference"), ("stuck", "stuck"), ("lost", "lost"), ("refused", "status 503")],
)
def test_fault_under_load(load: ModuleType, capsys: pytest.CaptureFixture[str], fault: str, words: str) -> None:
    with serve(FakeChat(fault, after=ALONE).app) as url:
        code = load.main([f"{url}/v1", *QUICK])
    assert code == 1
    assert words in capsys.readouterr().err


def test_memory_that_grows(load: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    leaked: list[bytes] = []

    class Leaking(FakeChat):
        async def chat(self, request: Request) -> Any:
            leaked.append(b"x" * 1_000_000)
            return await super().chat(request)

    with serve(Leaking().app) as url:
        code = load.main([f"{url}/v1", *QUICK, "--pid", str(os.getpid())])
    assert code == 1
    assert "the server's memory went from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "gives no models"),
        (["--cancel", "2"], "--cancel is 2.0: must be from 0 to 1"),
        (["--clients", "0"], "--clients"),
        (["--pid", "4194304"], "--pid is 4194304: there is no such process"),
    ],
)
def test_refusals(load: ModuleType, capsys: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        load.main(["http://127.0.0.1:9/v1", *options])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_real_server(load: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """8 clients for 10 seconds on a tiny model: every answer the same as alone, nothing lost, no memory kept."""
    artefact = export_tiny(tmp_path / "tiny").folder
    with running(artefact, tmp_path / "log", "--rows", "8", "--threads", "1") as server:
        mixed = ["--prompts", "6", "--characters", "20,120", "--tokens", "8,40,90", "--cancel", "0.3"]
        watched = ["--pid", str(server.process.pid), "--json", str(tmp_path / "load.json")]
        code = load.main([f"{server.url}/v1", "--clients", "8", "--seconds", "10", *mixed, *watched])
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err
    report = json.loads((tmp_path / "load.json").read_text())
    assert report["outcomes"]["completed"] > 20  # 20 before the load begins
    assert report["outcomes"]["left"] >= 1


def readme_words() -> list[str]:
    """The arguments of the README's command."""
    text = (demo_model.ROOT / "samples" / "server" / "README.md").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("python samples/server/load.py")]
    return shlex.split(line)[2:]


@pytest.mark.samples
@pytest.mark.model
def test_demo_model(load: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """32 clients for three minutes on the demo model."""
    from attnspan.cpu_runtime.library import library_path
    from attnspan.export.pipeline import Options, export_model

    plan = demo_model.ROOT / "samples" / "data" / "smollm2_135m_plan.json"
    export_model(Options(model=str(demo_model.gguf()), out=tmp_path / "out", plan=plan, library=library_path()))
    with running(tmp_path / "out", tmp_path / "log", "--rows", "32") as server:
        here = str(tmp_path / "load.json")
        values = {"http://127.0.0.1:8000/v1": f"{server.url}/v1", "PID": str(server.process.pid), "load.json": here}
        code = load.main([values.get(word, word) for word in readme_words()])
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err
    report = json.loads((tmp_path / "load.json").read_text())
    assert (report["clients"], report["seconds"]) == (32, 180)
    assert report["ratio"] > 1
