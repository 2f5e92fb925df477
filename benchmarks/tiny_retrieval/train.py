"""Trains a small Llama that answers the questions of `task.py`, and writes it as a Hugging Face folder.

    python benchmarks/tiny_retrieval/train.py OUT [--minutes M] [--seed S] [--threads T]

A checkpoint in OUT/checkpoint.pt lets the same command go on after an interruption; it is deleted at the end.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import task
import torch
from muon import Muon
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Stage:
    """One length of the curriculum; passed at a running accuracy above `goal` and a filler loss below `filler_goal`, in nats."""

    tokens: int
    batch: int
    queries: int
    filler_mean: int
    goal: float
    keys: int = len(task.KEYS)
    filler_goal: float = math.inf


# Retrieval takes two layers that learn together, and starts by chance: at 64 tokens and 512 keys it had not after 1200 steps;
# with two lines and 32 keys it takes 150, and every later stage a few dozen. Fillers are learned at 256 tokens, where steps are
# cheap: a loss of 2 ignores the topic, .91 is the least, and 1.0 is in reach: documents do not begin with a topic.
CURRICULUM = (
    Stage(10, 128, 1, 0, 0.95, keys=32),
    Stage(16, 96, 1, 0, 0.9, keys=32),
    Stage(28, 64, 2, 0, 0.9, keys=32),
    Stage(64, 32, 4, 0, 0.9),
    Stage(128, 32, 12, 0, 0.9),
    Stage(256, 16, 20, 4, 0.9, filler_goal=1.3),
    Stage(512, 8, 40, 4, 0.8),
    Stage(1024, 4, 64, 8, 0.8),
    Stage(2048, 2, 96, 8, 0.9),
    Stage(4096, 1, 160, 8, 0.9),
)
REPLAY_FROM = 512  # stages of this length and longer replay a shorter one, of at least REPLAYED tokens, in every second step
REPLAYED = 256
STEPS_AT_LEAST = 15
FILLER_WEIGHT = 0.3
WARM_UP = 50
COOL_DOWN = 200  # steps in which the learning rate falls to 3 %
RATE = 3e-3
CHECKPOINT = "checkpoint.pt"
CHECKPOINT_EVERY = 100
LENGTHS = (256, 512, 1024, 2048, 3072, 4096)  # where the finished model is measured
QUESTIONS = 512  # at each

README = """\
---
license: apache-2.0
---
A Llama of {parameters:.2f} M parameters that answers questions about lines in synthetic text. `task.py` beside its trainer makes
the documents and is its vocabulary; there is no tokenizer.
Made by `{command}` in {steps} steps, {minutes:.1f} minutes, with PyTorch {torch}.

Right answers with dense attention in fp32, {questions} questions a length, 32 a document, among filler
runs of 8 tokens on average (chance is 1/64):

| tokens | accuracy |
|---|---|
{table}

When training passed a length:

| tokens | step | seconds |
|---|---|---|
{stages}
"""


def build(layers: int = 4, hidden: int = 256, heads: int = 8, kv_heads: int = 4) -> LlamaForCausalLM:
    """The model before training, fp32; heads have 32 dimensions. Its weights depend on torch's seed only."""
    config = LlamaConfig(
        vocab_size=task.VOCABULARY, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=32, max_position_embeddings=4096, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5}, tie_word_embeddings=False,
        pad_token_id=task.PAD, bos_token_id=task.BOS, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    # With the usual .02 the output of the first layers, about .2, would drown the tokens' identity.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    for name, weight in model.named_parameters():
        if hidden_matrix(name, weight):
            out = "o_proj" in name or "down_proj" in name
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5 * (0.5 * layers**-0.5 if out else 1))
    return model


def hidden_matrix(name: str, weight: Tensor) -> bool:
    """Whether Muon trains it: a matrix of attention or FFN."""
    return weight.ndim == 2 and ".layers." in name


@dataclass
class Progress:
    """What a run must remember besides weights and optimiser states."""

    step: int = 0
    stage: int = 0
    stage_start: int = 0
    accuracy: float = 0.0  # running means over about ten steps at the stage's own length
    filler_loss: float = 5.0
    cool_from: int | None = None
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def batch(seed: int, step: int, stage: Stage) -> tuple[Tensor, Tensor]:
    """Token ids `[batch, tokens]` and positions of answers `[batch, queries]`; decided by the arguments alone."""
    rng = np.random.default_rng((seed, step))
    made = [task.document(rng, stage.tokens, stage.queries, stage.filler_mean, stage.keys) for _ in range(stage.batch)]
    return torch.from_numpy(np.stack([d[0] for d in made])), torch.from_numpy(np.stack([d[1] for d in made]))


@dataclass(frozen=True)
class Scores:
    """Of one batch: losses in nats, accuracy as a share of the answers."""

    loss: Tensor
    answer_loss: float
    filler_loss: float  # nan without fillers
    accuracy: float


