"""samples/server by HTTP, in this process: answers, streams, refusals, metrics."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from sampled_artefacts import op_library
from starlette.testclient import TestClient
from tiny_models import export_tiny

from attnspan.cpu_runtime import Session
from attnspan.runtime.sampling import Sampling
from server.answers import Head, stream
from server.app import create_app
from server.jobs import Job, Update
from server.settings import Settings

CHUNK = 16
MESSAGES = [{"role": "user", "content": "a b c"}]


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("server"), n_max=512, library=op_library()).folder


@pytest.fixture(scope="module")
def client(artefact: Path) -> Iterator[TestClient]:
    with TestClient(create_app(settings(artefact))) as found:
        yield found


@pytest.fixture(scope="module")
def alone(artefact: Path) -> Session:
    """What runs one request at a time."""
    return Session(artefact, threads=1, chunk=CHUNK)


def settings(artefact: Path, **options: Any) -> Settings:
    return Settings(artefact, **({"model": "tiny", "rows": 4, "threads": 1, "chunk": CHUNK} | options))


def chat(client: TestClient, **more: Any) -> httpx2.Response:
    return client.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, "temperature": 0} | more)


def complete(client: TestClient, **more: Any) -> httpx2.Response:
    return client.post("/v1/completions", json={"model": "tiny", "prompt": "a b c", "temperature": 0} | more)


def events(answer: httpx2.Response) -> list[dict[str, Any]]:
    """The events of a stream, which must end as such streams do."""
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    *found, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") for event in found)
    return [json.loads(event.removeprefix("data: ")) for event in found]


def refusal(answer: httpx2.Response, status: int) -> dict[str, Any]:
    """The error of an answer, which must be of OpenAI's shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# Answers


def test_models_and_health(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert [card["id"] for card in listed["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny").json() == listed["data"][0]
    assert listed["data"][0]["context_length"] == 512
    assert refusal(client.get("/v1/models/other/one"), 404)["code"] == "model_not_found"
    assert client.get("/healthz").json() == {"status": "ok"}


def test_chat_is_what_the_session_answers(client: TestClient, alone: Session) -> None:
    want = alone.generate([MESSAGES], 24)[0]
    answer = chat(client, max_completion_tokens=24).json()
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": want.text, "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
        want.prompt_tokens,
        24,
        want.prompt_tokens + 24,
    )
    assert 0 < usage["attnspan"]["kv_bytes"] <= usage["attnspan"]["kv_bytes_dense"]
    assert (answer["object"], answer["model"]) == ("chat.completion", "tiny")
    parts = [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b c"}]}]
    assert chat(client, messages=parts, max_tokens=24).json()["choices"] == answer["choices"]


def test_completions_of_text_and_of_tokens(client: TestClient, alone: Session) -> None:
    want = alone.generate(["a b c"], 16)[0].text
    assert complete(client).json()["choices"][0]["text"] == want, "16 tokens when none are asked for"
    ids = alone.tokenizer.encode("a b c")
    assert complete(client, prompt=ids, max_tokens=16).json()["choices"][0]["text"] == want
    assert complete(client, prompt=[float(token) for token in ids], max_tokens=16.0).json()["choices"][0]["text"] == want


def test_sampling_is_the_sessions(client: TestClient, alone: Session) -> None:
    how = {"temperature": 0.9, "top_p": 0.8, "top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1}
    want = alone.generate(["a b c"], 20, Sampling(**how, seed=7))[0].text
    assert complete(client, **how, seed=7, max_tokens=20).json()["choices"][0]["text"] == want
    assert complete(client, **how, seed=8, max_tokens=20).json()["choices"][0]["text"] != want
    drawn = {complete(client, temperature=None, max_tokens=20).json()["choices"][0]["text"] for _ in range(3)}
    assert len(drawn) == 3, "OpenAI's default draws"


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_streams(kind: str, client: TestClient) -> None:
    """Pieces joined are the whole text; roles, finish and usage come where clients look for them."""
    ask = chat if kind == "chat" else complete
    whole = ask(client, max_tokens=40).json()
    found = events(ask(client, max_tokens=40, stream=True, stream_options={"include_usage": True}))
    *pieces, last = found
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in pieces)
    choices = [event["choices"][0] for event in pieces]
    if kind == "chat":
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        assert text == whole["choices"][0]["message"]["content"]
        assert choices[-1]["delta"] == {}
    else:
        assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert len({event["id"] for event in found}) == 1
    assert len(choices) > 2
    assert "usage" not in events(ask(client, max_tokens=2, stream=True))[-1]


def test_stop_texts(client: TestClient) -> None:
    text = complete(client, max_tokens=40).json()["choices"][0]["text"]
    stop = text[10:12]
    for given in (stop, ["\x00never", stop]):
        choice = complete(client, max_tokens=40, stop=given).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (text[: text.find(stop)], "stop")


# Refusals


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": "tiny", "messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": []}]}, "messages"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usages": True}}, "stream_options"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"tools": []}, "tools"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
        ({"max_tokens": 500}, "messages"),
    ],
)
def test_wrong_fields(change: dict[str, Any], param: str, client: TestClient) -> None:
    error = refusal(chat(client, **change), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_wrong_prompts(client: TestClient) -> None:
    for prompt in ("", [], [300], [-1], ["a"], [1.5], {"a": 1}, None):
        assert refusal(complete(client, prompt=prompt), 400)["param"] == "prompt"
    assert refusal(complete(client, model="tinier"), 404)["code"] == "model_not_found"
    message = refusal(complete(client, prompt=[5] * 510, max_tokens=5), 400)["message"]
    assert message == "510 tokens in the prompt and 5 new ones: the model takes 512 in all"
    assert complete(client, prompt=[5] * 500, max_tokens=12).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"5", b'"a"', b"\xff\xfe{}", b'{"model": "\xc3"}', b'{"prompt": "\\ud800", "model": "tiny"}', b"[" * 5000,
     b'{"model": "tiny", "prompt": "a", "temperature": NaN}', b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
     b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", b'{"model": "\\udc80", "prompt": "a"}'],
)  # fmt: skip
def test_broken_bodies(body: bytes, client: TestClient) -> None:
    for kind in ("application/json", "text/plain", "application/json; charset=utf-16"):
        refusal(client.post("/v1/completions", content=body, headers={"content-type": kind}), 400)


