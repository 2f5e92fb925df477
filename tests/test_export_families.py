"""Every family as an artefact, against transformers: prompts longer than windows, steps past wrapped rings, tighter plans."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from test_session import op_library
from tiny_models import FAMILIES, save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from attnspan.cpu_runtime.session import Session
from attnspan.export.frontends.build import build
from attnspan.export.frontends.decoder import layer_windows, read_decoder
from attnspan.export.frontends.families import FAMILIES as ROWS
from attnspan.export.pipeline import Options, export_model
from attnspan.export.rewrite.cpu import rewrite_cpu
from attnspan.export.source import open_source
from attnspan.export.torch_reference import TorchReference
from attnspan.planner.errors import UserError
from attnspan.planner.plan import Plan
from attnspan.planner.shape import ModelShape
from attnspan.planner.uniform import uniform

N_MAX = 512
PROMPT, STEPS = 390, 80  # rings of 384 slots and less wrap; so do windows
TOLERANCE = 3e-4
SLIDING = [name for name, config in FAMILIES.items() if config.get("sliding_window")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a family's tiny model, saved once."""
    return cache(lambda family: save_tiny_model(tmp_path_factory.mktemp(family), family))


def exported(model: Path, out: Path, density: float, spread: float = 0.0, **options: Any) -> Path:
    plan = out.parent / f"{out.name}-plan.json"
    uniform(ModelShape.from_config(model), density, N_MAX, spread).save(plan)
    wanted = {"model": str(model), "out": out, "plan": plan, "cache_dtype": "fp32", "library": op_library()} | options
    return export_model(Options(**wanted)).folder


def generate(folder: Path, chunk: int = 100, use_library: bool = True) -> tuple[np.ndarray, list[int]]:
    """Logits of a prompt and of greedy steps after it, [PROMPT + STEPS, vocab], and all tokens; another row is shorter."""
    library = op_library() if use_library else None
    session = Session(folder, batch=2, chunk=chunk, threads=1, use_library=library is not None, library=library)
    prompt = np.random.default_rng(0).integers(0, 256, PROMPT).tolist()
    session.prefill(1, prompt[:7])
    logits = [session.prefill(0, prompt, keep=PROMPT)]
    tokens = list(prompt)
    for _ in range(STEPS):
        tokens.append(int(logits[-1][-1].argmax()))
        logits.append(session.decode([tokens[-1], 5])[:1])
    return np.concatenate(logits), tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_is_what_transformers_computes(family: str, folders: Any, tmp_path: Path) -> None:
    """The unmodified model on the whole text at once: logits, and so the tokens, of prompt and steps."""
    folder = folders(family)
    got, tokens = generate(exported(folder, tmp_path / "out", 1.0))
    how = {"attn_implementation": "eager"}  # the only one that caps scores
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()
    with torch.no_grad():
        want = model(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(got, want, atol=TOLERANCE)
    assert want[PROMPT - 1 : -1].argmax(-1).tolist() == tokens[PROMPT:]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_is_what_the_reference_computes(family: str, folders: Any, tmp_path: Path) -> None:
    """KV heads of 128 and 384 slots where the model's own windows leave that; the reference masks transformers' own model."""
    folder = folders(family)
    out = exported(folder, tmp_path / "out", 0.5, 0.25)
    plan = Plan.load(out)
    got, tokens = generate(out)
    spans = np.stack([plan.spans(max(PROMPT, i + 1)) for i in range(len(tokens))])
    assert (plan.capacities() < PROMPT).all()
    reference = TorchReference(folder, plan, "float32")
    want = reference.logits(reference.hidden(tokens, torch.from_numpy(spans))).numpy()
    np.testing.assert_allclose(got, want, atol=TOLERANCE)
    assert want[PROMPT - 1 : -1].argmax(-1).tolist() == tokens[PROMPT:]


@pytest.mark.parametrize("family", SLIDING)
def test_windows_bound_spans_and_have_no_sinks(family: str, folders: Any, tmp_path: Path) -> None:
    """In the plan, in the graph and in the caches; layers that do not slide keep what the plan says."""
    folder = folders(family)
    windows = layer_windows(json.loads((folder / "config.json").read_text()))
    out = exported(folder, tmp_path / "out", 0.5, 0.25)
    plan, info = Plan.load(out), json.loads((out / "attnspan.json").read_text())
    assert plan.windows == tuple(windows)
    assert any(windows)
    free = dataclasses.replace(plan, windows=())
    attentions = [node for node in ir.load(out / "model.onnx").graph if node.op_type == "SpanAttention"]
    for i, (window, node) in enumerate(zip(windows, attentions, strict=True)):
        for n in (1, 64, 100, 200, N_MAX):
            want = free.spans(n)[i] if window is None else np.minimum(free.spans(n)[i], window)
            np.testing.assert_array_equal(plan.spans(n)[i], want)
        capacity = plan.capacities()[i].tolist()
        assert node.attributes["sink"].as_int() == info["attention"][i].get("sink", 64) == (64 if window is None else 0)
        assert list(node.attributes["capacity"].as_ints()) == info["capacity"][i] == capacity
        assert window is None or max(capacity) <= window


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_function_bodies_slide_and_cap(family: str, folders: Any, tmp_path: Path) -> None:
    out = exported(folders(family), tmp_path / "out", 0.5, 0.25)
    got, _ = generate(out, use_library=False)
    np.testing.assert_allclose(got, generate(out)[0], atol=TOLERANCE)


def test_a_window_that_no_text_reaches_changes_nothing(tmp_path: Path) -> None:
    """The plan keeps its sinks."""
    out = exported(save_tiny_model(tmp_path / "wide", "mistral", sliding_window=N_MAX), tmp_path / "wide-out", 0.5)
    plan = Plan.load(out)
    assert plan.windows == ()
    assert set(plan.sinks) == {64}


def test_a_rewrite_refuses_a_plan_without_the_windows(folders: Any) -> None:
    source = open_source(str(folders("gemma3_text")))
    model = build(source.config, source.weights, N_MAX)
    with pytest.raises(ValueError, match="layer 0 has a window of 70 tokens"):
        rewrite_cpu(model, uniform(source.shape, 1.0, N_MAX), ir.DataType.FLOAT)


LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [2.0, 5.0, 9.0, 20.0],
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 256,
}


