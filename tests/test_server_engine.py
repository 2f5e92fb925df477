"""samples/server below HTTP: stop texts, admission, and the batching of jobs over a session."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sampled_artefacts import op_library
from tiny_models import export_tiny

from attnspan.cpu_runtime import Session
from attnspan.planner.errors import UserError
from attnspan.runtime.artefact import Artefact
from attnspan.runtime.sampling import Sampling
from server.admission import Admission
from server.engine import Engine
from server.jobs import BusyError, DrainingError, Job, TooLargeError, Update
from server.session import BatchSession, kept, kv_bytes
from server.settings import Settings
from server.stops import StopFinder

GREEDY = Sampling()
CHUNK = 16


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rings of 64 sinks and windows that wrap; with the op library where there is one."""
    return export_tiny(tmp_path_factory.mktemp("server"), n_max=512, library=op_library()).folder


@pytest.fixture
def engine(artefact: Path) -> Iterator[Engine]:
    with opened(artefact) as found:
        yield found


class opened:  # noqa: N801 - a context
    """An engine that works."""

    def __init__(self, artefact: Path, **options: int) -> None:
        self._engine = Engine(Settings(artefact, threads=1, **({"rows": 4, "chunk": CHUNK} | options)))

    def __enter__(self) -> Engine:
        self._engine.start()
        return self._engine

    def __exit__(self, *_: object) -> None:
        self._engine.close()


@dataclass
class Client:
    """Listens to one job."""

    updates: list[Update] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    seen: threading.Event = field(default_factory=threading.Event)

    def __call__(self, update: Update) -> None:
        self.updates.append(update)
        self.seen.set()
        if update.last:
            self.ended.set()

    def wait(self) -> Update:
        assert self.ended.wait(60)
        return self.updates[-1]

    @property
    def text(self) -> str:
        return "".join(update.text for update in self.updates)


def ask(engine: Engine, count: int, new: int, sampling: Sampling = GREEDY, stop: tuple[str, ...] = ()) -> tuple[Client, Job]:
    client = Client()
    return client, engine.submit(prompt(count), new, sampling, stop, client)


def prompt(count: int) -> list[int]:
    return np.random.default_rng(count).integers(0, 256, count).tolist()


def idle(engine: Engine) -> None:
    for _ in range(600):
        if engine.idle:
            return
        threading.Event().wait(0.05)
    raise AssertionError("the engine does not become idle")


# Stop texts


