"""Tables of what `equal_bytes.py` measured, with 95 % intervals over documents; Markdown on standard output.

    python benchmarks/equal_bytes_report.py FOLDER [--json FILE] [--pairs unified:span,lsh]

A contender whose name ends in -LENGTH, such as span-0.05-8192, is one that was made for that length: tables leave this out.
Figures: answers that are right in every token (exact), the same among those that the dense model gets right (kept); KL from the
dense model, how often the most likely token is the dense model's (top1), and how much the loss rises above the dense model's, in
nats (of prose, 0.01 is 1 % of perplexity), means over the answers' tokens; task `frequency`: how often a frequent word is
likelier than a rare one (rank). Intervals: bootstrap, documents drawn with replacement, 4000 times; where all documents agree,
Wilson's interval for as many answers as there are documents.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from attnspan.calibration.scores import wilson
from attnspan.planner.errors import UserError
from attnspan.planner.files import write_whole

RESAMPLED = 4000
SHARES = ("exact", "kept", "rank")
"""Figures that are shares of answers or pairs."""
Row = Mapping[str, Any]
Sums = dict[int, tuple[float, float]]
"""By document: a sum, and what it is divided by."""


@dataclass(frozen=True)
class Figure:
    """A mean over documents, with its 95 % interval."""

    value: float
    low: float
    high: float


def load(folder: Path) -> list[Row]:
    """The answers, each with what the dense model made of it. UserError where there are none."""
    path = folder / "answers.jsonl" if folder.is_dir() else folder
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give the folder that equal_bytes.py wrote to") from None
    dense = {_place(row): row for row in rows if row["contender"] == "dense"}
    out: list[Row] = []
    for row in rows:
        name, end, true = row["contender"], f"-{row['length']}", dense[_place(row)]
        out.append({**row, "contender": name.removesuffix(end), "known": true["exact"], "rise": true["logp"] - row["logp"]})
    return out


def _place(row: Row) -> tuple[Any, ...]:
    return row["task"], row["length"], row["document"], row["number"]


def sums(rows: Sequence[Row], figure: str) -> Sums:
    """What a figure is made of, by document: answers of one task, length and contender."""
    documents: dict[int, list[Row]] = {}
    for row in rows:
        documents.setdefault(row["document"], []).append(row)
    out = {}
    for document, each in documents.items():
        if figure == "rank":
            often = [row["logp"] for row in each if row["right"]]
            rare = [row["logp"] for row in each if not row["right"]]
            pair = float(sum(a > b for a in often for b in rare)), float(len(often) * len(rare))
        elif figure in ("exact", "kept"):
            asked = [row for row in each if figure == "exact" or row["known"]]
            pair = float(sum(row["exact"] for row in asked)), float(len(asked))
        else:
            values = [row["rise"] if figure == "rise" else row[figure] * row["tokens"] for row in each]
            pair = float(sum(values)), float(sum(row["tokens"] for row in each))
        if pair[1]:
            out[document] = pair
    return out


def _drawn(count: int) -> npt.NDArray[np.float64]:
    """How often each of `count` documents is drawn, [RESAMPLED, count]; always the same ones."""
    return np.random.default_rng(count).multinomial(count, np.full(count, 1 / count), RESAMPLED).astype(np.float64)


def estimate(found: Sums, share: bool) -> Figure:
    """The mean with its interval."""
    pairs = np.array(list(found.values()))
    value = float(pairs[:, 0].sum() / pairs[:, 1].sum())
    if share and value in (0.0, 1.0):
        return Figure(value, *wilson(round(value * len(pairs)), len(pairs)))
    tops, bottoms = (_drawn(len(pairs)) @ pairs).T
    low, high = np.quantile(tops / bottoms, (0.025, 0.975)).tolist()
    return Figure(value, low, high)


def difference(ours: Sums, theirs: Sums) -> Figure | None:
    """Ours less theirs over the documents that both have, drawn together; None without any."""
    found = together({"": ours}, {"": theirs})
    return None if found is None else found[0]


def together(ours: Mapping[str, Sums], theirs: Mapping[str, Sums]) -> tuple[Figure, int] | None:
    """The mean over tasks of ours less theirs, and the number of documents. Documents of one number are drawn together, those of
    all tasks: a list of words with the prose of its number. None where no document has all tasks."""
    common = sorted(set.intersection(*(set(ours[task]) & set(theirs[task]) for task in ours)))
    if not common:
        return None
    weights = np.vstack((np.ones(len(common)), _drawn(len(common))))

    def mean(found: Mapping[str, Sums]) -> npt.NDArray[np.float64]:
        pairs = np.array([[each[document] for document in common] for each in found.values()])  # [tasks, documents, 2]
        tops, bottoms = np.moveaxis(weights @ pairs, -1, 0)
        return np.asarray((tops / bottoms).mean(0))

    value, *drawn = mean(ours) - mean(theirs)
    low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
    return Figure(float(value), low, high), len(common)


def figures_of(task: str) -> tuple[str, ...]:
    """The figures that mean something for a task."""
    rest = ("kl", "top1", "rise")
    return rest if task == "prose" else ("rank", *rest) if task == "frequency" else ("exact", "kept", *rest)


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One object a task, length and contender: number of documents and answers, and the figures."""
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["length"], row["contender"]), []).append(row)
    out = []
    for (task, length, contender), some in tqdm(sorted(groups.items()), desc="intervals", disable=None):
        entry: dict[str, Any] = {"task": task, "length": length, "contender": contender}
        entry |= {"documents": len({row["document"] for row in some}), "answers": len(some)}
        for figure in figures_of(task):
            found = sums(some, figure)
            if found:
                got = estimate(found, figure in SHARES)
                entry[figure] = [got.value, got.low, got.high]
        out.append(entry)
    return out


