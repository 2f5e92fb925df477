"""What sampling does to a model's answers: exported artefacts, decoded token by token, against one that attends to everything.

    attnspan plan lsh --model MODEL --index exact -o exact.json
    attnspan plan lsh --model MODEL --fraction 0.02 -o sampled.json        as many as wanted
    attnspan export MODEL exact --plan exact.json                          and so on
    python benchmarks/lsh_quality.py exact sampled [...] [--lengths 2048,4096] [--n 10] [--words 64] [-o results.json]

The first artefact is the reference. Prompts are computed exactly by all (prefill is); the answer's tokens are given one by one,
as decode steps, which is where sampling happens. Tasks: passkeys at five depths, and the last `--words` tokens of prose.
Per task, length and artefact: answers whose tokens are all the most likely ones, mean cross-entropy, KL(reference || artefact),
and how often the most likely token agrees.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from attnspan.calibration.items import Item
from attnspan.calibration.prompts import build_item
from attnspan.calibration.tasks import TASKS
from attnspan.calibration.texts import EVALUATION, TextSource
from attnspan.cpu_runtime.session import Session
from attnspan.planner.files import write_whole

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Of each row."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def answer(session: Session, item: Item) -> npt.NDArray[np.float64]:
    """Log-probabilities at the item's targets, [targets, vocab], each from a decode step."""
    first, last = int(item.targets[0]), int(item.targets[-1])
    session.reset()
    session.prefill(0, item.tokens[: first - 1].tolist())
    return log_softmax(np.stack([session.decode([int(token)])[0] for token in item.tokens[first - 1 : last]]))


def items(session: Any, length: int, count: int, words: int) -> dict[str, list[Item]]:
    """Passkeys at all depths in turn, by the tokenizer of a session, and prose of which the last `words` tokens are asked for."""
    coder = session.tokenizer
    source = TextSource.named(lambda text: coder.encode(text, special=False), EVALUATION)
    keys = [build_item(TASKS["passkey"], coder, source, length, DEPTHS[i % 5], 0, i // 5) for i in range(count)]
    prose = [build_item(TASKS["perplexity"], coder, source, length, 0.0, 0, i) for i in range(count)]
    return {"passkey": keys, "prose": [Item(p.tokens, p.targets[-words:], p.kind, p.length) for p in prose]}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefacts", nargs="+", type=Path)
    parser.add_argument("--lengths", default="2048,4096")
    parser.add_argument("--n", type=int, default=10)
    parser.add_argument("--words", type=int, default=64)
    parser.add_argument("-o", "--output", type=Path, default=Path("lsh_quality.json"))
    args = parser.parse_args()
    lengths = [int(word) for word in args.lengths.split(",")]
    first = Session(args.artefacts[0])
    work = [(task, n, item) for n in lengths for task, each in items(first, n, args.n, args.words).items() for item in each]
    del first
    reference: list[npt.NDArray[np.float64]] = []
    results: list[dict[str, Any]] = []
    for folder in args.artefacts:
        session = Session(folder)
        rows: dict[tuple[str, int], list[tuple[float, ...]]] = {}
        for i, (task, n, item) in enumerate(tqdm(work, desc=folder.name, disable=None)):
            got = answer(session, item)
            if len(reference) == i:
                reference.append(got)
            true, wanted = reference[i], item.tokens[item.targets]
            right = float((got.argmax(-1) == wanted).all())
            loss = -got[np.arange(len(wanted)), wanted].mean()
            kl = (np.exp(true) * (true - got)).sum(-1).mean()
            rows.setdefault((task, n), []).append((right, loss, kl, (got.argmax(-1) == true.argmax(-1)).mean()))
        for (task, n), scores in rows.items():
            right, loss, kl, same = np.mean(scores, 0).tolist()
            row = {"artefact": folder.name, "task": task, "length": n, "n": len(scores)}
            results.append(row | {"right": right, "loss": loss, "kl": kl, "top1": same})
            print("|", *row.values(), f"{right:.1%}", f"{loss:.4f}", f"{kl:.4f}", f"{same:.1%}", sep=" | ", flush=True)
        del session
    write_whole(args.output, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
