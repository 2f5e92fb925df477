"""samples/server under bad requests, from its own OpenAPI description and by hand: always a 4xx, never a 5xx, never a hang."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx2
import hypothesis
import pytest
from server_sample import Running, running
from tiny_models import export_tiny

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed (extra dev)")


READ_SECONDS = 1.5
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    artefact = export_tiny(folder).folder
    with running(artefact, folder / "log", "--rows", "4", "--threads", "1", "--read-seconds", str(READ_SECONDS)) as found:
        yield found


@pytest.fixture
def model(server: Running) -> str:
    return str(httpx2.get(f"{server.url}/v1/models").json()["data"][0]["id"])


@pytest.fixture(autouse=True)
def _answers_afterwards(server: Running) -> Iterator[None]:
    """Whatever a test sends, the server answers the next request."""
    yield
    name = httpx2.get(f"{server.url}/v1/models", timeout=60).json()["data"][0]["id"]
    body = {"model": name, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    done = httpx2.post(server.url + CHAT, json=body, timeout=60)
    assert done.status_code == 200, done.text
    assert done.json()["choices"][0]["finish_reason"] in ("length", "stop")


def test_generated_requests(server: Running, model: str) -> None:
    """Statuses, content types and bodies are as described; what breaks the description is refused."""
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses: set[int] = set()
    bad, good = GenerationMode.NEGATIVE, GenerationMode.POSITIVE
    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.seed(9)
        @hypothesis.settings(
            max_examples=30, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck), phases=PHASES
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=good) | operation.as_strategy(generation_mode=bad))
        def check(case: Any) -> None:
            if case.meta.generation.mode == good and isinstance(case.body, dict):
                case.body["model"] = model
                case.body["max_tokens"] = 3  # so that some texts are generated, and not for long
                case.body.pop("max_completion_tokens", None)
            response = case.call(timeout=30)
            statuses.add(response.status_code)
            # A description cannot tell how many tokens a text has.
            case.validate_response(response, excluded_checks=[positive_data_acceptance])

        check()
    assert {200, 400, 404} <= statuses


PHASES = (hypothesis.Phase.explicit, hypothesis.Phase.generate)  # a failure is shown as it is: shrinking takes minutes


def message(**changes: Any) -> dict[str, Any]:
    return {"model": "", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2} | changes


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"model": "another"}, 404),
        ({"model": 7}, 400),
        ({"messages": []}, 400),
        ({"messages": "Hello"}, 400),
        ({"messages": [{"role": "user"}]}, 400),
        ({"messages": [{"role": "nobody", "content": "Hello"}]}, 400),
        ({"messages": [{"role": "user", "content": 7}]}, 400),
        ({"messages": [{"role": "user", "content": "long " * 200}]}, 400),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400),
        ({"max_tokens": 0}, 400),
        ({"max_tokens": -1}, 400),
        ({"max_tokens": 10**30}, 400),
        ({"max_tokens": "many"}, 400),
        ({"max_tokens": 1.5}, 400),
        ({"temperature": -1}, 400),
        ({"temperature": "hot"}, 400),
        ({"temperature": 1e400}, 400),
        ({"top_p": 2}, 400),
        ({"repetition_penalty": 5e-324}, 400),
        ({"seed": "x"}, 400),
        ({"stop": 5}, 400),
        ({"stop": [""] * 100}, 400),
        ({"stream": "perhaps"}, 400),
        ({"n": 1000}, 400),
    ],
)
def test_wrong_values(server: Running, model: str, changes: dict[str, Any], status: int) -> None:
    body = message(model=model) | changes
    done = httpx2.post(server.url + CHAT, content=json.dumps(body), headers={"content-type": "application/json"}, timeout=30)
    assert done.status_code == status, done.text
    error = done.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b'{"model": "\xc3\x28", "messages": []}',
        b"null",
        b"[]",
        b'"text"',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"max_tokens": ' + b"9" * 10_000 + b"}",
        b'{"model": NaN}',
    ],
    ids=["empty", "cut", "not-utf8", "broken-utf8", "null", "list", "string", "deep-list", "deep-object", "long-number", "nan"],
)
def test_broken_json(server: Running, body: bytes) -> None:
    done = httpx2.post(server.url + CHAT, content=body, headers={"content-type": "application/json"}, timeout=30)
    assert done.status_code == 400, done.text
    assert done.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", CHAT, 405), ("POST", "/v1/models", 405)]
)
def test_wrong_places(server: Running, method: str, path: str, status: int) -> None:
    assert httpx2.request(method, server.url + path, timeout=30).status_code == status


@pytest.mark.parametrize("path", ["/../settings.py", "/%2e%2e/settings.py", "/..%2fsettings.py", "//etc/passwd"])
def test_static_files_stay_inside(server: Running, path: str) -> None:
    answer = exchange(server, [f"GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".encode()])
    assert status_of(answer) in (400, 404)


def connect(server: Running) -> socket.socket:
    address = urlsplit(server.url)
    assert address.port is not None
    return socket.create_connection((str(address.hostname), address.port), timeout=30)


def exchange(server: Running, pieces: Any, pause: float = 0.0) -> bytes:
    """What the server answers until it closes; it may close before everything is sent."""
    with connect(server) as line:
        try:
            for piece in pieces:
                line.sendall(piece)
                time.sleep(pause)
        except OSError:
            pass
        answer = b""
        try:
            while data := line.recv(65536):
                answer += data
        except ConnectionError:
            pass
        return answer


def status_of(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:200]
    return int(answer.split(b" ", 2)[1])


HEAD = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n".encode()


def test_hundred_megabytes_announced(server: Running) -> None:
    """Refused before the body is read: it is not even sent."""
    start = time.monotonic()
    answer = exchange(server, [HEAD + b"connection: close\r\ncontent-length: 100000000\r\n\r\n"])
    assert status_of(answer) == 413
    assert time.monotonic() - start < READ_SECONDS + 5


def test_hundred_megabytes_unannounced(server: Running) -> None:
    """Chunks without a content-length; the server answers, or closes, long before all of it has arrived."""
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        yield HEAD + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
        piece = b"10000\r\n" + b"a" * 65536 + b"\r\n"
        for _ in range(1526):
            yield piece
            sent += 65536
        yield b"0\r\n\r\n"

    answer = exchange(server, chunks())
    assert not answer or status_of(answer) == 413  # a connection that is reset may take the answer with it
    assert sent < 50_000_000


def dribble(text: bytes) -> Iterator[bytes]:
    for i in range(len(text)):
        yield text[i : i + 1]


@pytest.mark.parametrize(
    "pieces",
    [
        lambda: dribble(HEAD * 20),
        lambda: [HEAD],
        lambda: [HEAD + b"content-length: 500\r\n\r\n", *dribble(b"{" * 500)],
        lambda: [HEAD + b"content-length: 500\r\n\r\n{"],
        lambda: [HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\n{"],
    ],
    ids=["head", "head-stalled", "body", "body-stalled", "chunk-stalled"],
)
def test_slow_loris(server: Running, pieces: Any) -> None:
    """A head or a body that never ends is given up, with 408 or by closing."""
    start = time.monotonic()
    answer = exchange(server, pieces(), pause=0.05)
    assert not answer or status_of(answer) == 408
    assert time.monotonic() - start < READ_SECONDS + 8


def test_many_idle_connections(server: Running) -> None:
    """Clients that connect and say nothing keep nobody out."""
    lines = [connect(server) for _ in range(200)]
    try:
        assert httpx2.get(f"{server.url}/v1/models", timeout=30).status_code == 200
    finally:
        for line in lines:
            line.close()


@pytest.mark.parametrize(
    "head",
    [
        b"NONSENSE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS hello
        HEAD + b"content-length: -5\r\n\r\n",
        HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n",
        HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nxyz\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 20_000 + b"\r\n",
    ],
    ids=["nonsense", "tls", "negative", "two-lengths", "length-and-chunks", "chunk-size", "long-path", "many-headers"],
)
def test_broken_http(server: Running, head: bytes) -> None:
    answer = exchange(server, [head])
    assert not answer or 400 <= status_of(answer) < 500
