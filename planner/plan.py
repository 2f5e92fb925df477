"""The plan: one rule per KV head of every layer, and the file that holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attnspan.planner.errors import UserError
from attnspan.planner.files import read_json, write_whole
from attnspan.planner.rules import BLOCK, SINK, HeadRule, check_int, check_number, span_tokens
from attnspan.planner.shape import ModelShape

__all__ = ["MAX_TOKENS", "SCHEMA", "ModelShape", "Plan", "ladder"]

SCHEMA = 1
"""Version of plan.json that this code writes and reads."""
MAX_TOKENS = 2**30
"""Longest n_max; spans then fit int32."""


def ladder(n_max: int) -> list[int]:
    """Lengths that densities are reported at: powers of two from 2048 below n_max, then n_max itself."""
    return [n for n in (2**k for k in range(11, 31)) if n < n_max] + [n_max]


@dataclass(frozen=True)
class Plan:
    """What every KV head of a model keeps, for sequences of up to n_max tokens.

    rules[layer][kv_head]; predicted_loss maps a length to a loss; solver_gap is relative. windows[layer]: what the model itself
    lets the heads of a layer see, in tokens, None: everything; such a layer has no sinks: a head sees the last min(span, window)
    tokens (see `windows.limit_plan`). UserError when a value is out of range or the rules do not have the shape
    [layers, kv_heads].
    """

    model: ModelShape
    n_max: int
    rules: Sequence[Sequence[HeadRule]]
    sink: int = SINK
    block: int = BLOCK
    provenance: Mapping[str, Any] = field(default_factory=dict)
    predicted_loss: Mapping[int, float] = field(default_factory=dict)
    solver_gap: float | None = None
    validation: Mapping[str, Any] = field(default_factory=dict)
    windows: Sequence[int | None] = ()

    def __post_init__(self) -> None:
        n_max = check_int("n_max", self.n_max, 128, MAX_TOKENS, "; change --n-max")
        object.__setattr__(self, "n_max", n_max)
        for name, value, only in (("sink", self.sink, SINK), ("block", self.block, BLOCK)):
            if type(value) is not int or value != only:
                raise UserError(f"{name} is {value!r}: this version of attnspan knows {only} only")
        object.__setattr__(self, "rules", tuple(tuple(layer) for layer in self.rules))
        if len(self.rules) != self.model.layers:
            raise UserError(f"rules cover {len(self.rules)} layers: the model has {self.model.layers}")
        for i, layer in enumerate(self.rules):
            if len(layer) != self.model.kv_heads:
                raise UserError(f"rules of layer {i} cover {len(layer)} KV heads: the model has {self.model.kv_heads}")
            for h, rule in enumerate(layer):
                if rule.lsh is not None and rule.lsh.window + SINK > n_max:
                    raise UserError(
                        f"lsh window of layer {i}, KV head {h} is {rule.lsh.window}: window and "
                        f"{SINK} sinks must fit in n_max = {n_max}"
                    )
        self._check_windows()
        for length, loss in self.predicted_loss.items():
            check_int("length of a predicted_loss", length, 1, MAX_TOKENS)
            check_number(f"predicted_loss at {length}", loss, -1e30, 1e30)
        if self.solver_gap is not None:
            check_number("solver_gap", self.solver_gap, 0.0, 1e30)

    def _check_windows(self) -> None:
        given, layers = self.windows, len(self.rules)
        if not isinstance(given, list | tuple) or len(given) not in (0, layers):
            raise UserError(
                f"windows is {given!r:.60}: must be a list of a window in tokens, or null, for each of {layers} layers"
            )
        windows = tuple(w if w is None else check_int(f"window of layer {i}", w, 1, MAX_TOKENS) for i, w in enumerate(given))
        object.__setattr__(self, "windows", windows if any(windows) else ())
        for i, window in enumerate(self.windows):
            for h, rule in enumerate(self.rules[i]):
                if window is not None and rule.lsh is not None:
                    raise UserError(
                        f"KV head {h} of layer {i} has mode 'lsh': its layer has a window, it must be 'span' or 'dense'"
                    )

    @property
    def sinks(self) -> tuple[int, ...]:
        """First tokens that the heads of each layer always keep, [layers]: none in a layer with a window."""
        windows = self.windows or (None,) * len(self.rules)
        return tuple(self.sink if window is None else 0 for window in windows)

    @cached_property
    def limits(self) -> npt.NDArray[np.int32]:
        """Largest span of each layer, in tokens: its window, 2^30 for a layer without one. int32 [layers]."""
        windows = self.windows or (None,) * len(self.rules)
        return np.array([MAX_TOKENS if window is None else window for window in windows], np.int32)

    @cached_property
    def _alpha_beta(self) -> npt.NDArray[np.float64]:
        return np.array([[(rule.alpha, rule.beta) for rule in layer] for layer in self.rules], np.float64)

    def spans(self, n: int) -> npt.NDArray[np.int32]:
        """Spans in force at length n (0 to n_max), in tokens: int32 [layers, kv_heads]."""
        check_int("length", n, 0, self.n_max, f" (n_max of the plan): plan for {n!r} with --n-max")
        return np.minimum(span_tokens(self._alpha_beta[..., 0], self._alpha_beta[..., 1], n), self.limits[:, None])

    def capacities(self) -> npt.NDArray[np.int32]:
        """Slots that each head owns in the cache of an artefact built for n_max: int32 [layers, kv_heads]."""
        return self.spans(self.n_max)

    def density(self, n: int | None = None) -> float:
        """Kept slots over dense slots at length n (default n_max), averaged over KV heads, in (0, 1]."""
        n = self.n_max if n is None else n
        check_int("length", n, 1, self.n_max, f" (n_max of the plan): plan for {n!r} with --n-max")
        return float(np.minimum(self.spans(n), n).mean() / n)

    def check_model(self, shape: ModelShape) -> None:
        """Raise UserError, naming every difference, when this plan was not made for a model of that shape."""
        names = ["layers", "heads", "kv_heads", "head_dim"]
        pairs = [(name, getattr(self.model, name), getattr(shape, name)) for name in names]
        differ = [f"{name} {a} against {b}" for name, a, b in pairs if a != b and None not in (a, b)]
        if not differ and self.model.config_hash and shape.config_hash:
            ours, theirs = self.model.config_hash, shape.config_hash
            differ = [f"config hash {ours} against {theirs}"] if ours != theirs else []
        if differ:
            raise UserError(
                f"the plan was made for model {self.model.id!r}, not for {shape.id!r}: {', '.join(differ)} "
                "(plan against model); change --plan"
            )

    def to_dict(self) -> dict[str, Any]:
        """The content of plan.json."""
        from attnspan.planner.schema import plan_to_dict

        return plan_to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "plan") -> Plan:
        """Check and build from the content of plan.json; UserError names file, field and value."""
        from attnspan.planner.schema import plan_from_dict

        return plan_from_dict(data, where)

    def save(self, path: str | Path) -> None:
        """Write plan.json whole: to a temporary name in the same folder, then renamed."""
        from attnspan.planner.schema import dump

        write_whole(Path(path), dump(self.to_dict()).encode("utf-8"))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read and check plan.json (or the folder that holds it); UserError when it is not a plan."""
        file = Path(path)
        file = file / "plan.json" if file.is_dir() else file
        return cls.from_dict(read_json(file), str(file))
