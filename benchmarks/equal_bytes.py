"""What decoding with fewer bytes does to answers: artefacts, Top-K and windows side by side, from the same exact prompts.

    attnspan export MODEL dense --density 1
    attnspan export MODEL sketch --plan sketch.json                        and so on, all for the same n_max
    python benchmarks/equal_bytes.py dense sketch [...] --lengths 4096,8192 --documents 16 --tasks passkey,multikey -o results
    python benchmarks/equal_bytes.py dense --model MODEL --reduced topk:0.02,rows:0.05 --lengths 4096,8192 ... -o results
    python benchmarks/equal_bytes_report.py results

The first artefact is dense: it computes every prompt, once, into the folder, and its answers are the reference. All others decode
the answers' tokens, given one by one, from these caches: their heads are given what they would keep of them. Documents carry
several questions each (`equal_bytes_documents.py`), `--reduced` is explained in `equal_bytes_reduced.py`. Scores are appended to
answers.jsonl as they come: the same command goes on where it was, other artefacts and more documents are added.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from equal_bytes_caches import Prompt, computed, fill, log_softmax
from equal_bytes_documents import KINDS, LEAST, TASKS, Question, build
from tqdm import tqdm

from attnspan.cpu_runtime.session import Session
from attnspan.planner.errors import UserError
from attnspan.planner.rules import check_int
from attnspan.runtime.generate import IDLE

DENSE = "dense"
LOG = "answers.jsonl"
Run = tuple[Prompt, Question]


def force_sampling(folder: Path, out: Path) -> None:
    """Copy an artefact (weights by a hard link) that samples rows of any length, not from 2048 tokens on."""
    import hashlib

    import onnx

    shutil.copytree(folder, out, copy_function=os.link)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "LshAttention":
            node.attribute.append(onnx.helper.make_attribute("dense_below", 0))
    content = model.SerializeToString()
    info = json.loads((out / "attnspan.json").read_text())
    info["files"]["model.onnx"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for name, data in (("model.onnx", content), ("attnspan.json", json.dumps(info).encode())):
        (out / name).unlink()
        (out / name).write_bytes(data)


def score(prompt: Prompt, question: Question, got: npt.NDArray[np.float32]) -> dict[str, Any]:
    """One answer. exact: all tokens are the most likely ones; logp: of the answer, summed; kl: from the dense model, and top1:
    how often its most likely token is the same, means over the answer's tokens."""
    true, answer = prompt.true(question), np.array(question.answer)
    kl = (np.exp(true, dtype=np.float64) * (true.astype(np.float64) - got)).sum(-1)
    return {
        "task": question.task, "length": prompt.document.length, "document": prompt.document.index, "number": question.number,
        "depth": question.depth, "right": question.right, "tokens": len(answer),
        "exact": bool((got.argmax(-1) == answer).all()), "logp": round(float(got[np.arange(len(answer)), answer].sum()), 5),
        "kl": round(float(kl.mean()), 7), "top1": float((got.argmax(-1) == true.argmax(-1)).mean()),
    }  # fmt: skip


class Log:
    """Scores by contender, appended to a file as they come."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOG
        lines = self._path.read_text().splitlines() if self._path.is_file() else []
        self._done = {self._key(row["contender"], row) for row in map(json.loads, lines)}

    @staticmethod
    def _key(contender: str, row: dict[str, Any]) -> tuple[Any, ...]:
        return contender, row["task"], row["length"], row["document"], row["number"]

    def missing(self, contender: str, runs: Iterable[Run]) -> list[Run]:
        """Those that have no score."""
        kept = []
        for prompt, q in runs:
            row = {"task": q.task, "length": prompt.document.length, "document": prompt.document.index, "number": q.number}
            if self._key(contender, row) not in self._done:
                kept.append((prompt, q))
        return kept

    def add(self, contender: str, run: Run, got: npt.NDArray[np.float32]) -> None:
        """Score an answer. A line is written at once, so that two processes may write to one file."""
        row = {"contender": contender} | score(*run, got)
        self._done.add(self._key(contender, row))
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def decoded(session: Session, runs: list[Run]) -> Iterator[tuple[Run, npt.NDArray[np.float32]]]:
    """Each run's log-probabilities at its answer, [answer, vocab], by decode steps, as many runs at a time as there are rows."""
    for start in range(0, len(runs), session.batch):
        batch = runs[start : start + session.batch]
        session.reset()
        for row, (prompt, question) in enumerate(batch):
            fill(session, row, prompt, question)
        logits: list[list[npt.NDArray[np.float32]]] = [[] for _ in batch]
        for step in range(max(len(question.answer) for _, question in batch)):
            fed = np.full(session.batch, IDLE)
            for row, (_, question) in enumerate(batch):
                if step < len(question.answer):
                    fed[row] = (question.prompt[-1], *question.answer)[step]
            out = session.decode(fed)
            for row in np.flatnonzero(fed != IDLE).tolist():
                logits[row].append(out[row])
        for run, rows in zip(batch, logits, strict=True):
            yield run, log_softmax(np.stack(rows))


