"""The generation loop, rows and second turns, on a backend whose next token is a known function of its row."""

import subprocess
import sys
import zlib
from collections.abc import Sequence

import numpy as np
import pytest

from attnspan.planner.errors import UserError
from attnspan.planner.plan import ModelShape, Plan
from attnspan.planner.rules import HeadRule, span_tokens
from attnspan.runtime.generate import DEFAULT_NEW_TOKENS, IDLE, generate
from attnspan.runtime.sampling import Sampling
from attnspan.runtime.state import SequenceState

VOCAB = 50
RULES = [
    [HeadRule("span", 64, 0.25), HeadRule("dense")],
    [HeadRule("span", 0, 0.5), HeadRule("span", 200, 0)],
]


def plan(n_max: int = 512) -> Plan:
    return Plan(ModelShape("fake", 2, 4, 2, 8, None), n_max, RULES)


def following(tokens: Sequence[int]) -> int:
    """The token the fake model wants after these."""
    return zlib.crc32(np.array(tokens, dtype=np.int64).tobytes()) % VOCAB


class FakeBackend:
    """Logits peak at `following` of all tokens given to a row; notes what it was asked."""

    vocab_size = VOCAB

    def __init__(self, batch: int = 1, n_max: int = 512) -> None:
        self.state = SequenceState(plan(n_max), batch)
        self.given: list[list[int]] = [[] for _ in range(batch)]
        self.steps: list[list[int]] = []

    def _logits(self, row: int) -> np.ndarray:
        logits = np.linspace(0, 1, VOCAB, dtype=np.float32)
        logits[following(self.given[row])] = 5
        return logits

    def prefill(self, row, tokens, keep=1, on_progress=None):  # type: ignore[no-untyped-def]
        self.state.check_room(row, len(tokens))
        self.given[row] += tokens
        self.state.advance(row, tokens)
        if on_progress:
            on_progress(row, len(tokens), len(tokens))
        return self._logits(row)[None]

    def decode(self, tokens):  # type: ignore[no-untyped-def]
        self.steps.append(tokens.tolist())
        for row, token in enumerate(tokens.tolist()):
            if token != IDLE:
                self.state.check_room(row, 1)
                self.given[row].append(token)
                self.state.advance(row, [token])
        return np.stack([self._logits(row) for row in range(self.state.batch)])


def expected(prompt: Sequence[int], count: int, stop: Sequence[int] = ()) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < count:
        tokens.append(following(tokens))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


def test_greedy_rows_of_different_lengths() -> None:
    prompts = [[1], [2, 3, 4], [5] * 9]
    backend = FakeBackend(batch=4)
    results = generate(backend, prompts, max_new_tokens=7)
    assert [result.tokens for result in results] == [expected(prompt, 7) for prompt in prompts]
    assert [result.finish_reason for result in results] == ["length"] * 3
    assert [result.prompt_tokens for result in results] == [1, 3, 9]
    assert backend.state.lengths.tolist() == [7, 9, 15, 0]
    assert all(len(result.token_seconds) == 6 and result.ttft > 0 for result in results)
    assert all(step[3] == IDLE for step in backend.steps)


def test_a_row_that_stopped_takes_no_part_and_others_go_on() -> None:
    prompts = [[1], [2, 3, 4]]
    free = [expected(prompt, 30) for prompt in prompts]
    stop = next(token for token in free[0] if token not in free[1])
    backend = FakeBackend(batch=2)
    results = generate(backend, prompts, max_new_tokens=30, stop_tokens=frozenset([stop]))
    assert results[0].tokens == expected(prompts[0], 30, [stop])
    assert results[0].tokens[-1] == stop
    assert results[0].finish_reason == "stop"
    assert results[1].tokens == free[1]
    assert backend.state.lengths[0] == len(results[0].tokens)  # the stop token is pending
    assert all(step[0] == IDLE for step in backend.steps[len(results[0].tokens) - 1 :])


