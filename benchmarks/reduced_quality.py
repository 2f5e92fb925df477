"""What exact Top-K and uniform windows of sampling's budget do to a model's answers, on the items of `lsh_quality.py`.

    python benchmarks/reduced_quality.py MODEL [--lengths 2048,4096,8192] [--fractions 0.02,0.05,0.1] [--n 10] [-o results.json]

PyTorch in fp32; prompts are computed exactly, decode steps attend to the first 64 tokens, the last 64 and a share of the rest:
the largest scores of each query head (`topk`, which has to compute all of them first), or the most recent tokens (`window`).
Layers 0 and 16 attend to everything, as in plans made by `attnspan plan lsh`. The figures are those of `lsh_quality.py`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lsh_quality import items, log_softmax
from torch import Tensor
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from attnspan.calibration import op_attention
from attnspan.calibration.items import Item
from attnspan.calibration.loading import load_model, load_tokenizer
from attnspan.planner.files import write_whole

NAME = "attnspan_reduced"
SINK, WINDOW = 64, 64
DENSE_LAYERS = (0, 16)
KINDS = ("topk", "window")


class Reduced:
    """The attention in force: one of KINDS and the share that it keeps, or everything."""

    def __init__(self) -> None:
        self.kind, self.fraction = "exact", 1.0

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any
    ) -> tuple[Tensor, None]:
        """What transformers calls: query [1, heads, tokens, dim], key and value [1, kv_heads, total, dim]."""
        if query.shape[2] > 1:
            return op_attention.attend(query[0], key[0], value[0], None, scaling)[None].transpose(1, 2), None
        heads, total = query.shape[1], key.shape[2]
        group = heads // key.shape[1]
        keys, values = (x[0].float().repeat_interleave(group, 0) for x in (key, value))
        scores = torch.einsum("hd,hnd->hn", query[0, :, 0].float(), keys) * scaling
        if self.kind != "exact" and module.layer_idx not in DENSE_LAYERS and total > SINK + WINDOW:
            scores = scores.masked_fill(~self.kept(scores), -torch.inf)
        return torch.einsum("hn,hnd->hd", scores.softmax(-1), values)[None, None].to(query.dtype), None

    def kept(self, scores: Tensor) -> Tensor:
        """Which keys a step attends to, bool like scores [heads, total]."""
        total = scores.shape[1]
        count = round(self.fraction * (total - SINK - WINDOW))
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[:, :SINK] = kept[:, total - WINDOW :] = True
        if self.kind == "window":
            kept[:, total - WINDOW - count :] = True
        else:
            kept.scatter_(1, scores[:, SINK : total - WINDOW].topk(count).indices + SINK, True)
        return kept


def answers(model: Any, reduced: Reduced, item: Item, contenders: list[tuple[str, float]]) -> list[npt.NDArray[np.float64]]:
    """Log-probabilities at the item's targets, [targets, vocab], of each contender, from one prefill."""
    first, last = int(item.targets[0]), int(item.targets[-1])
    tokens = torch.from_numpy(item.tokens.astype(np.int64))[None]
    cache = DynamicCache(config=model.config)
    reduced.kind = "exact"
    with torch.inference_mode():
        model(tokens[:, : first - 1], past_key_values=cache, logits_to_keep=1)
        results = []
        for reduced.kind, reduced.fraction in contenders:
            logits = []
            for at in range(first - 1, last):
                logits.append(model(tokens[:, at : at + 1], past_key_values=cache).logits[0, -1].float().numpy())
            cache.crop(first - 1 - last)
            results.append(log_softmax(np.stack(logits)))
    return results


class Coder:
    """What `items` wants of a session."""

    def __init__(self, model: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            self.tokenizer = load_tokenizer(model, Path(scratch))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--lengths", default="2048,4096,8192")
    parser.add_argument("--fractions", default="0.02,0.05,0.1")
    parser.add_argument("--n", type=int, default=10)
    parser.add_argument("--words", type=int, default=64)
    parser.add_argument("-o", "--output", type=Path, default=Path("reduced_quality.json"))
    args = parser.parse_args()
    coder = Coder(args.model)
    model, _ = load_model(args.model, "fp32")
    reduced = Reduced()
    AttentionInterface.register(NAME, reduced.attend)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    model.set_attn_implementation(NAME)
    contenders = [("exact", 1.0), *((kind, float(f)) for f in args.fractions.split(",") for kind in KINDS)]
    results: list[dict[str, Any]] = []
    for length in map(int, args.lengths.split(",")):
        for task, each in items(coder, length, args.n, args.words).items():
            scores: list[list[tuple[float, ...]]] = [[] for _ in contenders]
            for item in tqdm(each, desc=f"{task} {length}", disable=None):
                wanted = item.tokens[item.targets]
                found = answers(model, reduced, item, contenders)
                for got, rows in zip(found, scores, strict=True):
                    loss = -got[np.arange(len(wanted)), wanted].mean()
                    kl = (np.exp(found[0]) * (found[0] - got)).sum(-1).mean()
                    same = (got.argmax(-1) == found[0].argmax(-1)).mean()
                    rows.append((float((got.argmax(-1) == wanted).all()), loss, kl, same))
            for (kind, fraction), rows in zip(contenders, scores, strict=True):
                right, loss, kl, same = np.mean(rows, 0).tolist()
                row = {"kind": kind, "fraction": fraction, "task": task, "length": length, "n": len(rows)}
                results.append(row | {"right": right, "loss": loss, "kl": kl, "top1": same})
                print("|", *row.values(), f"{right:.1%}", f"{loss:.4f}", f"{kl:.4f}", f"{same:.1%}", sep=" | ", flush=True)
    write_whole(args.output, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
