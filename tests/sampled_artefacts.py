"""Artefacts of one tiny model with sampled heads of every kind, and sessions over them: shared by tests."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny_models import export_rules, export_tiny

from attnspan.cpu_runtime.library import library_path
from attnspan.cpu_runtime.session import Session
from attnspan.planner.errors import UserError
from attnspan.planner.rules import HeadRule, LshParams
from attnspan.runtime.generate import IDLE

N_MAX = 1024
ATOL = 2e-4
"""fp32 against fp32; logits of the tiny models are about 10."""
INDEXES = {
    "exact": LshParams("exact", 64),
    "sketch": LshParams("sketch", 64, fraction=0.1),
    "signature": LshParams("signature", 64, signature_bits=128, max_hamming=56),
    "tables": LshParams("tables", 64, bits=4, tables=20, min_collisions=2),
}


def op_library() -> Path | None:
    try:
        return Path(os.environ.get("ATTNSPAN_LIBRARY") or library_path())
    except UserError:
        return None


needs_library = pytest.mark.skipif(op_library() is None, reason="no op library")
LIBRARIES = ["function", pytest.param("library", marks=needs_library)]


def export_kinds(root: Path) -> dict[str, Path]:
    """Artefacts with fp32 caches: one of each index, with a mixed layer and a sampled one, and `span` without sampled heads."""
    found = {"span": export_tiny(root / "span", n_max=N_MAX).folder}
    for name, params in INDEXES.items():
        lsh = HeadRule("lsh", lsh=params)
        rules = [[lsh, HeadRule("span", 0, 0.5)], [lsh, lsh]]
        found[name] = export_rules(root / name, rules, n_max=N_MAX).folder
    return found


def sample_always(folder: Path) -> Path:
    """Change an artefact to sample from the first indexed key on: of its own accord the library does so from 2048 tokens."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "LshAttention":
            node.attribute.append(onnx.helper.make_attribute("dense_below", 0))
    content = model.SerializeToString()
    (folder / "model.onnx").write_bytes(content)
    info = json.loads((folder / "attnspan.json").read_text())
    info["files"]["model.onnx"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "attnspan.json").write_text(json.dumps(info))
    return folder


def tokens(count: int, seed: int = 0) -> list[int]:
    """Random ids of bytes."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, 256, count)]


def opened(folder: Path, how: str = "function", **options: int) -> Session:
    used = how == "library"
    return Session(folder, use_library=used, library=op_library() if used else None, threads=1, **options)


def steps(session: Session, row: int, count: int, seed: int = 5) -> np.ndarray:
    """Logits of `count` decode steps of one row, the others idle."""
    out = []
    for token in tokens(count, seed):
        feed = np.full(session.batch, IDLE)
        feed[row] = token
        out.append(session.decode(feed)[row])
    return np.array(out)
