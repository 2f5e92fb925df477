"""The generation loop: prefill row by row, then decode all rows together. Drives any backend."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from attnspan.planner.errors import UserError
from attnspan.planner.rules import check_int
from attnspan.runtime.sampling import Sampler, Sampling
from attnspan.runtime.state import SequenceState

__all__ = ["DEFAULT_NEW_TOKENS", "IDLE", "Backend", "Generation", "generate"]

DEFAULT_NEW_TOKENS = 256
"""New tokens when none are asked for; fewer where the context ends."""
IDLE = -1
"""Given to `Backend.decode` instead of a token for a row that takes no part in the step."""

OnToken = Callable[[int, int], None]
"""Called as (row, token) for every token chosen."""
OnProgress = Callable[[int, int, int], None]
"""Called as (row, tokens done, tokens in all) before the first chunk of a prefill and after each."""


class Backend(Protocol):
    """What the loop needs of a session: rows with lengths of their own and caches that stay between calls."""

    vocab_size: int
    state: SequenceState

    def prefill(
        self, row: int, tokens: Sequence[int], keep: int = 1, on_progress: OnProgress | None = None
    ) -> npt.NDArray[np.float32]:
        """Append tokens to a row; logits of the last `keep` of them, [keep, vocab]."""

    def decode(self, tokens: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Append one token to each row, none where it is IDLE; logits [batch, vocab]."""


@dataclass
class Generation:
    """What one row generated.

    tokens: ids, a stop token included. text: filled in by callers that know a tokenizer. finish_reason:
    `stop` (a stop token), `length` (max_new_tokens) or `context` (n_max reached). prompt_tokens: tokens
    prefilled. ttft: seconds from the call to the first token; token_seconds: seconds of each token after it
    (the step of the whole batch).
    """

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    text: str | None = None
    finish_reason: str = ""
    ttft: float = 0.0
    token_seconds: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Decode speed of this row, the first token left out; 0 when there was no second."""
        seconds = sum(self.token_seconds)
        return len(self.token_seconds) / seconds if seconds > 0 else 0.0


def generate(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    stop_tokens: frozenset[int] = frozenset(),
    on_token: OnToken | None = None,
    on_progress: OnProgress | None = None,
) -> list[Generation]:
    """Append prompts[row] to each row and generate; one Generation a prompt.

    Rows beyond the prompts stay as they are. A token left pending by an earlier call goes in front of the
    new prompt. max_new_tokens None: DEFAULT_NEW_TOKENS, or fewer where n_max ends. UserError, before
    anything is computed, when a prompt is empty or does not fit with max_new_tokens. After an exception or
    Ctrl-C the rows hold what was computed, a row amid its prompt perhaps nothing; reset them to start again.
    """
    state = backend.state
    if not prompts or len(prompts) > state.batch:
        raise UserError(f"{len(prompts)} prompts: the session takes 1 to {state.batch}; change its batch")
    if max_new_tokens is not None:
        check_int("max_new_tokens", max_new_tokens, 1, 2**31 - 1, "; change --max-new-tokens")
    inputs = [_with_pending(state, row, prompt) for row, prompt in enumerate(prompts)]
    limits = [_limit(state, row, len(ids), max_new_tokens) for row, ids in enumerate(inputs)]
    samplers = [Sampler(sampling or Sampling(), backend.vocab_size, row) for row in range(len(inputs))]
    results = [Generation(prompt_tokens=len(ids)) for ids in inputs]

    def accept(row: int, logits: npt.NDArray[np.float32]) -> None:
        token = samplers[row].pick(logits)
        samplers[row].observe([token])
        result = results[row]
        result.tokens.append(token)
        state.pending[row] = token
        if token in stop_tokens:
            result.finish_reason = "stop"
        elif len(result.tokens) == limits[row]:
            # The last token stays pending: it needs no slot until a next turn.
            result.finish_reason = "context" if state.lengths[row] >= state.n_max - 1 else "length"
        if on_token is not None:
            on_token(row, token)

    start = time.perf_counter()
    for row, ids in enumerate(inputs):
        samplers[row].observe(state.tokens[row])
        samplers[row].observe(ids)
        logits = backend.prefill(row, ids, on_progress=on_progress)
        accept(row, logits[-1])
        results[row].ttft = time.perf_counter() - start

    feed = np.full(state.batch, IDLE, dtype=np.int64)
    before = time.perf_counter()
    while active := [row for row, result in enumerate(results) if not result.finish_reason]:
        feed[:] = IDLE
        for row in active:
            feed[row] = results[row].tokens[-1]
        logits = backend.decode(feed)
        for row in active:
            accept(row, logits[row])
        now = time.perf_counter()
        for row in active:
            results[row].token_seconds.append(now - before)
        before = now
    return results


def _with_pending(state: SequenceState, row: int, prompt: Sequence[int]) -> list[int]:
    ids = [int(token) for token in prompt]
    if not ids:
        raise UserError(f"the prompt of row {row} has no tokens: give at least one")
    pending = state.pending[row]
    return ids if pending is None else [pending, *ids]


def _limit(state: SequenceState, row: int, prompt: int, max_new_tokens: int | None) -> int:
    """New tokens that a row may generate; every one of them has a slot, so that a next turn can follow."""
    room = state.n_max - int(state.lengths[row]) - prompt
    if room < 1:
        state.check_room(row, prompt + 1)
    if max_new_tokens is None:
        return min(DEFAULT_NEW_TOKENS, room)
    if max_new_tokens > room:
        raise UserError(
            f"row {row}: {int(state.lengths[row])} tokens in the cache, {prompt} in the prompt and "
            f"{max_new_tokens} new ones make {state.n_max - room + max_new_tokens}: the artefact was built "
            f"for n_max = {state.n_max}; lower --max-new-tokens to {room} or less, shorten the "
            "prompt, or export with a larger --n-max"
        )
    return max_new_tokens
