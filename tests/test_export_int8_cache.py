"""Int8 caches: scales from what each head stores, bodies that do as the library does, verification."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from sampled_artefacts import INDEXES, needs_library, op_library
from tiny_models import export_rules, export_tiny

from attnspan.cpu_runtime.session import Session
from attnspan.export.cache_scales import layer_scales, measure_scales, read_scales
from attnspan.export.sample_text import sample_tokens
from attnspan.planner.rules import HeadRule
from attnspan.runtime.artefact import Artefact

IDS = np.random.default_rng(1).integers(0, 256, 300).tolist()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One model with caches in int8 and in fp32; spans 128 and 384."""
    root = tmp_path_factory.mktemp("int8")
    (root / "fp32").mkdir()
    int8 = export_tiny(root, cache_dtype="int8", verify_tokens=400).folder
    return int8, export_tiny(root / "fp32", cache_dtype="fp32").folder


def logits(folder: Path, library: bool) -> np.ndarray:
    """Of a prompt past the shorter rings, in chunks, then of decode steps."""
    session = Session(folder, use_library=library, chunk=100, check_memory=False, library=op_library() if library else None)
    return np.concatenate([session.prefill(0, IDS, len(IDS)), *(session.decode([token]) for token in IDS[:20])])


def test_scales_are_the_largest_numbers(exported: tuple[Path, Path]) -> None:
    """Of the text that is run: read from a whole cache in fp32."""
    int8, fp32 = exported
    scales = read_scales(int8)
    artefact = Artefact.load(int8)
    count = 64  # no ring is full: the cache holds them all
    measured = measure_scales(int8, artefact.plan, artefact.vocab_size, None, tokens=count)
    session = Session(fp32, use_library=False)
    session.prefill(0, sample_tokens(int8, artefact.vocab_size, count, skip=True))
    views = session._caches.views(0, count)
    for layer in range(artefact.layers):
        for kind, at in (("key", 0), ("value", 1)):
            heads = [np.abs(array).max() for name, array in views if name == f"{kind}.{layer}"]
            np.testing.assert_allclose(measured[str(layer)][at], np.array(heads) / 127, rtol=1e-5)
            assert (scales[str(layer)][at] >= 0.999 * measured[str(layer)][at]).all()  # of a longer text


def test_file(exported: tuple[Path, Path]) -> None:
    """One byte a number, scales inside model.onnx, hashes of what was written last."""
    int8, fp32 = exported
    artefact = Artefact.load(int8)
    artefact.check_hashes()
    assert artefact.cache_dtype == "int8"
    assert artefact.kv_bytes() * 4 == Artefact.load(fp32).kv_bytes()
    model = ir.load(int8 / "model.onnx")
    for x in model.graph.inputs:
        if x.name.startswith("past_"):
            assert x.dtype == ir.DataType.INT8
    assert not any(scale.size > 2 or (scale == 1).any() for pair in read_scales(int8).values() for scale in pair)


@pytest.mark.parametrize("library", [False, pytest.param(True, marks=needs_library)])
def test_close_to_fp32(exported: tuple[Path, Path], library: bool) -> None:
    int8, fp32 = (logits(folder, library) for folder in exported)
    assert 0 < np.abs(int8 - fp32).mean() <= 0.02 * np.abs(fp32).max()


@needs_library
def test_body_does_as_the_library(exported: tuple[Path, Path]) -> None:
    """A number that rounds the other way moves one key by one step: almost all logits are the same."""
    library, body = (logits(exported[0], use) for use in (True, False))
    assert np.abs(library - body).mean() <= 1e-3
    assert np.abs(library - body).max() <= 0.1


def test_verification(exported: tuple[Path, Path]) -> None:
    """Against PyTorch with the same rounding, and, reported, without."""
    rows = Artefact.load(exported[0]).info["verify"]["rows"]
    assert rows[0]["wrapped"] == 4
    assert 0 < 3 * rows[0]["mean_diff"] < rows[0]["lost_diff"]


@needs_library
@pytest.mark.parametrize("index", ["exact", "signature"])
def test_sampled_heads(index: str, tmp_path: Path) -> None:
    """A layer with both ops: two parts with scales of their own, and the bodies do as the library in a prompt."""
    lsh = HeadRule("lsh", lsh=INDEXES[index])
    done = export_rules(tmp_path, [[lsh, HeadRule("span", 0, 0.5)], [lsh, lsh]], cache_dtype="int8", library=op_library())
    scales = read_scales(done.folder)
    assert {name: len(key) for name, (key, _) in scales.items()} == {"0": 1, "0.lsh": 1, "1": 2}
    whole = layer_scales(scales, done.plan)
    assert whole[0][0].tolist() == [float(scales["0.lsh"][0][0]), float(scales["0"][0][0])]
    runs = [Session(done.folder, use_library=use, check_memory=False).prefill(0, IDS, len(IDS)) for use in (True, False)]
    assert np.abs(runs[0] - runs[1]).mean() <= 1e-3
