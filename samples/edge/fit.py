"""What a chat takes in memory, and the longest context that a cap leaves room for. Bytes; bounds, measured where they come from.

    process   Python, NumPy, ONNX Runtime with its threads, the tokenizer
    weights   int4 weights as ONNX Runtime packs them, and the pages of the file that stay mapped
    caches    keys and values in int8 for n_max tokens, by the plan: exact
    working   activations of one chunk of a prompt, the score of every word, ONNX Runtime's arena around them
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass

from attnspan.planner.cost import allocated_bytes
from attnspan.planner.errors import UserError
from attnspan.planner.plan import ModelShape, Plan
from attnspan.planner.uniform import uniform

CHUNK = 128
"""Tokens of a prompt computed at a time: as fast as 512 on two cores, with a quarter of the activations."""
CACHE = "int8"
LEAST = 512
"""The shortest context that is worth a chat, in tokens."""
STEP = 64
DENSITIES = (1.0, 0.75, 0.5)
"""Shares of the context that KV heads keep, in the order they are tried where there is no calibrated plan."""
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

PROCESS = 90 * 10**6
TOKENIZER = 12
"""Bytes in memory for a byte of tokenizer.json: hash tables of words and merges."""
PACKED, ROWS = 1.4, 0.3
"""Bytes in memory for a byte of model.onnx.data: packed copies of what is multiplied; rows of the embedding as words come up."""
ARENA = 24 * 10**6
"""What ONNX Runtime's arena takes beyond what is in use: it grows by powers of two."""


@dataclass(frozen=True)
class Need:
    """Bytes that a chat takes at most, by what takes them."""

    process: int
    weights: int
    caches: int
    working: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.process + self.weights + self.caches + self.working

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {megabytes(getattr(self, field.name))}" for field in dataclasses.fields(self))
        return f"{megabytes(self.total)} ({parts})"


@dataclass(frozen=True)
class Model:
    """What the arithmetic needs to know of a model. weights: bytes of model.onnx.data; tokenizer: bytes of tokenizer.json."""

    weights: int
    tokenizer: int
    hidden: int
    intermediate: int
    vocab: int

    def need(self, plan: Plan) -> Need:
        """What a chat under a plan takes; the plan's model has a head_dim."""
        caches = allocated_bytes(plan, CACHE)
        assert caches is not None
        # A layer holds some tensors of the width of the model and three of its MLP at a time, in fp32.
        activations = CHUNK * 4 * (8 * self.hidden + 3 * self.intermediate)
        process = PROCESS + TOKENIZER * self.tokenizer
        return Need(process, int((PACKED + ROWS) * self.weights), caches, activations + 3 * 4 * self.vocab + ARENA)


def read_size(text: str) -> int:
    """Bytes of a size such as 350MB or 1.5GiB. UserError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", text)
    unit = match[2].upper() if match else ""
    unit = unit + "B" if unit in ("K", "M", "G") else unit
    if match is None or unit not in UNITS or float(match[1]) <= 0:
        raise UserError(f"--memory is {text!r}; must be a size such as 350MB, 1.5GB or 1GiB")
    return int(float(match[1]) * UNITS[unit])


def megabytes(size: int) -> str:
    """A size for people, rounded up: what is printed as needed is enough."""
    return f"{-(-size // 10**6)} MB"


def choose(cap: int, model: Model, shape: ModelShape, limit: int, plan: Plan | None = None) -> Plan:
    """The plan for the longest context, up to `limit` tokens, whose chat stays below `cap` bytes.

    All that fits at `limit` is dense, or as dense as it can be; a shorter context is taken only where the least density does not
    fit. `plan`: a calibrated one, which is tried after the dense form and in place of uniform densities. UserError, with the
    numbers and the least cap that works, where not even LEAST tokens fit.
    """
    for longest in _ladder(shape, plan, limit):
        if model.need(longest).total <= cap:
            return longest
    lengths = range(LEAST // STEP, limit // STEP + 1)
    low, high = -1, len(lengths)  # lengths[low] fits, lengths[high] does not
    while high - low > 1:
        middle = (low + high) // 2
        fits = model.need(_sparsest(shape, plan, STEP * lengths[middle])).total <= cap
        low, high = (middle, high) if fits else (low, middle)
    if low < 0:
        least = model.need(_sparsest(shape, plan, min(LEAST, limit)))
        raise UserError(
            f"--memory is {megabytes(cap)}: a chat of {min(LEAST, limit)} tokens with {shape.id} takes {least}; "
            f"give --memory {least.total // 10**6 + 1}MB or more, or a smaller model"
        )
    return _sparsest(shape, plan, STEP * lengths[low])


def _ladder(shape: ModelShape, plan: Plan | None, n_max: int) -> Iterable[Plan]:
    yield uniform(shape, 1.0, n_max)
    if plan is not None:
        yield dataclasses.replace(plan, n_max=n_max)
    else:
        yield from (uniform(shape, density, n_max) for density in DENSITIES[1:])


def _sparsest(shape: ModelShape, plan: Plan | None, n_max: int) -> Plan:
    return uniform(shape, DENSITIES[-1], n_max) if plan is None else dataclasses.replace(plan, n_max=n_max)
