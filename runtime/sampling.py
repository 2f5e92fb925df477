"""From one row of logits to the next token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attnspan.planner.errors import UserError
from attnspan.planner.rules import check_int, check_number

__all__ = ["Sampler", "Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Applied in the order of Hugging Face transformers.

    repetition_penalty in [0.01, 100], 1 = none, divides positive and multiplies negative logits of tokens already in
    the row; temperature 0 is greedy; top_k 0 = all; top_p in (0, 1], 1 = all; min_p in [0, 1], 0 = all,
    relative to the likeliest token; seed None draws from the system. UserError on a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, 0.0, 100.0, "; change --temperature")
        check_int("top_k", self.top_k, 0, 2**31 - 1, "; change --top-k")
        check_number("min_p", self.min_p, 0.0, 1.0, "; change --min-p")
        if check_number("top_p", self.top_p, 0.0, 1.0, "; change --top-p") == 0.0:
            raise UserError("top_p is 0: must be above 0; change --top-p")
        # Below 0.01 a quotient can leave the range of float32.
        check_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0, "; change --repetition-penalty")
        if self.seed is not None:
            check_int("seed", self.seed, 0, 2**63 - 1, "; change --seed")


class Sampler:
    """Chooses the tokens of one row; rows of a batch draw from streams of their own."""

    def __init__(self, sampling: Sampling, vocab_size: int, row: int = 0) -> None:
        self._how = sampling
        seed = None if sampling.seed is None else [sampling.seed, row]
        self._random = np.random.default_rng(seed)
        self._seen = np.zeros(vocab_size, dtype=bool) if sampling.repetition_penalty != 1.0 else None

    def observe(self, tokens: Iterable[int]) -> None:
        """Note tokens that the row holds, for the repetition penalty."""
        if self._seen is not None:
            self._seen[np.fromiter(tokens, dtype=np.int64)] = True

    def pick(self, logits: npt.NDArray[np.float32]) -> int:
        """Next token from logits [vocab]; RuntimeError when they are not numbers."""
        if self._seen is not None:
            penalty = np.float32(self._how.repetition_penalty)
            scaled = np.where(logits > 0, logits / penalty, logits * penalty)
            logits = np.where(self._seen, scaled, logits)
        best = int(np.argmax(logits))
        if not np.isfinite(logits[best]):
            raise RuntimeError(f"the model produced no usable logits (largest is {logits[best]}): not a number")
        if self._how.temperature == 0.0:
            return best
        # A tiny temperature sends all but the best to weight 0; as a float32 it must not become 0 itself.
        temperature = np.float32(max(self._how.temperature, float(np.finfo(np.float32).tiny)))
        with np.errstate(over="ignore"):
            weights = np.exp((logits - logits[best]) / temperature)
        self._filter(weights)
        sums = np.cumsum(weights, dtype=np.float64)
        # Weights of 0 do not move the sum: side "right" steps over them. The product may round up to the sum.
        drawn = np.searchsorted(sums, self._random.random() * sums[-1], side="right")
        return int(min(drawn, np.searchsorted(sums, sums[-1])))

    def _filter(self, weights: npt.NDArray[np.float32]) -> None:
        """Set to 0 what top-k, top-p and min-p leave out. Of equal weights at the border all stay."""
        how = self._how
        if 0 < how.top_k < len(weights):
            weights[weights < np.partition(weights, -how.top_k)[-how.top_k]] = 0
        if how.top_p < 1.0:
            falling = np.sort(weights)[::-1]
            sums = np.cumsum(falling, dtype=np.float64)
            # The token that crosses top_p stays.
            weights[weights < falling[np.searchsorted(sums, how.top_p * sums[-1])]] = 0
        # The likeliest token has weight 1.
        weights[weights < how.min_p] = 0
