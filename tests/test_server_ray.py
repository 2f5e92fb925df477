"""samples/server/ray: the config file, with Ray on this machine; a replica killed under load costs only what it was doing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from server_sample import load_program
from tiny_models import export_tiny

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "samples" / "server" / "ray" / "serve.yaml"
pytest.importorskip("ray.serve", reason="ray[serve] is not installed (extra ray)")


def test_config_is_whole() -> None:
    """What the file names exists, and its numbers agree with each other."""
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    assert application["import_path"] == "server.ray.app:build"
    args = application["args"]
    assert deployment["max_ongoing_requests"] == args["rows"] + args["queue"]
    assert deployment["ray_actor_options"]["num_cpus"] == args["threads"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({}, "artefact is '.', no artefact folder"),
        ({"artefact": "nowhere"}, "artefact is 'nowhere', no artefact folder"),
        ({"artefact": "nowhere", "row": 3}, "args of serve.yaml has 'row': must be one of artefact, "),
    ],
)
def test_wrong_args(args: dict[str, Any], words: str) -> None:
    from attnspan.planner.errors import UserError
    from server.ray.app import read_settings

    with pytest.raises(UserError) as refused:
        read_settings(args)
    assert str(refused.value).startswith(words)


@pytest.mark.parametrize("begun", [False, True])
def test_lost_requests_are_answered(begun: bool) -> None:
    """503 with Retry-After where the proxy sends nothing; nothing is added to an answer that had begun."""
    from server.ray.retry import middlewares

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    (middleware,) = middlewares()
    asyncio.run(middleware.cls(proxy)({"type": "http"}, None, send))
    if begun:
        assert [message.get("status") for message in sent] == [200]
        return
    start, body = sent
    assert start["status"] == 503
    assert dict(start["headers"])[b"retry-after"] == b"1"
    assert json.loads(body["body"])["error"]["code"] == "replica_lost"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def readme_commands() -> tuple[dict[str, str], list[str]]:
    """The variables that the README sets, and the command that it gives."""
    text = (CONFIG.parents[1] / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sh\n(export PYTHONPATH.*?)```", text, re.DOTALL)
    export, command, _ = block.splitlines()
    pairs = [word.split("=", 1) for word in shlex.split(export)[1:]]
    return {name: value.replace("$PWD", str(ROOT)) for name, value in pairs}, shlex.split(command)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`serve run` of the config file on a cluster of its own; the address."""
    import psutil

    folder = tmp_path_factory.mktemp("ray")
    artefact = export_tiny(folder, n_max=1024).folder
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["http_options"]["port"] = port = free_port()
    config["applications"][0]["args"]["artefact"] = str(artefact)
    (folder / "serve.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (variables, command) = readme_commands()
    assert command == ["serve", "run", "samples/server/ray/serve.yaml"]
    environment = {
        **os.environ,
        **variables,
        "RAY_USAGE_STATS_ENABLED": "0",
        # A machine that is busy starts Ray's processes slowly.
        "RAY_raylet_start_wait_time_s": "200",
        "RAY_gcs_server_request_timeout_seconds": "200",
        "RAY_agent_register_timeout_ms": "200000",
        "RAY_worker_register_timeout_seconds": "200",
        "RAY_ADDRESS": "local",  # never a cluster that runs here already
    }
    log = folder / "log"
    with log.open("wb") as out:
        command = [str(Path(sys.executable).with_name("serve")), "run", str(folder / "serve.yaml")]
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
    try:
        end = time.monotonic() + 240
        while len(replicas(f"http://127.0.0.1:{port}")) < 2:
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < end, log.read_text(errors="replace")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        # Ray's processes end with it, but not at once, and not all after a crash.
        for left in psutil.pids():
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(left) == process.pid:
                    os.kill(left, signal.SIGKILL)


def replicas(url: str) -> set[str]:
    """Starts of the processes that answer twelve sessions; empty while nobody answers."""
    found = set()
    for i in range(12):
        request = urllib.request.Request(f"{url}/metrics", headers={"x-session-id": f"conversation {i}"})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                found.add(answer.read().decode().split("\nprocess_start_time_seconds ")[1].split()[0])
        except (OSError, IndexError):
            return set()
    return found


@pytest.mark.samples
def test_sessions_and_a_killed_replica(cluster: str) -> None:
    asyncio.run(kill_under_load(cluster, load_program()))


async def kill_under_load(url: str, load: ModuleType) -> None:
    import httpx2
    import openai
    import psutil

    def client(session: str, retries: int = 0) -> Any:
        headers = {"x-session-id": session}
        return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=retries, default_headers=headers)

    async def replica(session: str) -> float:
        """When the process that answers this session was started: that tells replicas apart."""
        async with httpx2.AsyncClient() as web:
            text = (await web.get(f"{url}/metrics", headers={"x-session-id": session}, timeout=30)).text
        return float(text.split("\nprocess_start_time_seconds ")[1].split()[0])

    names = [f"conversation {i}" for i in range(12)]
    of = {name: await replica(name) for name in names}
    for name in names * 3:
        assert await replica(name) == of[name]
    assert len(set(of.values())) == 2

    cases = load.make_cases(4, [20, 90], [40, 300])
    model = (await client("any").models.list()).data[0].id
    references = await load.Load(client("any"), model, cases).alone("reference")
    assert [answer.failure for answer in references] == [None] * 4

    doomed = of[names[0]]
    workers = [p for p in psutil.process_iter(["name", "create_time"]) if p.info["name"].startswith("ray::ServeRepl")]
    victim = min(workers, key=lambda p: abs(p.info["create_time"] - doomed))
    assert abs(victim.info["create_time"] - doomed) < 0.5
    answers: dict[str, list[Any]] = {name: [] for name in names}
    end = time.perf_counter() + 20

    async def talk(name: str) -> None:
        asking = load.Load(client(name), model, cases)
        number = names.index(name)
        while time.perf_counter() < end:
            number += 1
            answers[name].append(await asking.ask(number % len(cases)))
            if answers[name][-1].failure is not None:
                await asyncio.sleep(0.2)

    async def patient() -> Any:
        """A client that asks again by itself, as OpenAI's does by default, and does not see that anything was lost."""
        body: Any = [{"role": "user", "content": "Go on"}]
        return await client(names[0], 3).chat.completions.create(model=model, messages=body, max_tokens=700, temperature=0)

    tasks = [asyncio.create_task(talk(name)) for name in names]
    waiting = asyncio.create_task(patient())
    await asyncio.sleep(3)
    victim.kill()
    killed = time.perf_counter()
    assert (await waiting).choices[0].finish_reason in ("stop", "length")
    await asyncio.gather(*tasks)

    lost = 0
    for name, got in answers.items():
        assert [answer.end > killed for answer in got].count(True) >= 1
        for answer in got:
            if answer.failure is None:
                assert load.judge(answer, references) == "completed"
            else:
                lost += 1
                assert of[name] == doomed, f"{answer.failure} for a session of the other replica"
                assert answer.start < killed, f"{answer.failure} for a request that came after"
                assert answer.failure == "status 503" or answer.failure.startswith("lost (")
        again = min(answer.times[0] for answer in got if answer.failure is None and answer.start > killed)
        assert again - killed < 30
    assert lost >= 1
    while len({await replica(name) for name in names}) < 2:  # a new replica has taken the place of the killed one
        assert time.perf_counter() < killed + 120
        await asyncio.sleep(1)
