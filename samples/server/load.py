"""Load on a running server, and the proof that no answer changes under it.

    python samples/server/load.py http://127.0.0.1:8000/v1 --clients 32 --seconds 180 --cancel 0.1 --pid PID

First every prompt is answered alone, twice: these greedy texts are the reference, and the second round gives the throughput of
one request at a time. Then every client asks the longest at once, so that memory that stays is touched; then all clients ask
at random for the given seconds, and leave a share of the answers half-way. Exit code 1 when a text differs from its reference,
a request is lost or stuck, or the server's memory has grown by more than 5 %; 2 when it cannot begin.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import openai
import psutil
from tqdm import tqdm

BOOK = Path(__file__).parents[1] / "data" / "moby_dick_1.txt"
MOST_GROWTH = 1.05
"""Memory after the load over memory before it."""


@dataclass(frozen=True)
class Case:
    """A prompt and the most tokens of its answer."""

    prompt: str
    max_tokens: int


@dataclass
class Answer:
    """What came of a request. times: when each event with text came, in seconds; tokens: as the server counts them."""

    case: int
    start: float
    end: float = 0.0
    text: str = ""
    finish: str | None = None
    tokens: int = 0
    times: list[float] = field(default_factory=list)
    cancelled: bool = False
    failure: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        return asyncio.run(measure(options))
    except KeyboardInterrupt:
        return 130


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    what = "Load on a running server; exit code 1 when an answer changes or is lost."
    parser = argparse.ArgumentParser(prog="load.py", description=what)
    parser.add_argument("url", help="base of the API, as http://127.0.0.1:8000/v1")
    parser.add_argument("--clients", type=whole, default=32, help="requests at a time (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=180, help="length of the load (default %(default)s)")
    parser.add_argument("--cancel", type=float, default=0.1, help="share of answers left in the middle (default %(default)s)")
    parser.add_argument("--prompts", type=whole, default=12, help="different prompts (default %(default)s)")
    parser.add_argument("--characters", type=wholes, default="40,400,1600", help="lengths of prompts (default %(default)s)")
    parser.add_argument("--tokens", type=wholes, default="16,48,96", help="lengths of answers (default %(default)s)")
    parser.add_argument("--timeout", type=float, default=120, help="seconds without a token: stuck (default %(default)s)")
    parser.add_argument("--retries", type=int, default=0, help="times to ask again when refused (default %(default)s)")
    parser.add_argument("--pid", type=whole, action="append", default=[], help="server process whose memory is watched")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of prompts and of answers that are left")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args(arguments)
    if not 0 <= options.cancel <= 1:
        refuse(f"--cancel is {options.cancel}: must be from 0 to 1")
    for name in ("seconds", "timeout"):
        if not getattr(options, name) > 0:
            refuse(f"--{name} is {getattr(options, name)}: must be more than 0")
    for pid in options.pid:
        if not psutil.pid_exists(pid):
            refuse(f"--pid is {pid}: there is no such process")
    return options


def whole(text: str) -> int:
    if not (value := int(text)) >= 1:
        raise ValueError
    return value


def wholes(text: str) -> list[int]:
    return [whole(part) for part in text.split(",")]


def refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def make_cases(count: int, characters: Sequence[int], tokens: Sequence[int]) -> list[Case]:
    """Passages of a book, each asked to be continued; every length of prompts meets every length of answers."""
    text = " ".join(BOOK.read_text(encoding="utf-8").split())
    cases = []
    for i in range(count):
        length = characters[i % len(characters)]
        start = i * 997 % max(len(text) - length, 1)
        cases.append(Case(text[start : start + length], tokens[i // len(characters) % len(tokens)]))
    return cases


class Load:
    """Requests to one server, and what came of them."""

    def __init__(self, client: openai.AsyncOpenAI, model: str, cases: Sequence[Case]) -> None:
        self.client = client
        self.model = model
        self.cases = cases

    async def ask(self, case: int, leave_after: int | None = None) -> Answer:
        """Stream a greedy answer; leave it after that many events. Never raises: what went wrong is the answer's `failure`."""
        answer = Answer(case, time.perf_counter())
        wanted = self.cases[case]
        try:
            stream = await self.client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": wanted.prompt}],
                max_tokens=wanted.max_tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
            async with stream:
                async for event in stream:
                    if event.usage is not None:
                        answer.tokens = event.usage.completion_tokens
                    for choice in event.choices:
                        answer.finish = choice.finish_reason or answer.finish
                        if choice.delta.content:
                            answer.text += choice.delta.content
                            answer.times.append(time.perf_counter())
                    if leave_after is not None and len(answer.times) >= leave_after and answer.finish is None:
                        answer.cancelled = True
                        break
        except openai.APITimeoutError:
            answer.failure = "stuck"
        except openai.APIStatusError as error:
            answer.failure = f"status {error.status_code}"
        except Exception as error:  # a stream that breaks off raises what the transport raises
            answer.failure = f"lost ({type(error).__name__})"
        answer.end = time.perf_counter()
        if answer.failure is None and not answer.cancelled and answer.finish is None:
            answer.failure = "lost (no finish_reason)"
        return answer

    async def alone(self, label: str) -> list[Answer]:
        """The answer to every prompt, one at a time."""
        return [await self.ask(i) for i in tqdm(range(len(self.cases)), desc=label, unit="prompt", leave=False)]

    async def together(
        self, clients: int, seconds: float, cancel: float, seed: int, timeout: float
    ) -> tuple[list[Answer], float]:
        """All clients at once, at random; every answer, and the moment the load ended."""
        end = time.perf_counter() + seconds
        answers: list[Answer] = []
        bar = tqdm(total=round(seconds), desc=f"{clients} clients", unit="s", leave=False)

        async def client(number: int) -> None:
            chance = random.Random(f"{seed} {number}")
            while time.perf_counter() < end:
                case = chance.randrange(len(self.cases))
                leave = chance.randint(1, max(self.cases[case].max_tokens // 2, 1)) if chance.random() < cancel else None
                answers.append(await self.ask(case, leave))

        async def watch() -> None:
            while True:
                await asyncio.sleep(0.5)
                bar.update(min(round(seconds - (end - time.perf_counter())), bar.total) - bar.n)
                bar.set_postfix(answers=len(answers))

        watcher = asyncio.create_task(watch())
        tasks = [asyncio.create_task(client(i)) for i in range(clients)]
        # The client's own time limit is one between two tokens; this one is for answers that dribble for ever.
        _, late = await asyncio.wait(tasks, timeout=seconds + 4 * timeout)
        for task in late:
            task.cancel()
            answers.append(Answer(-1, end, failure="stuck"))
        await asyncio.gather(*tasks, return_exceptions=True)
        watcher.cancel()
        bar.close()
        return answers, end


def judge(answer: Answer, references: Sequence[Answer]) -> str:
    """`completed` or `left`, or in words what is wrong."""
    if answer.failure is not None:
        return answer.failure
    reference = references[answer.case]
    if answer.cancelled:
        return "left" if reference.text.startswith(answer.text) else "left, and no prefix of the reference"
    same = (answer.text, answer.finish, answer.tokens) == (reference.text, reference.finish, reference.tokens)
    return "completed" if same else "differs from the reference"


def resident(pids: Sequence[int]) -> int:
    """Resident bytes of the processes and their children; 0 when one has died."""
    try:
        trees = [[process, *process.children(recursive=True)] for process in map(psutil.Process, pids)]
        return sum(process.memory_info().rss for tree in trees for process in tree)
    except psutil.NoSuchProcess:
        return 0


def milliseconds(values: Sequence[float], share: float) -> float | None:
    return round(float(np.percentile(values, share)) * 1000, 1) if len(values) else None


def figures(answers: Sequence[Answer], alone: Sequence[Answer], start: float, end: float) -> dict[str, Any]:
    """Latencies of the load and throughputs, in tokens that came while it lasted."""
    tokens = 0.0
    for answer in answers:
        if answer.times:  # an event may hold several tokens
            events = sum(start <= moment <= end for moment in answer.times)
            tokens += events * (max(answer.tokens, 1) / len(answer.times) if answer.tokens else 1)
    first = [answer.times[0] - answer.start for answer in answers if answer.times]
    gaps = [float(gap) for answer in answers for gap in np.diff(answer.times)]
    one = sum(answer.tokens for answer in alone) / sum(answer.end - answer.start for answer in alone)
    return {
        "first_token_ms": {"p50": milliseconds(first, 50), "p99": milliseconds(first, 99)},
        "between_tokens_ms": {"p50": milliseconds(gaps, 50), "p99": milliseconds(gaps, 99)},
        "tokens_per_second": round(tokens / (end - start), 1),
        "tokens_per_second_alone": round(one, 1),
        "ratio": round(tokens / (end - start) / one, 2),
    }


def show(report: dict[str, Any]) -> None:
    rows = [("requests", report["requests"]), *report["outcomes"].items()]
    for name, label in (("first_token_ms", "first token"), ("between_tokens_ms", "between tokens")):
        rows += [(f"{label}, {p}, ms", report[name][p]) for p in ("p50", "p99")]
    rows += [("tokens/s", report["tokens_per_second"]), ("tokens/s, one at a time", report["tokens_per_second_alone"])]
    rows += [("ratio", report["ratio"])]
    if report["rss_bytes"]:
        before, after = report["rss_bytes"]
        rows += [("memory before, MB", f"{before / 1e6:.1f}"), ("memory after, MB", f"{after / 1e6:.1f}")]
    for label, value in rows:
        print(f"{label:40}{'-' if value is None else value:>12}")


async def measure(options: argparse.Namespace) -> int:
    key = os.environ.get("OPENAI_API_KEY", "none")
    client = openai.AsyncOpenAI(base_url=options.url, api_key=key, timeout=options.timeout, max_retries=options.retries)
    async with client:
        try:
            model = (await client.models.list()).data[0].id
        except (openai.OpenAIError, IndexError, ValueError) as error:
            refuse(f"{options.url} gives no models ({error}); start the server, and give the address that ends in /v1")
        load = Load(client, model, make_cases(options.prompts, options.characters, options.tokens))
        references = await load.alone("reference")
        for answer in references:
            if answer.failure is not None:
                length = len(load.cases[answer.case].prompt)
                refuse(f"a request alone failed already, with a prompt of {length} characters: {answer.failure}")
        again = await load.alone("one at a time")
        longest = max(range(len(load.cases)), key=lambda i: (len(load.cases[i].prompt), load.cases[i].max_tokens))
        burst = await asyncio.gather(*[load.ask(longest) for _ in range(options.clients)])
        before = resident(options.pid)
        start = time.perf_counter()
        answers, end = await load.together(options.clients, options.seconds, options.cancel, options.seed, options.timeout)
        await asyncio.sleep(1)  # answers that were left are dropped by now
        after = resident(options.pid)

    outcomes = Counter(judge(answer, references) for answer in [*references, *again, *burst, *answers])
    report: dict[str, Any] = {
        "model": model,
        "clients": options.clients,
        "seconds": options.seconds,
        "requests": outcomes.total(),
        "outcomes": dict(sorted(outcomes.items())),
        **figures(answers, again, start, end),
        "rss_bytes": [before, after] if options.pid else None,
    }
    failures = [f"{count} requests: {outcome}" for outcome, count in outcomes.items() if outcome not in ("completed", "left")]
    if options.pid and not 0 < after <= MOST_GROWTH * before:
        grown = f"the server's memory went from {before / 1e6:.1f} to {after / 1e6:.1f} MB"
        failures.append(grown if after else "the server has died")
    report["failures"] = failures
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