def test_wrong_paths_and_methods(client: TestClient) -> None:
    refusal(client.get("/v1/nothing"), 404)
    answer = client.get("/v1/completions")
    refusal(answer, 405)
    assert answer.headers["allow"] == "POST"
    refusal(client.post("/v1/models"), 405)


def test_large_bodies(artefact: Path) -> None:
    with TestClient(create_app(settings(artefact, max_body=2000))) as client:
        large = b'{"model": "tiny", "prompt": "' + b"a" * 2000 + b'"}'
        assert refusal(client.post("/v1/completions", content=large), 413)["code"] == "request_too_large"
        pieces = iter([large[i : i + 100] for i in range(0, len(large), 100)])
        refusal(client.post("/v1/completions", content=pieces), 413)
        assert complete(client, max_tokens=1).status_code == 200


def test_api_key(artefact: Path) -> None:
    with TestClient(create_app(settings(artefact, api_key="sésame"))) as client:
        for wrong in (None, "Bearer", "Bearer sesame", "Bearer sésame ouvre-toi", "Basic sésame", "sésame"):
            headers = {} if wrong is None else {"authorization": wrong.encode()}
            answer = client.get("/v1/models", headers=headers)
            assert refusal(answer, 401)["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/models", headers={"authorization": "Bearer sésame".encode()}).status_code == 200
        assert client.get("/healthz").status_code == 200
        assert client.get("/openapi.json").json()["components"]["securitySchemes"]