def tables(entries: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a table a task and length."""
    out = []
    for task, length in dict.fromkeys((entry["task"], entry["length"]) for entry in entries):
        names = figures_of(task)
        out += [f"\n**{task}, {length} tokens**\n", "| contender | documents | answers | " + " | ".join(names) + " |"]
        out.append("|---" * (3 + len(names)) + "|")
        for entry in entries:
            if (entry["task"], entry["length"]) == (task, length):
                cells = [_cell(name, entry.get(name)) for name in names]
                out.append(f"| `{entry['contender']}` | {entry['documents']} | {entry['answers']} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def _cell(name: str, figure: Sequence[float] | None) -> str:
    if figure is None:
        return ""
    if name in (*SHARES, "top1"):
        value, low, high = (100 * x for x in figure)
        return f"{value:.1f} [{low:.1f}, {high:.1f}]"
    digits = max(2, 1 - math.floor(math.log10(max(map(abs, figure[1:] if any(figure) else [1])))))
    return f"{figure[0]:.{digits}f} [{figure[1]:.{digits}f}, {figure[2]:.{digits}f}]"


def pairs(rows: Sequence[Row], ours: str, others: Sequence[str]) -> str:
    """Markdown: differences to contenders of the same budget (what follows the first hyphen of a name), document by document."""
    out = [
        f"\n**{ours} less others**\n",
        "| task | tokens | budget | other | documents | figure | difference |",
        "|---" * 7 + "|",
    ]
    by: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        by.setdefault((row["task"], row["length"], row["contender"]), []).append(row)
    for (task, length, name), mine in sorted(by.items()):
        kind, _, budget = name.partition("-")
        for other in others if kind == ours else ():
            theirs = _of_budget(by, task, length, other, budget)
            for figure in [name for name in figures_of(task) if name in ("exact", "rank", "kl")] if theirs else ():
                a, b = sums(mine, figure), sums(theirs, figure)
                found = difference(a, b)
                if found is not None:
                    cell = _cell(figure, [found.value, found.low, found.high])
                    out.append(f"| {task} | {length} | {budget} | `{other}` | {len(set(a) & set(b))} | {figure} | {cell} |")
    return "\n".join(out + _all_tasks(by, ours, others))


def _of_budget(by: Mapping[tuple[str, int, str], Sequence[Row]], task: str, length: int, kind: str, budget: str) -> Sequence[Row]:
    """Answers of a kind of contender, whose name is KIND-BUDGET or KIND:BUDGET; none where it was not asked."""
    return by.get((task, length, f"{kind}-{budget}"), by.get((task, length, f"{kind}:{budget}"), ()))


def _all_tasks(by: Mapping[tuple[str, int, str], Sequence[Row]], ours: str, others: Sequence[str]) -> list[str]:
    """Lines of a table: the mean over all tasks that have right answers, exact or ranked."""
    right = {task: figures_of(task)[0] for task, _, _ in sorted(by) if figures_of(task)[0] in SHARES}
    out = []
    for length, name in sorted({(length, name) for _, length, name in by if name.startswith(f"{ours}-")}):
        budget = name.partition("-")[2]
        for other in others:
            answers = {task: [_of_budget(by, task, length, kind, budget) for kind in (ours, other)] for task in right}
            mine, theirs = ({task: sums(each[i], right[task]) for task, each in answers.items() if each[i]} for i in (0, 1))
            pooled = together(mine, theirs) if mine.keys() == theirs.keys() else None
            if pooled is not None:
                figure, count = pooled
                cell = _cell("exact", [figure.value, figure.low, figure.high])
                out.append(f"| all: {', '.join(mine)} | {length} | {budget} | `{other}` | {count} | right | {cell} |")
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what equal_bytes.py wrote to, or its answers.jsonl")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    parser.add_argument("--pairs", metavar="NAME:OTHER,...", help="differences of one kind to others of the same budget")
    args = parser.parse_args()
    try:
        rows = load(args.folder)
        entries = summary(rows)
        print(tables(entries))
        if args.pairs:
            ours, _, others = args.pairs.partition(":")
            print(pairs(rows, ours, others.split(",")))
        if args.json:
            lines = ",\n".join(json.dumps(entry) for entry in entries)
            write_whole(args.json, f"[\n{lines}\n]\n".encode())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
