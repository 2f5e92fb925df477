"""Methods side by side on identical items: retrieval by length and depth, loss and KL; resumable."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from attnspan.calibration.items import Item
from attnspan.calibration.prompts import Coder, build_item
from attnspan.calibration.scores import answer_logits, score, summarise
from attnspan.calibration.tasks import task_named
from attnspan.calibration.texts import EVALUATION, TextSource
from attnspan.planner.errors import UserError

if TYPE_CHECKING:
    from attnspan.calibration.scorer import Scorer

__all__ = ["DENSE", "Cell", "Results", "cells_of", "depths_of", "evaluate"]

DENSE = "dense"
"""Name of the method that the others are compared with."""
LOG = "items.jsonl"


@dataclass(frozen=True)
class Cell:
    """One item to be scored: number `index` of a task at a length and a depth (None: the task has none)."""

    task: str
    length: int
    depth: float | None
    index: int


@dataclass(frozen=True)
class Results:
    """What came out. settings: all that determines the items, and what the methods are; rows: one object per item, with its cell,
    its id and, by method, its scores."""

    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @property
    def methods(self) -> list[str]:
        """Names of the methods."""
        return list(self.settings["methods"])

    def groups(self, *keys: str) -> list[dict[str, Any]]:
        """Summaries by method and the given keys of a cell ("task", "length", "depth"), in the order of the items."""
        out = []
        for group in dict.fromkeys(tuple(row[key] for key in keys) for row in self.rows):
            rows = [row for row in self.rows if tuple(row[key] for key in keys) == group]
            scored = all(task_named(row["task"]).scored for row in rows)
            for method in self.methods:
                summary = summarise((row["scores"][method] for row in rows), scored)
                out.append(dict(zip(keys, group, strict=True)) | {"method": method} | summary.to_dict())
        return out

    def to_dict(self) -> dict[str, Any]:
        """The content of results.json."""
        return {
            "schema": 1,
            "settings": dict(self.settings),
            "totals": self.groups("task", "length"),
            "cells": self.groups("task", "length", "depth"),
        }


def depths_of(count: int) -> list[float]:
    """So many depths, evenly from the start of the context to its end; one alone is the middle."""
    return [0.5] if count == 1 else np.linspace(0, 1, count).round(6).tolist()


def cells_of(tasks: Sequence[str], lengths: Sequence[int], depths: Sequence[float], n: int) -> list[Cell]:
    """All items, those of number 0 first, so that what an interrupted run has is balanced."""
    return [
        Cell(task, length, depth, index)
        for index in range(n)
        for task in tasks
        for length in lengths
        for depth in (depths if task_named(task).by_depth else [None])
    ]


def evaluate(
    scorers: Mapping[str, Scorer],
    coder: Coder,
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    n: int,
    seed: int = 0,
    *,
    plain: bool = False,
    describe: Mapping[str, Any] | None = None,
    source: TextSource | None = None,
    folder: Path | None = None,
    progress: bool = True,
) -> Results:
    """Score every method on the same items, one after the other on each: n items for every task, length and depth.

    KL and agreement are against the method named `dense`, where there is one. describe: by method, what it is, as JSON; kept with
    the results. folder: where the scores of every item are appended as they come (items.jsonl); a later call with the same
    settings goes on from there, and an interrupted one loses at most one item. plain: no chat template.
    UserError: unknown tasks, lengths too short or too long, a folder with results of other settings, logits that are no numbers.
    """
    if n < 1 or not scorers or not tasks or not lengths or not depths:
        raise UserError(f"nothing to evaluate: {len(scorers)} methods, tasks {list(tasks)}, lengths {list(lengths)}, --n {n}")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise UserError(f"depth is {depth!r}: must be from 0 to 1; change --depths")
    cells = cells_of(list(dict.fromkeys(tasks)), list(dict.fromkeys(lengths)), list(dict.fromkeys(depths)), n)
    source = source or TextSource.named(lambda text: coder.encode(text, special=False), EVALUATION)
    methods = {name: (describe or {}).get(name) for name in scorers}
    identity = {"seed": seed, "plain": plain}
    log = _Log(None if folder is None else folder / LOG, identity, methods)
    rows = []
    with tqdm(total=len(cells) * len(scorers), desc="eval", unit="pass", disable=None if progress else True) as bar:
        for cell in cells:
            item = build_item(task_named(cell.task), coder, source, cell.length, cell.depth or 0.0, seed, cell.index, plain)
            row = log.find(cell, item)
            known = {} if row is None else row["scores"]
            if row is None or _missing(scorers, known):
                row = _row(cell, item, scorers, known, bar)
                log.add(row)
            else:
                bar.update(len(scorers))
            rows.append(row)
    settings = identity | {
        "tasks": list(tasks),
        "lengths": list(lengths),
        "depths": list(depths),
        "n": n,
        "methods": methods,
    }
    return Results(settings, [row | {"scores": {name: row["scores"][name] for name in scorers}} for row in rows])


def _missing(scorers: Mapping[str, Scorer], known: Mapping[str, Any]) -> set[str]:
    """Methods to be scored: those that never were, or not against the dense one."""
    return {name for name in scorers if name not in known or (DENSE in scorers and known[name]["kl"] is None)}


def _row(cell: Cell, item: Item, scorers: Mapping[str, Scorer], known: Mapping[str, Any], bar: tqdm[Any]) -> dict[str, Any]:
    """The scores of an item; known: those there are already."""
    scores, missing = dict(known), _missing(scorers, known)
    dense = None
    # The dense model first: the others are compared with it.
    for name in sorted(scorers, key=lambda name: name != DENSE):
        if name in missing or name == DENSE:
            logits = answer_logits(scorers[name].logits(item.tokens, item.first), item)
            dense = logits if name == DENSE else dense
            scores[name] = score(logits, item, dense, name).to_dict()
        bar.update()
    return {"task": cell.task, "length": cell.length, "depth": cell.depth, "index": cell.index, "id": item.id, "scores": scores}


def _cell(row: Mapping[str, Any]) -> Cell:
    return Cell(row["task"], row["length"], row["depth"], row["index"])


class _Log:
    """Scores of items, appended as JSON lines; the first line holds what they depend on."""

    def __init__(self, path: Path | None, identity: Mapping[str, Any], methods: Mapping[str, Any]) -> None:
        self._path = path
        self._rows: dict[Cell, dict[str, Any]] = {}
        if path is None:
            return
        lines = self._read(path)
        seen: set[str] = set()
        for row in lines:
            if "methods" in row:
                self._check(path, row, identity, methods)
                seen |= set(row["methods"])
            else:
                self._rows[_cell(row)] = row
        if not lines or not set(methods) <= seen:
            self._append({"identity": dict(identity), "methods": dict(methods)})

    def find(self, cell: Cell, item: Item) -> dict[str, Any] | None:
        """What is known of an item; nothing when the one in its cell was another (another tokenizer, other texts)."""
        row = self._rows.get(cell)
        return row if row is not None and row.get("id") == item.id else None

    def add(self, row: dict[str, Any]) -> None:
        """Keep the scores of an item."""
        self._rows[_cell(row)] = row
        if self._path is not None:
            self._append(row)

    def _append(self, row: Mapping[str, Any]) -> None:
        assert self._path is not None
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
        except (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError) as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}; change -o") from None

    def _read(self, path: Path) -> list[dict[str, Any]]:
        """All whole lines; what an interruption left of a last one is cut off."""
        if not path.exists():
            return []
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            rows = [json.loads(line) for line in whole.splitlines()]
            known = all(isinstance(row, dict) and ("methods" in row or "scores" in row) for row in rows)
        except ValueError:
            known = False
        if not known or (rows and "methods" not in rows[0]):
            raise UserError(f"{path} is not a file of scores; remove it, or change -o")
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        return rows

    @staticmethod
    def _check(path: Path, head: Mapping[str, Any], identity: Mapping[str, Any], methods: Mapping[str, Any]) -> None:
        changed = [key for key, value in identity.items() if head["identity"].get(key) != value]
        changed += [name for name in methods if name in head["methods"] and head["methods"][name] != methods[name]]
        if changed:
            raise UserError(f"{path} holds scores of another {', '.join(changed)}; use another -o, or remove it")
