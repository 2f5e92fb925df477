"""The artefact folder: what `attnspan export` wrote, read back and checked before any weight is touched."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attnspan.planner.errors import UserError
from attnspan.planner.files import read_json
from attnspan.planner.hybrid import hybrid_parts
from attnspan.planner.lsh import FIRST_KEYS
from attnspan.planner.parts import Part, plan_parts
from attnspan.planner.plan import Plan
from attnspan.planner.portable import MAX_CHUNK, portable_parts
from attnspan.planner.rules import check_int

__all__ = ["CACHE_BYTES", "SCHEMA", "Artefact"]

SCHEMA = 1
"""Version of attnspan.json that this code reads."""
HASH_AT_LOAD = 16 << 20
"""Files below this many bytes are hashed on every load; larger ones (weights) by `check_hashes` only."""
CACHE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
"""Bytes of one element of a cache, by its type."""
_AGAIN = "copy the folder again, or make it again with: attnspan export --overwrite"
_COUNTS = ("n_max", "layers", "heads", "kv_heads", "head_dim", "vocab_size")


@dataclass(frozen=True)
class Artefact:
    """One artefact folder.

    capacity: tokens that each head keeps, [layers][kv_heads]. chunk: target `portable`, most tokens of a call (see
    `planner/portable.py`); others, None: any number. info: attnspan.json as read.
    """

    folder: Path
    target: str
    n_max: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    sink: int
    dtype: str
    cache_dtype: str
    capacity: tuple[tuple[int, ...], ...]
    plan: Plan
    chunk: int | None
    info: Mapping[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Artefact:
        """Read and check a folder: its description, its plan, the size of every file, the hash of small ones.

        UserError when it is no artefact, when it was written by a newer version, when a file is missing, cut
        short or changed.
        """
        folder = Path(folder)
        file = folder / "attnspan.json"
        if not folder.is_dir():
            what = "is a file, not a folder" if folder.exists() else "does not exist"
            raise UserError(f"{folder} {what}: give an artefact folder, as made by: attnspan export MODEL {folder}")
        if not file.is_file():
            raise UserError(f"{folder} is not an artefact: it has no attnspan.json; make one with attnspan export")
        info = read_json(file)
        schema = info.get("schema")
        if schema != SCHEMA or isinstance(schema, bool):
            raise UserError(f"{file}: schema is {schema!r}, this version of attnspan reads {SCHEMA}; export it again")
        counts = {name: check_int(f"{file}: {name}", info.get(name), 1, 2**31 - 1) for name in _COUNTS}
        sink = check_int(f"{file}: sink", info.get("sink"), 0, counts["n_max"])
        for name in ("target", "dtype", "cache_dtype"):
            if not isinstance(info.get(name), str):
                raise UserError(f"{file}: {name} is {info.get(name)!r}: must be a string; {_AGAIN}")
        if info["cache_dtype"] not in CACHE_BYTES:
            allowed = ", ".join(CACHE_BYTES)
            raise UserError(f"{file}: cache_dtype is {info['cache_dtype']!r}: must be one of {allowed}; {_AGAIN}")
        _check_files(folder, info)
        plan = Plan.load(folder / "plan.json")
        capacity = info.get("capacity")
        if (
            plan.n_max != counts["n_max"]
            or plan.sink != sink
            or plan.capacities().shape != (counts["layers"], counts["kv_heads"])
            or plan.capacities().tolist() != capacity
        ):
            raise UserError(f"{file} and plan.json disagree about n_max, sink or capacities; {_AGAIN}")
        chunk = check_int(f"{file}: chunk", info.get("chunk"), 1, MAX_CHUNK) if info["target"] == "portable" else None
        attention = [part.describe(counts["head_dim"]) for part in _parts(plan, info["target"], chunk)]
        # Artefacts without sampled heads did not always say it.
        if info.get("attention", None if any("state" in part for part in attention) else attention) != attention:
            raise UserError(f"{file} and plan.json disagree about attention, or another version wrote it; {_AGAIN}")
        return cls(
            folder=folder,
            target=info["target"],
            sink=sink,
            dtype=info["dtype"],
            cache_dtype=info["cache_dtype"],
            capacity=tuple(tuple(layer) for layer in plan.capacities().tolist()),
            plan=plan,
            chunk=chunk,
            info=info,
            **counts,
        )

    @property
    def model_id(self) -> str:
        """Name of the model that was exported."""
        return str(self.info.get("model_id", self.folder.name))

    @property
    def library(self) -> Path | None:
        """The op library inside the folder; None when there is none."""
        name = self.info.get("op_library")
        path = self.folder / Path(name).name if isinstance(name, str) else None
        return path if path is not None and path.is_file() else None

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The Hugging Face config.json; empty when the folder has none."""
        return self._optional("config.json")

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """Token ids that end a generation: eos_token_id of generation_config.json, else of config.json."""
        for config in (self._optional("generation_config.json"), self.config):
            ids = config.get("eos_token_id")
            if isinstance(ids, int) and not isinstance(ids, bool):
                return frozenset([ids])
            if isinstance(ids, list) and ids:
                return frozenset(int(token) for token in ids)
        return frozenset()

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """Cache slots of each layer, those of all heads added, [layers]."""
        return tuple(sum(part.slots for part in self.parts if part.layer == i) for i in range(self.layers))

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The attention ops, with their caches and states, in the order of the layers."""
        return tuple(_parts(self.plan, self.target, self.chunk))

    @cached_property
    def fingerprint(self) -> str:
        """What caches and states of a row depend on: a hash of the model, its weights and the plan."""
        files = self.info["files"]
        names = [name for name in ("model.onnx", "model.onnx.data", "plan.json") if name in files]
        return hashlib.sha256("\n".join(f"{name} {files[name]['sha256']}" for name in names).encode()).hexdigest()

    def kv_bytes(self, batch: int = 1) -> int:
        """Bytes of all key and value caches for `batch` rows, as allocated (capacity for n_max tokens)."""
        return 2 * batch * sum(self.slots) * self.head_dim * CACHE_BYTES[self.cache_dtype]

    def state_bytes(self, batch: int = 1) -> int:
        """Bytes of the indexes of sampled heads for `batch` rows, as allocated; they come on top of the caches."""
        return batch * sum(part.state_bytes(self.head_dim) for part in self.parts)

    def dense_kv_bytes(self, batch: int = 1) -> int:
        """Bytes that a dense cache of the same type would take for n_max tokens."""
        per_token = 2 * self.layers * self.kv_heads * self.head_dim * CACHE_BYTES[self.cache_dtype]
        return batch * self.n_max * per_token

    def kv_bytes_in_force(self, n: int) -> int:
        """Bytes of keys and values that one decode step reads for a row of n tokens; sampled heads count in full."""
        spans: npt.NDArray[np.int64] = np.minimum(self.plan.spans(n), n).astype(np.int64)
        return 2 * int(spans.sum()) * self.head_dim * CACHE_BYTES[self.cache_dtype]

    def may_sample(self, n: int) -> bool:
        """Whether a decode step of a row of n tokens may sample some head; below, everything is exact."""
        indexes = [part.lsh for part in self.parts if part.lsh is not None and part.lsh.index != "exact"]
        return any(n - self.sink - lsh.window >= FIRST_KEYS for lsh in indexes)

    def check_hashes(self) -> None:
        """Compare the SHA-256 of every file with attnspan.json; UserError naming the first that differs."""
        for name, entry in self.info["files"].items():
            _check_hash(self.folder / name, entry)

    def _optional(self, name: str) -> Mapping[str, Any]:
        file = self.folder / name
        return read_json(file) if file.is_file() else {}


def _parts(plan: Plan, target: str, chunk: int | None) -> Sequence[Part]:
    if target == "hybrid":
        return hybrid_parts(plan)
    return plan_parts(plan) if chunk is None else portable_parts(plan, chunk)


def _check_files(folder: Path, info: Mapping[str, Any]) -> None:
    files = info.get("files")
    if not isinstance(files, dict) or not {"model.onnx", "plan.json"} <= set(files):
        raise UserError(f"{folder / 'attnspan.json'} does not list model.onnx and plan.json; {_AGAIN}")
    for name, entry in files.items():
        good = isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        if not good or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{folder / 'attnspan.json'}: the entry of file {name!r} is damaged; {_AGAIN}")
        if name == info.get("op_library") and not (folder / name).exists():
            continue  # the session finds another one, or says that it runs without
        try:
            size = (folder / name).stat().st_size
        except OSError:
            raise UserError(f"{folder} lacks {name}, which attnspan.json lists; {_AGAIN}") from None
        if size != entry["bytes"]:
            raise UserError(f"{folder / name} has {size} bytes, attnspan.json says {entry['bytes']}; {_AGAIN}")
        if size < HASH_AT_LOAD:
            _check_hash(folder / name, entry)


def _check_hash(file: Path, entry: Mapping[str, Any]) -> None:
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; {_AGAIN}") from None
    if digest != entry["sha256"]:
        raise UserError(
            f"{file} was changed or damaged: SHA-256 is {digest[:12]}..., attnspan.json says {entry['sha256'][:12]}...; {_AGAIN}"
        )