class Gate:
    """Holds back steps of an app's engine."""

    def __init__(self, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
        from server.session import BatchSession

        self.open = threading.Event()
        self.engine = client.app.state.engine  # type: ignore[attr-defined]
        honest = BatchSession.decode

        def decode(session: BatchSession, tokens: np.ndarray) -> np.ndarray:
            assert self.open.wait(60)
            return honest(session, tokens)

        monkeypatch.setattr(BatchSession, "decode", decode)

    def occupy(self, count: int) -> list[Job]:
        """Jobs that run, or wait, until the gate opens."""
        return [self.engine.submit([1], 5, Sampling(), (), lambda _: None) for _ in range(count)]


def test_queue_full(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with TestClient(create_app(settings(artefact, rows=1, queue=2))) as client:
        gate = Gate(client, monkeypatch)
        gate.occupy(3)
        for more in ({}, {"stream": True}):
            answer = complete(client, **more)
            error = refusal(answer, 429)
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        gate.open.set()
        while not gate.engine.idle:
            threading.Event().wait(0.01)
        assert complete(client).status_code == 200
        assert 'attnspan_refused_total{reason="busy"} 2.0' in client.get("/metrics").text


def test_kv_memory(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs whose caches do not fit yet wait; those that never will are refused."""
    token = 512  # bytes: 2 layers, 2 heads, 16 numbers of 4 bytes, keys and values
    with TestClient(create_app(settings(artefact, kv_bytes=100 * token))) as client:
        assert "101 tokens" not in refusal(complete(client, prompt=[1] * 90, max_tokens=12), 400)["message"]
        assert complete(client, prompt=[1] * 90, max_tokens=11).status_code == 200
        gate = Gate(client, monkeypatch)
        updates: list[Update] = []
        first = gate.engine.submit([1] * 60, 2, Sampling(), (), updates.append)
        second = gate.engine.submit([1] * 60, 2, Sampling(), (), updates.append)
        while not updates:
            threading.Event().wait(0.01)
        admission = gate.engine.admission
        assert (admission.running, admission.waiting) == (1, 1), "one of them fits at a time"
        assert admission.kv_used == first.kv_bytes == second.kv_bytes == 61 * token
        gate.open.set()
        while not gate.engine.idle:
            threading.Event().wait(0.01)
        assert [update.finish for update in updates if update.last] == ["length"] * 2


def test_a_server_that_drains_refuses(artefact: Path) -> None:
    with TestClient(create_app(settings(artefact))) as client:
        client.app.state.engine.begin_drain()  # type: ignore[attr-defined]
        for answer in (complete(client), client.get("/healthz")):
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 0
        assert refusal(complete(client), 503)["code"] == "draining"
        assert client.get("/healthz").json() == {"status": "draining"}


def test_a_failing_model_is_told(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from server.session import BatchSession

    def broken(*_: object) -> None:
        raise RuntimeError("out of order")

    with TestClient(create_app(settings(artefact))) as client:
        monkeypatch.setattr(BatchSession, "decode", broken)
        assert refusal(complete(client), 503)["message"] == "the model failed"
        streamed = complete(client, stream=True).text
        assert json.loads(streamed.split("\n\n")[-2].removeprefix("data: "))["error"]["message"] == "the model failed"
        assert "[DONE]" not in streamed
        monkeypatch.undo()
        assert complete(client).status_code == 200


def test_a_client_that_leaves_before_the_stream_begins(client: TestClient) -> None:
    class Listening:
        closed = False

        async def updates(self) -> AsyncIterator[Update]:
            yield Update("a", 1)

        def close(self) -> None:
            self.closed = True

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(_: object) -> None:
        await asyncio.sleep(60)  # nobody reads

    listener = Listening()
    answer = stream(Head("tiny", True), listener, False)  # type: ignore[arg-type]
    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    asyncio.run(asyncio.wait_for(answer(scope, receive, send), 10))  # type: ignore[arg-type]
    assert listener.closed


# What others read


def test_metrics(artefact: Path) -> None:
    with TestClient(create_app(settings(artefact))) as client:
        prompt = complete(client, max_tokens=9).json()["usage"]["prompt_tokens"]
        chat(client, model="other")
        text = client.get("/metrics").text
        for line in (
            f"attnspan_prompt_tokens_total {prompt:.1f}",
            "attnspan_generated_tokens_total 9.0",
            'attnspan_generations_total{reason="length"} 1.0',
            'attnspan_requests_total{path="/v1/completions",status="200"} 1.0',
            'attnspan_requests_total{path="/v1/chat/completions",status="404"} 1.0',
            "attnspan_time_to_first_token_seconds_count 1.0",
            "attnspan_time_between_tokens_seconds_count 8.0",
            "attnspan_running 0.0",
            "attnspan_waiting 0.0",
            "attnspan_kv_bytes 0.0",
        ):
            assert f"\n{line}\n" in text


def test_openapi(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{name}", "/healthz", "/metrics",
    }  # fmt: skip
    for path in document["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"]
    assert document["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False
    assert "ValidationError" not in json.dumps(document)
