"""Does an artefact compute what the ONNX file does that it was made of? Called in `verify`'s process of its own.

The file runs as it is, over whole caches. The artefact is compared on texts so short that its plan keeps all of them. What a
plan leaves out of longer ones does not depend on the file.

Products of 4-bit weights with `accuracy_level` 4 round activations to 8 bits: values that differ in the last bit then give logits
as far apart as either is from exact ones. Both sides are therefore compared with that rounding off.
"""

from __future__ import annotations

import bisect
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from attnspan.export.verify import GENERATED
from attnspan.planner.errors import UserError
from attnspan.planner.plan import Plan
from attnspan.runtime.artefact import Artefact

MODEL = "model.onnx"


class FileSession:
    """An ONNX file as it is, on ONNX Runtime: one row, caches that grow, or none. exact: without rounding to 8 bits."""

    def __init__(self, file: Path, exact: bool = False) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent.resolve()))
        try:
            content = _without_rounding(file).SerializeToString() if exact else str(file)
            self.session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises many kinds
            raise UserError(f"{file} does not run on ONNX Runtime ({str(error).splitlines()[0]}); add --no-verify") from None
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        self.plain = [x.name for x in inputs if len(x.shape) != 4]
        self.types = {x.name: _dtype(x.type) for x in inputs}
        self.caches = [x for x in inputs if len(x.shape) == 4]
        self.names = ["logits", *(x.name for x in outputs if len(x.shape) == 4)]
        if len(self.caches) != len(self.names) - 1:
            raise UserError(f"{file} has {len(self.caches)} caches as inputs, {len(self.names) - 1} as outputs; add --no-verify")

    def start(self, kv_heads: int, dim: int) -> None:
        """Forget all tokens; the caches' shape."""
        self.past = [np.zeros((1, kv_heads, 0, dim), self.types[x.name]) for x in self.caches]
        self.ids: list[int] = []

    def __call__(self, tokens: list[int]) -> NDArray[np.float32]:
        """Append tokens; logits of each, fp32 [tokens, vocab]."""
        past = len(self.ids)
        self.ids += tokens
        new = tokens if self.caches else self.ids
        known: dict[str, Any] = {
            "input_ids": [new],
            "attention_mask": [[1] * len(self.ids)],
            "position_ids": [list(range(past if self.caches else 0, len(self.ids)))],
        }
        feeds = {name: np.array(known[name], self.types[name]) for name in self.plain}
        feeds |= {x.name: array for x, array in zip(self.caches, self.past, strict=True)}
        logits, *self.past = self.session.run(self.names, feeds)
        return np.asarray(logits[0, -len(tokens) :], np.float32)


def compare(artefact: Artefact, file: Path, tokens: int, generated: int = GENERATED) -> list[Any]:
    """Rows as of `verify_worker.compare`: prompts of up to `tokens` tokens, as far as the plan keeps them whole; decode steps."""
    import torch
    from tqdm import tqdm

    from attnspan.export import verify_worker
    from attnspan.export.sample_text import sample_tokens

    longest = min(tokens, kept_whole(artefact.plan) - generated)
    text = sample_tokens(artefact.folder, artefact.vocab_size, longest)
    prompts = [text, text[: max(longest // 3, 1)]]
    with tqdm(total=2 * sum(map(len, prompts)), unit=" tokens", desc="verify", delay=2, leave=False, disable=None) as bar:
        with _exact(artefact) as exact:
            logits, chosen = verify_worker._run(exact, prompts, generated, bar)
        session = FileSession(file, exact=True)
        rows = []
        for prompt, new, got in zip(prompts, chosen, logits, strict=True):
            session.start(artefact.plan.model.kv_heads, artefact.head_dim)
            wanted = np.concatenate([session(prompt), *(session([token]) for token in new)])[-len(got) :]
            bar.update(len(prompt))
            rows.append(verify_worker._row(got, _Logits(), torch.from_numpy(wanted), new, len(prompt), artefact))
    return rows


def _without_rounding(file: Path) -> onnx.ModelProto:
    """A model, its external weights not loaded, whose products keep activations in fp32."""
    proto = onnx.load(file, load_external_data=False)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = min(attribute.i, 1)
    return proto


@contextmanager
def _exact(artefact: Artefact) -> Iterator[Artefact]:
    """The artefact, or one beside it over the same weights whose products do not round."""
    proto = _without_rounding(artefact.folder / MODEL)
    if not any(node.op_type == "MatMulNBits" for node in proto.graph.node):
        yield artefact
        return
    with tempfile.TemporaryDirectory(dir=artefact.folder.parent) as scratch:
        for x in artefact.folder.iterdir():
            if x.is_file() and x.name != MODEL:
                try:
                    os.link(x, Path(scratch) / x.name)
                except OSError:  # a file system without links
                    shutil.copyfile(x, Path(scratch) / x.name)
        onnx.save(proto, Path(scratch) / MODEL)
        yield dataclasses.replace(artefact, folder=Path(scratch))


def kept_whole(plan: Plan) -> int:
    """The longest text in tokens of which every head keeps as much as the model itself sees; at least 128, the least span."""
    windows = np.array([x or plan.n_max for x in plan.windows or [None] * plan.model.layers])[:, None]

    def whole(n: int) -> bool:
        return bool((plan.spans(n) >= np.minimum(n, windows)).all())

    return bisect.bisect_left(range(1, plan.n_max + 1), True, key=lambda n: not whole(n))


class _Logits:
    """A reference whose hidden states are logits already."""

    def logits(self, hidden: Any) -> Any:
        """Themselves."""
        return hidden


def _dtype(name: str) -> np.dtype[Any]:
    """Of ONNX Runtime's name for a tensor type."""
    kinds = {"tensor(float)": "f4", "tensor(float16)": "f2", "tensor(int64)": "i8", "tensor(int32)": "i4", "tensor(bool)": "?"}
    if name not in kinds:
        raise UserError(f"the ONNX file has inputs of type {name}, which cannot be given from here; add --no-verify")
    return np.dtype(kinds[name])
