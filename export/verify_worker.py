"""The child process of `verify`: run an artefact and the PyTorch reference on the same rows and compare their logits."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from attnspan.cpu_runtime.session import Session
from attnspan.export.cache_scales import layer_scales, read_scales
from attnspan.export.quantize import WEIGHTS
from attnspan.export.sample_text import sample_tokens
from attnspan.export.torch_reference import TorchReference
from attnspan.export.verify import GENERATED, MAX_LOGITS, Row, tolerance_of
from attnspan.planner.plan import Plan
from attnspan.runtime.artefact import Artefact

POSITIONS = 128  # compared at a time


def compare(artefact: Artefact, model: Path, tokens: int, generated: int = GENERATED) -> list[Row]:
    """Compare on a ragged batch of three rows of text, the longest `tokens` long."""
    plan = artefact.plan
    longest = min(tokens, plan.n_max - generated)
    lengths = [longest, max(longest // 3, 1), min(7, longest)]
    tokens_of_text = sample_tokens(artefact.folder, artefact.vocab_size, longest)
    prompts = [tokens_of_text[-n:] for n in lengths]
    with tqdm(total=2 * sum(lengths), unit=" tokens", desc="verify", delay=2, leave=False, disable=None) as bar:
        logits, chosen = _run(artefact, prompts, generated, bar)
        reference = TorchReference(model, plan, artefact.cache_dtype, artefact.dtype)

        def rows() -> list[Row]:
            found = []
            for prompt, new, got in zip(prompts, chosen, logits, strict=True):
                hidden = reference.hidden(prompt + new, _spans(plan, len(prompt), len(new)))
                found.append(_row(got, reference, hidden[-len(got) :], new, len(prompt), artefact))
                bar.update(len(prompt))
            return found

        weights, int8 = artefact.info.get("weights"), artefact.cache_dtype == "int8"
        if weights not in WEIGHTS and not int8:
            return rows()
        bar.total += sum(lengths)
        before = rows()
        reference.quantize(weights, layer_scales(read_scales(artefact.folder), plan) if int8 else None)
        return [
            replace(x, lost_diff=y.mean_diff, lost_tokens=x.generated - y.exact_tokens)
            for x, y in zip(rows(), before, strict=True)
        ]


def _run(artefact: Artefact, prompts: list[list[int]], generated: int, bar: tqdm) -> tuple[list[np.ndarray], list[list[int]]]:
    """Prefill each row, decode all together; logits [kept + generated, vocab] and generated tokens of each row."""
    session = Session(artefact, batch=len(prompts), use_library=artefact.library is not None, check_memory=False)
    room = [min(len(prompt), MAX_LOGITS // artefact.vocab_size) for prompt in prompts]
    logits = [np.empty((keep + generated, artefact.vocab_size), np.float32) for keep in room]
    for row, (prompt, keep) in enumerate(zip(prompts, room, strict=True)):
        logits[row][:keep] = session.prefill(row, prompt, keep)
        bar.update(len(prompt))
    chosen: list[list[int]] = [[] for _ in prompts]
    for step in range(generated):
        for new, keep, row_logits in zip(chosen, room, logits, strict=True):
            new.append(int(row_logits[keep + step - 1].argmax()))
        for row, last in enumerate(session.decode([new[-1] for new in chosen])):
            logits[row][room[row] + step] = last
    return logits, chosen


def _spans(plan: Plan, prompt: int, generated: int) -> torch.Tensor:
    """Spans that the query of every token sees: S(prompt) throughout a prompt, S(own length) for a later token."""
    lengths = [prompt] * prompt + [prompt + i + 1 for i in range(generated)]
    table = {n: plan.spans(n) for n in set(lengths)}
    return torch.from_numpy(np.stack([table[n] for n in lengths]))


class _Head(Protocol):
    """What makes logits of hidden states."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


def _row(got: np.ndarray, reference: _Head, hidden: torch.Tensor, new: list[int], prompt: int, artefact: Artefact) -> Row:
    """Compare logits [positions, vocab] with those of the reference's hidden states [positions, features]."""
    largest, means, top = np.empty(len(got), np.float32), np.empty(len(got), np.float64), 0.0
    for first in range(0, len(got), POSITIONS):
        some = slice(first, first + POSITIONS)
        expected = reference.logits(hidden[some]).numpy()
        difference = np.abs(got[some] - expected)
        largest[some] = difference.max(1)
        means[some] = difference.mean(1, dtype=np.float64)
        top = max(top, float(np.abs(expected).max()))
    choices = reference.logits(hidden[-len(new) - 1 : -1]).numpy()  # after which the new tokens were chosen
    below = choices.max(1) - choices[np.arange(len(new)), new]
    sampled = len(new) if artefact.library is not None and artefact.may_sample(prompt + len(new)) else 0
    compared = len(got) - sampled
    return Row(
        prompt=prompt,
        generated=len(new),
        compared=compared,
        max_diff=float(largest[:compared].max()),
        p99_diff=float(np.quantile(largest[:compared], 0.99)),
        mean_diff=float(means[:compared].mean()),
        max_logit=top,
        exact_tokens=int((below <= 0).sum()),
        same_tokens=int((below <= tolerance_of(artefact.info).p99 * top).sum()),
        wrapped=int((artefact.plan.capacities() < prompt + len(new)).sum()),
        sampled=sampled,
        sampled_diff=float(means[compared:].mean()) if sampled else 0.0,
    )


def main() -> None:
    """Command line of the child: FOLDER MODEL TOKENS REPORT; writes the rows as JSON to REPORT."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=int)
    parser.add_argument("report", type=Path)
    args = parser.parse_args()
    artefact = Artefact.load(args.folder)
    if args.model.suffix == ".onnx":
        from attnspan.export.frontends.foreign import verify as foreign_verify

        rows = foreign_verify.compare(artefact, args.model, args.tokens)
    else:
        rows = compare(artefact, args.model, args.tokens)
    args.report.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")


if __name__ == "__main__":
    main()