@pytest.mark.parametrize("n_max", [256, 512])
def test_longrope_has_one_set_of_frequencies(n_max: int, tmp_path: Path) -> None:
    """The short factors where no text is longer than the length trained at first, else the long ones for every text."""
    folder = save_tiny_model(tmp_path / "model", "phi3", rope_parameters=LONG, original_max_position_embeddings=256)
    out = exported(folder, tmp_path / "out", 1.0, n_max=n_max)
    tokens = np.random.default_rng(0).integers(0, 256, n_max - 40)  # 216, 472
    got = Session(out, use_library=False, threads=1).prefill(0, tokens.tolist(), keep=len(tokens))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        np.testing.assert_allclose(got, model(torch.from_numpy(tokens)[None]).logits[0].numpy(), atol=TOLERANCE)
    assert read_decoder(json.loads((folder / "config.json").read_text()), n_max).ropes["full_attention"].factor > 1


def test_longrope_as_older_configs_say_it(tmp_path: Path) -> None:
    """Phi-3 with transformers 4: rope_scaling of type `su` or `longrope`, the rest beside it."""
    folder = save_tiny_model(tmp_path, "phi3", rope_parameters=LONG, original_max_position_embeddings=256)
    new = json.loads((folder / "config.json").read_text())
    old = {key: x for key, x in new.items() if key != "rope_parameters"}
    old |= {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    old["rope_scaling"] = {"type": "su", "short_factor": LONG["short_factor"], "long_factor": LONG["long_factor"]}
    for n_max in (256, 512):
        a, b = (read_decoder(config, n_max).ropes["full_attention"] for config in (old, new))
        np.testing.assert_array_equal(a.frequencies, b.frequencies)
        assert a.factor == b.factor


def test_gemma_3_as_older_configs_say_it(folders: Any) -> None:
    """transformers 4 wrote rope_theta, rope_local_base_freq, rope_scaling and a pattern of layers."""
    new = json.loads((folders("gemma3_text") / "config.json").read_text()) | {"num_hidden_layers": 8}
    new["layer_types"] = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 2
    old = {key: x for key, x in new.items() if key not in ("rope_parameters", "layer_types")}
    old |= {"rope_theta": 50000.0, "rope_local_base_freq": 1000.0, "sliding_window_pattern": 6}
    old["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    a, b = (read_decoder(config, N_MAX) for config in (old, new))
    assert a.layers == b.layers
    assert [layer.window for layer in a.layers] == [70] * 5 + [None, 70, 70]
    assert a.ropes.keys() == b.ropes.keys() == {"sliding_attention", "full_attention"}
    for kind in a.ropes:
        np.testing.assert_array_equal(a.ropes[kind].frequencies, b.ropes[kind].frequencies)


@pytest.mark.parametrize("kind", ROWS)
def test_defaults_are_those_of_transformers(kind: str) -> None:
    """What a config may leave out, as files on the hub do with all that equals a default."""
    config = AutoConfig.for_model(kind)
    for key, value in ROWS[kind].defaults.items():
        if key == "rope_theta":
            parameters = config.rope_parameters
            assert parameters.get("full_attention", parameters)["rope_theta"] == value
        else:
            assert getattr(type(config), key) == value, key
    given = {"model_type": kind, "num_hidden_layers": 16, "num_attention_heads": 4, "hidden_size": 64}
    given |= {"sliding_window": 96} if getattr(config, "sliding_window", None) else {}
    full = AutoConfig.for_model(**given)
    types = getattr(full, "layer_types", None) or ["sliding_attention" if getattr(full, "sliding_window", None) else ""] * 16
    wanted = [full.sliding_window if name == "sliding_attention" else None for name in types]
    assert layer_windows(given) == wanted


def test_fused_weights_stay_in_place(folders: Any) -> None:
    """Parts of Phi-3's qkv_proj and gate_up_proj are pieces of the file."""
    source = open_source(str(folders("phi3")))
    graph = build(source.config, source.weights, N_MAX).graph
    found = {name: x.const_value for name, x in graph.initializers.items() if "_proj" in name}
    assert len(found) == 2 * 7
    assert all(isinstance(x, ir.ExternalTensor) and x.path.endswith("model.safetensors") for x in found.values())
    fused = source.weights["model.layers.1.self_attn.qkv_proj.weight"].numpy()
    parts = [found[f"model.layers.1.self_attn.{kind}_proj.weight"].numpy() for kind in "qkv"]
    np.testing.assert_array_equal(np.concatenate(parts), fused)


def test_mixtures_are_in_fp32_only(folders: Any) -> None:
    source = open_source(str(folders("mixtral")))
    with pytest.raises(UserError, match="mixture of experts, which --dtype fp32 alone"):
        build(source.config, source.weights, N_MAX, ir.DataType.FLOAT16)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("phi3", {"intermediate_size": 95}, "'model.layers.0.mlp.gate_up_proj.weight' has 192 rows, 190 by config.json"),
        ("mixtral", {"num_local_experts": 3}, "'model.layers.0.mlp.gate.weight' is [4, 64], [3, 64] by config.json"),
        ("mixtral", {"num_local_experts": None}, "config.json lacks 'num_local_experts'"),
        ("gemma2", {"use_bidirectional_attention": True}, "attends to later tokens"),
        ("olmo2", {"model_type": "llama"}, "lacks the weight 'model.layers.0.input_layernorm.weight'"),
    ],
)
def test_refusals(family: str, change: dict[str, Any], message: str, folders: Any) -> None:
    source = open_source(str(folders(family)))
    config = {key: value for key, value in (source.config | change).items() if value is not None}
    with pytest.raises(UserError) as error:
        build(config, source.weights, N_MAX)
    assert message in str(error.value)
