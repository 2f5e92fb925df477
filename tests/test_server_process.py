"""samples/server as a process: the official client, curl, its README's commands, clients that leave, signals, wrong arguments."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest
from sampled_artefacts import op_library
from server_sample import Running, running
from tiny_models import export_rules

from attnspan.planner.rules import HeadRule
from server.main import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "samples" / "server" / "README.md").read_text(encoding="utf-8")
KEY = "sesame"
READ_SECONDS = 1.5
MESSAGES: list[Any] = [{"role": "user", "content": "a b c"}]


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For texts that take seconds: no token ends one."""
    rules = [[HeadRule("span", 0, 0.25), HeadRule("span", 0, 0.5)]] * 2
    config = {"eos_token_id": None}
    return export_rules(tmp_path_factory.mktemp("server"), rules, n_max=4096, config=config, library=op_library()).folder


@pytest.fixture(scope="module")
def server(artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("process")
    (folder / "key").write_text(KEY + "\n", encoding="utf-8")
    options = ("--rows", "2", "--threads", "1", "--read-seconds", str(READ_SECONDS), "--api-key-file", str(folder / "key"))
    with running(artefact, folder / "log", "--model-name", "tiny", *options) as found:
        yield found


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120)


def metric(server: Running, name: str) -> float:
    """A figure of /metrics; 0 while nothing was counted."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", httpx2.get(f"{server.url}/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def until(true: Any) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


# Real clients


def test_openai_client(client: openai.OpenAI) -> None:
    assert [card.id for card in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=30, temperature=0)
    text = whole.choices[0].message.content
    assert text
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 30
    pieces = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=30, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == text
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == 30
    completion = client.completions.create(model="tiny", prompt="a b c", max_tokens=20, temperature=0)
    parts = client.completions.create(model="tiny", prompt="a b c", max_tokens=20, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts) == completion.choices[0].text


def test_openai_client_is_told_its_mistakes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.chat.completions.create(model="gpt", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="temperature") as wrong:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=3)
    assert (wrong.value.param, wrong.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="guess").models.list()


def test_concurrent_streams_are_those_of_one(client: openai.OpenAI) -> None:
    """More clients than rows, each with a prompt of its own."""
    prompts = ["ab " * (7 * i + 1) for i in range(8)]
    texts: dict[int, str] = {}

    def ask(i: int) -> str:
        parts = client.completions.create(model="tiny", prompt=prompts[i], max_tokens=10 + 9 * i, temperature=0, stream=True)
        return "".join(part.choices[0].text for part in parts)

    alone = [ask(i) for i in range(8)]
    threads = [threading.Thread(target=lambda i=i: texts.update({i: ask(i)})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [texts[i] for i in range(8)] == alone


# Clients that misbehave


def test_streams_whose_clients_leave_free_their_rows(server: Running) -> None:
    before = metric(server, 'attnspan_generations_total{reason="cancelled"}')
    headers = {"authorization": f"Bearer {KEY}"}
    body = {"model": "tiny", "prompt": "a", "max_tokens": 4000, "temperature": 0}
    with httpx2.Client(base_url=server.url, headers=headers, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            next(answer.iter_lines())
        with pytest.raises(httpx2.ReadTimeout):  # one that waits for the whole answer, and gives up
            client.post("/v1/completions", json=body, timeout=0.3)
    until(lambda: metric(server, 'attnspan_generations_total{reason="cancelled"}') == before + 2)
    assert metric(server, "attnspan_running") == metric(server, "attnspan_kv_bytes") == 0


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b"408"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-Slow: ", b"408"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer sesame\r\nContent-Length: 50\r\n\r\n{", b"408"),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\nGET /hea", b"200"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 90000000\r\n\r\n{", b"401"),
        (b"\x16\x03\x01\x02\x00\x01\x00", b"400"),
    ],
)
def test_slow_clients_are_hung_up_on(sent: bytes, status: bytes, server: Running) -> None:
    """Answered, and the connection closed, soon after the time is up."""
    where = urlsplit(server.url)
    start = time.monotonic()
    with socket.create_connection((where.hostname or "", where.port or 0), timeout=60) as connection:
        connection.sendall(sent)
        got = b""
        while data := connection.recv(4096):
            got += data
    assert got.split()[1] == status
    assert status == b"400" or time.monotonic() - start > READ_SECONDS * 0.9


# Signals


def stop(artefact: Path, log: Path, sig: int, *options: str) -> tuple[list[list[str]], int, int]:
    """Stop a server that has one stream running and one waiting: the lines of both, the status of a request that came after the
    signal, the exit status."""
    lines: list[list[str]] = [[], []]
    seen = threading.Event()
    body = {"model": "tiny", "prompt": "a", "max_tokens": 4000, "temperature": 0}

    def stream(client: httpx2.Client, into: list[str]) -> None:
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            for line in answer.iter_lines():
                into.append(line)
                seen.set()

    server = running(artefact, log, "--model-name", "tiny", "--rows", "1", "--threads", "1", *options)
    gone = pytest.raises(AssertionError, match="the server has died")  # as `running` says
    with gone, server as found, httpx2.Client(base_url=found.url, timeout=120) as client:
        readers = [threading.Thread(target=stream, args=(client, into)) for into in lines]
        for reader in readers:
            reader.start()
        assert seen.wait(60)
        found.process.send_signal(sig)
        until(lambda: "stopping" in log.read_text())
        refused = client.post("/v1/completions", json=body)
        assert int(refused.headers["retry-after"]) > 0
        for reader in readers:
            reader.join(120)
        status = found.process.wait(60)
    return lines, refused.status_code, status


def test_sigterm_lets_accepted_streams_finish(artefact: Path, tmp_path: Path) -> None:
    lines, refused, status = stop(artefact, tmp_path / "log", signal.SIGTERM, "--drain-seconds", "100")
    for stream in lines:
        assert stream[-2] == "data: [DONE]"
        assert '"finish_reason":"length"' in stream[-4]
    assert (refused, status) == (503, 0)


def test_the_end_of_the_drain_is_told(artefact: Path, tmp_path: Path) -> None:
    lines, refused, status = stop(artefact, tmp_path / "log", signal.SIGINT, "--drain-seconds", "0.8")
    assert [json.loads(stream[-2].removeprefix("data: "))["error"]["message"] for stream in lines] == ["the server stops"] * 2
    assert (refused, status) == (503, 130)


# The README and the command line


def test_commands_of_the_readme(artefact: Path, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    blocks = re.findall(r"```(sh|python)\n(.*?)```", README, re.DOTALL)
    (kind, start), (_, curls), (_, code) = blocks[:3]
    assert kind == "sh"
    words = start.split()
    assert words[:3] == ["python", "samples/server", "OUT"]
    with running(artefact, tmp_path / "log", *words[3:]) as server:
        outputs = []
        commands = [line for line in curls.replace("\\\n", "").splitlines() if line.startswith("curl")]
        for command in commands:
            command = command.replace("http://127.0.0.1:8000", server.url)
            done = subprocess.run(command, shell=True, capture_output=True, check=False)
            assert done.returncode == 0, command
            outputs.append(done.stdout.decode())
        assert len(outputs) == 4
        assert json.loads(outputs[0])["data"][0]["id"] == "demo"
        assert json.loads(outputs[1])["choices"][0]["message"]["content"]
        assert outputs[2].endswith("data: [DONE]\n\n")
        assert "attnspan_generated_tokens_total" in outputs[3]
        code = code.replace("http://127.0.0.1:8000", server.url)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.strip()


def test_options_of_the_readme_are_those_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert known - {"--help"} <= set(re.findall(r"`(--[a-z-]+)", README))
    assert set(re.findall(r"^\| `(--[a-z-]+)", README, re.MULTILINE)) <= known


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: DIR; see --help"),
        (["nowhere"], "nowhere does not exist: give an artefact folder, as made by: attnspan export MODEL nowhere"),
        (["OUT", "--port", "high"], "argument --port: invalid int value: 'high'; see --help"),
        (["OUT", "--port", "70000"], "port is 70000: must be from 0 to 65535; change --port"),
        (["OUT", "--rows", "0"], "rows is 0: must be an integer from 1 to 1024; change --rows"),
        (["OUT", "--kv-memory", "much"], "--kv-memory is 'much': must be a size, as 1.5GB or 512MiB"),
        (["OUT", "--kv-memory", "0.1KB"], "kv_bytes is 100: one row takes 512 at least; change --kv-memory"),
        (["OUT", "--api-key-file", "none"], "cannot read none: No such file or directory; change --api-key-file"),
        (["OUT", "--speed", "9"], "unrecognized arguments: --speed 9; see --help"),
    ],
)
def test_wrong_arguments(
    words: list[str], message: str, artefact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(artefact.parent)
    if not Path("OUT").exists():
        Path("OUT").symlink_to(artefact)
    assert main(words if not words or "--port" in words else [*words, "--port", "0"]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_port_that_is_taken(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([str(artefact), "--port", str(port)]) == 2
    why = f"cannot listen on 127.0.0.1:{port}: Address already in use; change --host or --port"
    assert capsys.readouterr().err == f"error: {why}\n"