def blocks(runs: list[Run], documents: int) -> list[Run]:
    """By so many documents at a time, long answers first, so that rows that are decoded together end together."""
    order = {id(prompt): i for i, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in runs))}
    return sorted(runs, key=lambda run: (order[id(run[0])] // documents, -len(run[1].answer)))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefacts", nargs="+", type=Path, metavar="ARTEFACT", help="the dense one first")
    parser.add_argument("--tasks", default="passkey,prose", help=f"{', '.join(TASKS)} (default passkey,prose)")
    parser.add_argument("--lengths", default="4096", help="tokens, with commas (default 4096)")
    parser.add_argument("--documents", type=int, default=5, help="of each kind and length (default 5)")
    parser.add_argument("--first", type=int, default=0, help="number of the first document (default 0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="checkpoint that --reduced runs")
    parser.add_argument("--reduced", default="", metavar="KIND:SHARE,...", help="Top-K and windows in PyTorch")
    parser.add_argument("--sample-all", action="store_true", help="sample rows of fewer than 2048 tokens too")
    parser.add_argument("--rows", type=int, default=8, help="answers decoded at a time (default 8)")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    try:
        measure(parser.parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def measure(args: argparse.Namespace) -> None:
    """Everything that has no score yet."""
    tasks, lengths = args.tasks.split(","), [int(word) for word in args.lengths.split(",")]
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"task is {task!r}: must be one of {', '.join(TASKS)}; change --tasks")
    check_int("documents", args.documents, 1, 10**6, "; change --documents")
    for length in lengths:
        check_int("length", length, LEAST, 2**30, "; change --lengths")
    names = [DENSE, *(folder.name for folder in args.artefacts[1:])]
    if len(set(names)) < len(names):
        raise UserError(f"artefacts are named {', '.join(names)}: their folders must have different names, and none `{DENSE}`")
    reduced = _reductions(args)
    (args.output / "prompts").mkdir(parents=True, exist_ok=True)
    log = Log(args.output)
    kinds = dict.fromkeys(KINDS[task] for task in tasks)
    wanted = [(kind, n, i) for i in range(args.first, args.first + args.documents) for n in lengths for kind in kinds]
    first = Session(args.artefacts[0], batch=2, threads=args.threads)
    if len(first.artefact.parts) != first.artefact.layers or first.artefact.plan.density() != 1:
        raise UserError(f"{args.artefacts[0]} is not dense: it is to compute the prompts; export it with --density 1")
    prompts = []
    for kind, length, index in tqdm(wanted, desc="prompts", disable=None):
        document = build(kind, first.tokenizer, length, index, args.seed)
        prompts.append(computed(first, document, args.output / "prompts"))
    del first
    runs = [(prompt, question) for prompt in prompts for question in prompt.document.questions if question.task in tasks]
    for run in log.missing(DENSE, runs):
        log.add(DENSE, run, run[0].true(run[1]))
    for folder in args.artefacts[1:]:
        left = blocks(log.missing(folder.name, runs), args.rows)
        if left:
            with tqdm(total=len(left), desc=folder.name, disable=None) as bar:
                session = _open(folder, args)
                for run, got in decoded(session, left):
                    log.add(folder.name, run, got)
                    bar.update()
                del session
    if reduced:
        _reduced(args, reduced, runs, log)


def _reductions(args: argparse.Namespace) -> dict[str, Any]:
    names = list(filter(None, args.reduced.split(",")))
    if not names:
        return {}
    if args.model is None:
        raise UserError("--reduced runs a checkpoint in PyTorch: give it with --model")
    from equal_bytes_reduced import Reduction

    return {name: Reduction.parse(name) for name in names}


def _open(folder: Path, args: argparse.Namespace) -> Session:
    if not args.sample_all:
        return Session(folder, batch=args.rows, threads=args.threads)
    forced = args.output / f".{folder.name}.{os.getpid()}"
    force_sampling(folder, forced)
    try:
        return Session(forced, batch=args.rows, threads=args.threads)
    finally:
        shutil.rmtree(forced)


def _reduced(args: argparse.Namespace, reductions: dict[str, Any], runs: list[Run], log: Log) -> None:
    """All reductions together, document by document."""
    import torch
    from equal_bytes_reduced import Reduced

    if args.threads:
        torch.set_num_threads(args.threads)
    left = {name: log.missing(name, runs) for name in reductions}
    with tqdm(total=sum(map(len, left.values())), desc="reduced", disable=None) as bar:
        model = Reduced(args.model) if bar.total else None
        for prompt in dict.fromkeys(prompt for prompt, _ in runs):
            for task in TASKS:  # answers of one task are about as long
                for group, asked in _alike(
                    {name: [q for p, q in some if p is prompt and q.task == task] for name, some in left.items()}
                ):
                    assert model is not None
                    found = model.answers(prompt, asked, [reductions[name] for name in group])
                    for name, answers in zip(group, found, strict=True):
                        for question, got in zip(asked, answers, strict=True):
                            log.add(name, (prompt, question), got)
                            bar.update()


def _alike(questions: dict[str, list[Question]]) -> list[tuple[list[str], list[Question]]]:
    """Contenders that lack the same questions, together."""
    groups: dict[tuple[Question, ...], list[str]] = {}
    for name, asked in questions.items():
        if asked:
            groups.setdefault(tuple(asked), []).append(name)
    return [(names, list(asked)) for asked, names in groups.items()]


if __name__ == "__main__":
    main()