@given(st.lists(st.text("abc", max_size=4), max_size=8), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_stop_texts_are_found_wherever_pieces_end(pieces: list[str], stops: list[str]) -> None:
    finder, out = StopFinder(stops), ""
    for piece in pieces:
        out += finder.push(piece)
        # The stream ends with the piece that completes a stop text, as a generation does.
        if finder.found:
            break
    whole = "".join(pieces)
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    assert finder.found == bool(ends)
    out += finder.flush()
    if not ends:
        assert out == whole
    else:
        assert whole.startswith(out)
        assert not any(stop in out for stop in stops)
        assert any(whole.startswith(out + stop) for stop in stops)


def test_no_more_is_held_back_than_may_begin_a_stop_text() -> None:
    finder = StopFinder(["\n\nUser"])
    assert finder.push("a\n") == "a"
    assert finder.push("b") == "\nb"
    assert finder.push("\n\nUse") == ""
    assert finder.push("ful") == "\n\nUseful"


# Admission


def job(size: int = 1, kept: int = 0) -> Job:
    return Job([1], 1, GREEDY, lambda _: None, kv_bytes=size, kept=kept)


def test_admission_by_rows_bytes_and_queue() -> None:
    admission = Admission(rows=3, queue=2, kv_bytes=10, kept=100)
    jobs = [job(6), job(5), job(1), job(1), job(1)]
    for one in jobs:
        admission.submit(one)
    with pytest.raises(BusyError) as busy:
        admission.submit(job())
    assert 1 <= busy.value.retry_after <= 60
    assert admission.take() is jobs[0]
    assert admission.take() is None, "5 bytes do not fit, and nobody overtakes"
    assert (admission.running, admission.waiting, admission.kv_used) == (1, 4, 6)
    admission.finish(jobs[0])
    assert [admission.take() for _ in range(4)] == [*jobs[1:4], None], "three rows"
    admission.cancel(jobs[4])
    assert admission.waiting == 0
    with pytest.raises(TooLargeError, match="11 bytes of KV cache: the server has 10"):
        admission.submit(job(11))
    admission.refuse()
    with pytest.raises(DrainingError):
        admission.submit(job())
    for one in jobs[1:4]:
        admission.finish(one)
    assert admission.idle
    assert admission.kv_used == 0


def test_rows_that_could_change_each_others_bits_do_not_run_together() -> None:
    admission = Admission(rows=3, queue=2, kv_bytes=10, kept=100)
    large, small = job(kept=300), job(kept=60)
    admission.submit(large)
    admission.submit(small)
    assert admission.take() is large, "alone it disturbs nobody"
    assert admission.take() is None
    admission.finish(large)
    assert admission.take() is small


# The session


def test_widths_have_the_bits_of_full_steps(artefact: Path) -> None:
    session = BatchSession(Artefact.load(artefact), batch=6, threads=1, chunk=CHUNK)
    assert session.widths[-1] == 6
    assert set(session.widths) <= {1, 2, 4, 6}
    full = Session(artefact, batch=6, threads=1, chunk=CHUNK)
    for one in (session, full):
        for row in range(6):
            one.prefill(row, prompt(20 + 30 * row))
    for count in (6, 3, 1, 2, 4):
        feed = np.full(6, -1)
        feed[:count] = prompt(count)
        got, want = session.decode(feed), full.decode(feed)
        np.testing.assert_array_equal(got[:count], want[:count])
    assert session.lengths.tolist() == full.lengths.tolist()


def test_a_width_with_other_bits_is_not_used(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = BatchSession._compute_step

    def wrong(self: BatchSession, *step: np.ndarray) -> np.ndarray:
        logits = honest(self, *step)
        if self._width == 2:
            logits[1, 7] = np.nextafter(logits[1, 7], np.inf, dtype=np.float32)
        return logits

    monkeypatch.setattr(BatchSession, "_compute_step", wrong)
    session = BatchSession(Artefact.load(artefact), batch=4, threads=1)
    assert 2 not in session.widths
    assert session.widths[-1] == 4


def test_a_released_row_is_empty_and_its_neighbours_are_not(artefact: Path) -> None:
    session, other = (BatchSession(Artefact.load(artefact), batch=3, threads=1) for _ in range(2))
    for row in range(3):
        session.prefill(row, prompt(200 + row))
    other.prefill(2, prompt(202))
    session.release(1)
    assert session.lengths.tolist() == [200, 0, 202]
    array = session._caches.past[0]
    page = 4096 // array.itemsize
    assert not array[1].ravel()[page:-page].any(), "its pages were given back"
    assert array[0].any()
    np.testing.assert_array_equal(session.decode([-1, -1, 5])[2], other.decode([-1, -1, 5])[2])
    session.prefill(1, prompt(77))
    other.prefill(1, prompt(77))
    np.testing.assert_array_equal(session.decode([-1, 3, -1])[1], other.decode([-1, 3, -1])[1])


def test_bytes_of_a_row(artefact: Path) -> None:
    described = Artefact.load(artefact)
    assert kv_bytes(described, 10) == 2 * 10 * described.layers * described.kv_heads * described.head_dim * 4
    assert kv_bytes(described, described.n_max) == described.kv_bytes(1)
    assert kept(described, 10) == 10 * described.kv_heads
    assert kept(described, 512) == max(sum(layer) for layer in described.capacity)


# The engine


def test_texts_do_not_depend_on_who_else_is_there(artefact: Path, engine: Engine) -> None:
    """Greedy and seeded ones; as by `Session.generate` in chunks of the same size."""
    cases = [(count, new, how) for how in (GREEDY, Sampling(temperature=1.0, top_p=0.9, seed=5))
             for count, new in ((3, 20), (40, 7), (150, 60), (17, 33), (300, 12), (90, 90))]  # fmt: skip
    alone = []
    for count, new, how in cases:
        client, _ = ask(engine, count, new, how)
        assert client.wait().failure is None
        alone.append(client.text)
    for order in (1, -1):
        clients = [ask(engine, *case)[0] for case in cases[::order]]
        assert [client.wait().failure for client in clients] == [None] * len(cases)
        assert [client.text for client in clients][::order] == alone
    session = Session(artefact, threads=1, chunk=CHUNK)
    for (count, new, how), text in zip(cases, alone, strict=True):
        assert session.generate([prompt(count)], new, how)[0].text == text
    assert len(set(alone)) > 6


def test_how_generations_end(engine: Engine) -> None:
    client, _ = ask(engine, 40, 30)
    last = client.wait()
    assert (last.finish, last.tokens) == ("length", 30)
    stop = client.text[8:10]
    again, _ = ask(engine, 40, 30, stop=("never in it", stop))
    assert again.wait().finish == "stop"
    assert again.text == client.text[: client.text.find(stop)]
    only, _ = ask(engine, 40, 1)
    assert (only.wait().finish, only.updates[-1].tokens) == ("length", 1)
    full, _ = ask(engine, 412, 100)
    assert full.wait().tokens == 100, "prompt and answer may be n_max tokens"
    idle(engine)
    assert engine.metrics.registry.get_sample_value("attnspan_generations_total", {"reason": "length"}) == 3


def test_a_stop_token_ends_a_text(artefact: Path) -> None:
    engine = Engine(Settings(artefact, threads=1, rows=2))
    engine.artefact.__dict__["stop_tokens"] = frozenset(range(100, 300))
    engine.start()
    try:
        client, _ = ask(engine, 40, 100)
        last = client.wait()
        assert last.finish == "stop"
        assert last.tokens < 100
    finally:
        engine.close()


def test_cancelled_jobs_leave_their_rows(artefact: Path) -> None:
    with opened(artefact, rows=1, queue=8) as engine:
        running, running_job = ask(engine, 10, 500)
        waiting, waiting_job = ask(engine, 11, 5)
        following, _ = ask(engine, 12, 5)
        assert running.seen.wait(60)
        engine.cancel(waiting_job)
        engine.cancel(running_job)
        assert following.wait().finish == "length"
        idle(engine)
        assert not running.ended.is_set()
        assert not waiting.updates
        assert engine.admission.kv_used == 0


def test_a_job_can_be_cancelled_while_its_prompt_is_read(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(artefact, rows=2) as engine:
        chunks = []
        honest = BatchSession._compute_chunk

        def slow(self: BatchSession, row: int, tokens: np.ndarray, *rest: object) -> None:
            honest(self, row, tokens, *rest)
            chunks.append(len(tokens))
            if len(chunks) == 3:
                engine.cancel(long)

        monkeypatch.setattr(BatchSession, "_compute_chunk", slow)
        client, long = ask(engine, 400, 5)
        idle(engine)
        assert chunks == [CHUNK] * 3
        assert not client.updates


def test_a_long_prompt_does_not_hold_up_those_who_run(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of the running rows before each of its chunks."""
    with opened(artefact) as engine:
        honest_chunk, honest_step = BatchSession._compute_chunk, BatchSession._compute_step
        order: list[str] = []

        def chunk(self: BatchSession, *rest: object) -> None:
            order.append("chunk")
            honest_chunk(self, *rest)

        def step(self: BatchSession, *rest: object) -> np.ndarray:
            order.append("step")
            return honest_step(self, *rest)

        first, _ = ask(engine, 10, 300)
        assert first.seen.wait(60)
        monkeypatch.setattr(BatchSession, "_compute_chunk", chunk)
        monkeypatch.setattr(BatchSession, "_compute_step", step)
        second, _ = ask(engine, 10 * CHUNK, 3)
        second.wait()
        monkeypatch.undo()
        first.wait()
        start = order.index("chunk")
        assert order[start : start + 19] == ["chunk", "step"] * 9 + ["chunk"]


def test_a_failing_model_fails_those_it_concerns(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(artefact) as engine:
        honest = BatchSession.decode

        def broken(self: BatchSession, tokens: np.ndarray) -> np.ndarray:
            raise RuntimeError("out of order")

        monkeypatch.setattr(BatchSession, "decode", broken)
        client, _ = ask(engine, 10, 5)
        assert client.wait().failure == "the model failed"
        monkeypatch.setattr(BatchSession, "decode", honest)
        again, _ = ask(engine, 10, 5)
        assert again.wait().finish == "length"
        assert not engine.failed


def test_drain_and_close(artefact: Path) -> None:
    with opened(artefact, rows=1) as engine:
        running, _ = ask(engine, 10, 100)
        waiting, _ = ask(engine, 11, 5)
        engine.begin_drain()
        with pytest.raises(DrainingError):
            ask(engine, 12, 5)
        assert running.wait().failure is None
        assert waiting.wait().failure is None, "who was accepted is served"
        assert engine.idle
    with opened(artefact, rows=1) as engine:
        running, _ = ask(engine, 10, 500)
        waiting, _ = ask(engine, 11, 5)
        assert running.seen.wait(60)
        engine.close()
        assert running.wait().failure == waiting.wait().failure == "the server stops"


def test_settings_out_of_range(artefact: Path) -> None:
    for options, words in [
        ({"rows": 0}, "rows is 0: must be an integer from 1 to 1024; change --rows"),
        ({"queue": -1}, "queue is -1"),
        ({"read_seconds": float("nan")}, "read_seconds is nan"),
        ({"max_body": 1}, "max_body is 1"),
    ]:
        with pytest.raises(UserError, match=words):
            Settings(artefact, **options)
    with pytest.raises(UserError, match="kv_bytes is 5: one row takes 512 at least; change --kv-memory"):
        Engine(Settings(artefact, kv_bytes=5))