def test_callbacks_see_every_token_in_order() -> None:
    seen: list[tuple[int, int]] = []
    progress: list[tuple[int, int, int]] = []
    results = generate(
        FakeBackend(batch=2),
        [[1], [2, 3]],
        max_new_tokens=4,
        on_token=lambda row, token: seen.append((row, token)),
        on_progress=lambda *args: progress.append(args),
    )
    for row in range(2):
        assert [token for r, token in seen if r == row] == results[row].tokens
    assert progress == [(0, 1, 1), (1, 2, 2)]


def test_a_second_turn_puts_the_pending_token_first() -> None:
    backend = FakeBackend()
    first = generate(backend, [[1, 2]], max_new_tokens=5)[0]
    second = generate(backend, [[9, 9]], max_new_tokens=5)[0]
    assert second.prompt_tokens == 3
    assert second.tokens == expected([1, 2, *first.tokens, 9, 9], 5)
    assert backend.state.tokens[0] == [1, 2, *first.tokens, 9, 9, *second.tokens[:-1]]


def test_n_max_ends_a_generation_without_a_limit() -> None:
    backend = FakeBackend(n_max=128)
    result = generate(backend, [[1] * 100])[0]
    assert len(result.tokens) == 28
    assert result.finish_reason == "context"
    assert len(generate(FakeBackend(), [[1]])[0].tokens) == DEFAULT_NEW_TOKENS


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([[1] * 128], None, "128 tokens|n_max = 128"),
        (
            [[1] * 100],
            29,
            r"100 in the prompt and 29 new ones make 129.*n_max = 128; lower --max-new-tokens to 28",
        ),
        ([[1], [1] * 100], 29, "row 1"),
        ([[1], []], 5, "row 1 has no tokens"),
        ([[1]] * 3, 5, "1 to 2"),
        ([], 5, "0 prompts"),
        ([[1]], 0, "--max-new-tokens"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_computed(prompts: list, new: int | None, message: str) -> None:
    backend = FakeBackend(batch=2, n_max=128)
    with pytest.raises(UserError, match=message):
        generate(backend, prompts, max_new_tokens=new)
    assert backend.given == [[], []]


def test_sampling_repeats_with_a_seed() -> None:
    how = Sampling(temperature=3.0, seed=5)
    one, two = (generate(FakeBackend(2), [[1], [1]], max_new_tokens=20, sampling=how) for _ in range(2))
    assert [result.tokens for result in one] == [result.tokens for result in two]
    assert one[0].tokens != one[1].tokens


def test_spans_follow_each_row() -> None:
    state = SequenceState(plan(), 3)
    lengths = np.array([10, 300, 511], dtype=np.int32)
    spans = state.spans(lengths, np.array([True, True, False]))
    assert spans.dtype == np.int32
    assert spans.shape == (2, 3, 2)
    for layer in range(2):
        for head in range(2):
            rule = RULES[layer][head]
            for row in (0, 1):
                assert spans[layer, row, head] == span_tokens(rule.alpha, rule.beta, int(lengths[row]))
    assert (spans[:, 2] == 65).all()  # idle: the sinks and itself


def test_state_refuses_rows_it_has_not() -> None:
    state = SequenceState(plan(), 2)
    for row in (-1, 2):
        with pytest.raises(UserError, match="rows 0 to 1"):
            state.check_row(row)
    with pytest.raises(UserError, match="rows 0 to 1"):
        state.reset([2])


def test_reset_forgets_one_row() -> None:
    backend = FakeBackend(batch=2)
    generate(backend, [[1], [2]], max_new_tokens=3)
    backend.state.text[0] = "x"
    backend.state.reset([0])
    assert backend.state.lengths.tolist() == [0, 3]
    assert (backend.state.tokens[0], backend.state.pending[0], backend.state.text[0]) == ([], None, None)
    assert backend.state.pending[1] is not None


def test_modules_need_neither_torch_nor_onnxruntime() -> None:
    code = "import sys, attnspan.runtime.text, attnspan.runtime.generate; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "onnxruntime", "onnx", "transformers", "jinja2"} & set(loaded)