def forward(model: LlamaForCausalLM, tokens: Tensor, targets: Tensor) -> Scores:
    """Scores of tokens `[batch, tokens]` with answers at `[batch, queries]`. The head is run only where there is a loss."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    is_filler = (tokens >= task.FILLERS.start) & (tokens < task.FILLERS.stop)
    is_filler[:, 0] = False

    def predict(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        return model.lm_head(hidden[rows, columns - 1].float()), tokens[rows, columns]

    rows = torch.arange(len(tokens))[:, None].expand_as(targets)
    logits, answers = predict(rows.flatten(), targets.flatten())
    loss = answer_loss = cross_entropy(logits, answers)
    filler_loss = math.nan
    if is_filler.any():
        fillers = cross_entropy(*predict(*is_filler.nonzero(as_tuple=True)))
        loss, filler_loss = loss + FILLER_WEIGHT * fillers, fillers.item()
    return Scores(loss, answer_loss.item(), filler_loss, (logits.argmax(-1) == answers).float().mean().item())


def train(
    out: Path, minutes: float, seed: int, model: LlamaForCausalLM, curriculum: tuple[Stage, ...], most_steps: int | None = None
) -> Progress:
    """Trains in place to the last stage's goal or the end of the time, cool-down included; resumes from a checkpoint in `out`."""
    matrices = [w for n, w in model.named_parameters() if hidden_matrix(n, w)]
    others = [w for n, w in model.named_parameters() if not hidden_matrix(n, w)]
    optimisers = (Muon(matrices, RATE), torch.optim.AdamW(others, RATE, betas=(0.9, 0.95), weight_decay=0.0))
    checkpoint = out / CHECKPOINT
    now = Progress()
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimiser, state in zip(optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        now = Progress(**saved["progress"])
        print(f"resumes after step {now.step}", flush=True)
    began = time.monotonic() - now.seconds
    pace = 0.0  # seconds a step, running mean
    while most_steps is None or now.step < most_steps:
        if now.cool_from is None and now.seconds + COOL_DOWN * pace > 60 * minutes:
            now.cool_from = now.step
        if now.cool_from is not None and now.step >= now.cool_from + COOL_DOWN:
            break
        stage = curriculum[now.stage]
        shorter = [s for s in curriculum[: now.stage] if s.tokens >= REPLAYED]
        replay = stage.tokens >= REPLAY_FROM and now.step % 2 == 1
        if replay:
            stage = shorter[now.step // 2 % len(shorter)]
        rate = RATE * min(1.0, (now.step + 1) / WARM_UP)
        if now.cool_from is not None:
            rate *= 1 - 0.97 * (now.step - now.cool_from) / COOL_DOWN
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.zero_grad()
        scores = forward(model, *batch(seed, now.step, stage))
        scores.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        now.step += 1
        before, now.seconds = now.seconds, time.monotonic() - began
        pace += 0.05 * (now.seconds - before - pace)
        if not replay:
            now.accuracy += 0.1 * (scores.accuracy - now.accuracy)
            if not math.isnan(scores.filler_loss):
                now.filler_loss += 0.1 * (scores.filler_loss - now.filler_loss)
        if now.step % 20 == 0:
            print(
                f"step {now.step}  {now.seconds:.0f} s  length {stage.tokens}  loss {scores.loss.item():.3f}  answers "
                f"{scores.answer_loss:.3f}  fillers {scores.filler_loss:.3f}  accuracy {scores.accuracy:.2f}  rate {rate:.1e}",
                flush=True,
            )
        target = curriculum[now.stage]
        passed = now.accuracy > target.goal and now.filler_loss < target.filler_goal
        if now.cool_from is None and now.step - now.stage_start > STEPS_AT_LEAST and passed:
            now.history.append({"tokens": target.tokens, "step": now.step, "seconds": now.seconds})
            print(f"passed length {target.tokens} at step {now.step}, {now.seconds:.0f} s", flush=True)
            if now.stage == len(curriculum) - 1:
                now.cool_from = now.step
            else:
                now.stage, now.stage_start, now.accuracy = now.stage + 1, now.step, 0.0
        if now.step % CHECKPOINT_EVERY == 0:
            save(checkpoint, model, optimisers, now)
    save(checkpoint, model, optimisers, now)
    return now


def save(path: Path, model: LlamaForCausalLM, optimisers: Iterable[torch.optim.Optimizer], now: Progress) -> None:
    """Writes the checkpoint whole."""
    part = path.with_suffix(".part")
    states = [o.state_dict() for o in optimisers]
    torch.save({"model": model.state_dict(), "optimisers": states, "progress": asdict(now)}, part)
    part.replace(path)


@torch.no_grad()
def accuracy_by_length(model: LlamaForCausalLM, lengths: Iterable[int]) -> dict[int, float]:
    """Share of right answers in fp32, 32 questions a document, filler runs of 8 tokens on average; seed apart from training."""
    got = {}
    for n in lengths:
        right = []
        for i in range(QUESTIONS // 32):
            tokens, targets = task.document(np.random.default_rng((n, i, 1)), n, 32, 8)
            logits = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0, targets - 1]
            right.append((logits.argmax(-1).numpy() == tokens[targets]).mean())
        got[n] = float(np.mean(right))
    return got


def finish(out: Path, model: LlamaForCausalLM, now: Progress, command: str) -> None:
    """Writes the folder, reads it back in fp32, measures it and writes its README."""
    model.save_pretrained(out)
    loaded = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    if any(not torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True)):
        raise RuntimeError(f"{out} does not hold the weights that were trained")
    print("measures the accuracy", flush=True)
    got = accuracy_by_length(loaded, LENGTHS)
    table = "\n".join(f"| {n} | {a:.3f} |" for n, a in got.items())
    stages = "\n".join(f"| {h['tokens']} | {h['step']} | {h['seconds']:.0f} |" for h in now.history)
    text = README.format(
        parameters=sum(w.numel() for w in loaded.parameters()) / 1e6, steps=now.step, minutes=now.seconds / 60, command=command,
        table=table, stages=stages, questions=QUESTIONS, torch=torch.__version__,
    )  # fmt: skip
    (out / "README.md").write_text(text, encoding="utf-8")
    print(text, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the model")
    parser.add_argument("--minutes", type=float, default=35.0, help="time limit of the training (default: 35)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the documents (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: 1)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    model = build()
    now = train(args.out, args.minutes, args.seed, model, CURRICULUM)
    command = f"train.py OUT --minutes {args.minutes:g} --seed {args.seed} --threads {args.threads}"
    finish(args.out, model, now, command)
    (args.out / CHECKPOINT).unlink()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
