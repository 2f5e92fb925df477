"""Target `hybrid`: the graph, sessions over it on the CPU against target `cpu`, and what is refused of a device."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from sampled_artefacts import INDEXES, N_MAX, needs_library, op_library, opened, sample_always, steps, tokens
from tiny_models import export_rules, export_tiny

from attnspan.cpu_runtime import loading
from attnspan.cpu_runtime.device_caches import DeviceCaches
from attnspan.cpu_runtime.session import Session
from attnspan.export.cli import main
from attnspan.export.ops import register_schemas
from attnspan.planner.errors import UserError
from attnspan.planner.rules import HeadRule, LshParams
from attnspan.runtime.artefact import Artefact
from attnspan.runtime.generate import IDLE

SPAN = HeadRule("span", 0, 0.5)
TOLERANCE = 1e-5
"""Of the largest logit."""
Pair = tuple[Path, Path]


def close(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, atol=TOLERANCE * np.abs(want).max())


def head(name: str) -> HeadRule:
    return HeadRule("lsh", lsh=INDEXES[name])


def both(root: Path, rules: list[list[HeadRule]], **options: Any) -> Pair:
    """Artefacts of targets `cpu` and `hybrid`, fp32, that sample from the first indexed key on."""
    one, two = (
        export_rules(root / target, rules, n_max=N_MAX, target=target, dtype="fp32", **options).folder
        for target in ("cpu", "hybrid")
    )  # fmt: skip
    return sample_always(one), sample_always(two)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Sampled heads in every layer, beside a span head in the first."""
    root = tmp_path_factory.mktemp("pairs")
    return {name: both(root / name, [[head(name), SPAN], [head(name)] * 2]) for name in INDEXES}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of one, two and four parts, with every index; 16 bits; windows that are no multiple of 64."""
    odd = LshParams("tables", 96, bits=3, tables=5, min_collisions=1)
    rules = [
        [head("signature"), SPAN, head("tables"), HeadRule("lsh", lsh=odd)],
        [head("exact"), HeadRule("lsh", lsh=dataclasses.replace(INDEXES["sketch"], window=33)), SPAN, head("exact")],
        [head("signature")] * 4,
    ]
    config = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "num_hidden_layers": 3}
    return export_rules(
        tmp_path_factory.mktemp("deep"), rules, n_max=N_MAX, config=config, target="hybrid", cache_dtype=None
    ).folder


def test_graph(deep: Path) -> None:
    register_schemas()
    onnx.checker.check_model(deep / "model.onnx", full_check=True)
    model = onnx.load(deep / "model.onnx", load_external_data=False)
    nodes = {x.name: x for x in model.graph.node if x.domain}
    assert [x.name for x in model.functions] == ["SpanAttention", "LshAttention", "LshHash", "MergeAttention"]
    sampled = {"0.lsh": True, "0.lsh2": True, "0.lsh3": False, "1.lsh": False, "1.lsh2": False, "2": True}
    wanted = {"layers.0.attention": "SpanAttention", "layers.1.attention": "SpanAttention"}
    for part, hashed in sampled.items():
        wanted |= {f"layers.{part}.codes": "LshHash"} if hashed else {}
        wanted |= {f"layers.{part}.near.attention": "SpanAttention", f"layers.{part}.attention": "LshAttention"}
        wanted[f"layers.{part}.merge"] = "MergeAttention"
    assert {name: x.op_type for name, x in nodes.items()} == wanted
    for part, hashed in sampled.items():
        near, far, merged = (nodes[f"layers.{part}.{x}"] for x in ("near.attention", "attention", "merge"))
        assert far.input[:3] == near.input[:3]
        assert far.input[9] == near.input[6]
        assert list(far.input[10:]) == (list(nodes[f"layers.{part}.codes"].output) if hashed else [])
        assert list(merged.input) == [near.output[0], near.output[3], far.output[0], far.output[3]]
    kinds = {x.name: x.type.tensor_type for x in model.graph.input}
    assert kinds["past_kv.1.lsh2"].elem_type == kinds["past_key.1.lsh2.near"].elem_type == onnx.TensorProto.FLOAT16
    assert [d.dim_value for d in kinds["past_key.1.lsh2.near"].shape.dim] == [0, 128, 16]
    assert [d.dim_value for d in kinds["past_key.0.lsh3.near"].shape.dim] == [0, 192, 16]  # 64 sinks and 96, rounded up


def test_attnspan_json_names_the_inputs(deep: Path) -> None:
    model = onnx.load(deep / "model.onnx", load_external_data=False)
    info = json.loads((deep / "attnspan.json").read_text())
    assert (info["target"], info["dtype"], info["cache_dtype"]) == ("hybrid", "float16", "float16")
    names = [part[kind] for part in info["attention"] for kind in ("key", "value", "kv", "state") if kind in part]
    assert [x.name for x in model.graph.input][4:] == [f"past_{name}" for name in names]
    artefact = Artefact.load(deep)
    assert artefact.kv_bytes() == 2 * 2 * 16 * sum(part.slots for part in artefact.parts)


def same(one: Session, two: Session) -> float:
    """Asks two sessions of three rows for the same, to the bit: prompts shorter and longer than a chunk, one row too short to
    sample, steps with a row that idles, second turns, one of a single token, steps again. How far the last of 40 steps lies from
    exact attention to the same tokens."""
    for row, count in enumerate((700, 90, 1)):
        np.testing.assert_array_equal(two.prefill(row, tokens(count, row), count), one.prefill(row, tokens(count, row), count))
    for step, token in enumerate(tokens(40, 4)):
        feed = np.array([token, token if step % 2 else IDLE, token])
        got, want = two.decode(feed), one.decode(feed)
        np.testing.assert_array_equal(got[feed != IDLE], want[feed != IDLE])
    for row, count in ((1, 600), (2, 420), (0, 1)):
        np.testing.assert_array_equal(two.prefill(row, tokens(count, 8), count), one.prefill(row, tokens(count, 8), count))
        np.testing.assert_array_equal(steps(two, row, 30), steps(one, row, 30))
    one.reset([2])
    return float(np.abs(one.prefill(2, [*tokens(700, 0), *tokens(40, 4)]) - want[0]).max())


@needs_library
@pytest.mark.parametrize("name", list(INDEXES))
def test_equals_target_cpu_to_the_bit(name: str, pairs: dict[str, Pair]) -> None:
    one, two = (opened(folder, "library", batch=3, chunk=512) for folder in pairs[name])
    assert (same(one, two) > 0.01) == (name != "exact")


@needs_library
@pytest.mark.parametrize(("kind", "window"), [("sketch", 33), ("tables", 200)])
def test_equals_target_cpu_with_any_window_in_16_bits(kind: str, window: int, tmp_path: Path) -> None:
    """A window that does not fill its ring, beside dense heads; keys and values in bf16; chunks of an odd size."""
    sampled = HeadRule("lsh", lsh=dataclasses.replace(INDEXES[kind], window=window))
    rules = [[sampled, head("signature")], [sampled, HeadRule("dense")], [sampled] * 2]
    made = both(tmp_path, rules, config={"num_hidden_layers": 3}, cache_dtype="bf16")
    one, two = (opened(folder, "library", batch=3, chunk=99) for folder in made)
    assert same(one, two) > 0.01


@needs_library
def test_index_exact_is_dense(pairs: dict[str, Pair], tmp_path: Path) -> None:
    rules = [[HeadRule("dense"), SPAN], [HeadRule("dense")] * 2]
    dense = opened(export_rules(tmp_path, rules, n_max=N_MAX).folder, "library")
    hybrid = opened(pairs["exact"][1], "library")
    close(hybrid.prefill(0, tokens(700), 700), dense.prefill(0, tokens(700), 700))
    close(steps(hybrid, 0, 20), steps(dense, 0, 20))


@pytest.mark.parametrize("name", list(INDEXES))
def test_without_the_library_all_is_exact(name: str, pairs: dict[str, Pair]) -> None:
    one, two = (opened(folder, batch=2) for folder in pairs[name])
    for row, count in enumerate((300, 70)):
        close(two.prefill(row, tokens(count, row), 60), one.prefill(row, tokens(count, row), 60))
    for token in tokens(3, 4):
        close(two.decode([token, token]), one.decode([token, token]))


@needs_library
@pytest.mark.parametrize("name", ["sketch", "signature", "tables"])
def test_rows_are_forked_saved_and_loaded(name: str, pairs: dict[str, Pair], tmp_path: Path) -> None:
    """A prompt that rows share is computed once and copied; copies go on apart, to the bit as the row itself would."""
    folder = pairs[name][1]
    session = opened(folder, "library", batch=3)
    session.prefill(1, tokens(600))
    steps(session, 1, 3, 9)
    session.save(tmp_path / "row", 1)
    session.fork(1, 0)
    session.fork(0, 2)
    other = opened(folder, "library")
    other.load(tmp_path / "row")
    want = steps(other, 0, 60, 7)
    for row in (2, 0):
        np.testing.assert_array_equal(steps(session, row, 60, 7), want)
    other.load(tmp_path / "row")
    np.testing.assert_array_equal(session.prefill(1, tokens(40, 3), 40), other.prefill(0, tokens(40, 3), 40))  # a second turn
    with pytest.raises(UserError, match="saved with another artefact"):
        opened(pairs[name][0], "library").load(tmp_path / "row")


@needs_library
def test_in_16_bits(deep: Path, tmp_path: Path) -> None:
    """The default: ONNX Runtime computes most of it in fp32 on a CPU; prompts and steps go through."""
    session, slow = opened(deep, "library"), opened(deep)
    got, want = session.prefill(0, tokens(500), 100), slow.prefill(0, tokens(500), 100)
    np.testing.assert_allclose(got, want, atol=2e-2 * np.abs(want).max())
    assert np.isfinite(steps(session, 0, 3)).all()
    assert session.backend["device"] == "cpu"


@needs_library
@pytest.mark.parametrize("name", ["tables", "exact"])
def test_a_prompt_in_one_piece(name: str, pairs: dict[str, Pair]) -> None:
    """As on a GPU: SpanAttention sees a whole prompt under spans above its rings, the CPU stores and indexes; then in chunks."""
    chunks, whole = (opened(pairs[name][1], "library", batch=2) for _ in range(2))
    whole.device = "cuda"
    seen: list[int] = []
    for row, count in enumerate((700, 128)):
        got = whole.prefill(row, tokens(count, row), 90, on_progress=lambda _, done, __: seen.append(done))
        close(got, chunks.prefill(row, tokens(count, row), 90))
    assert seen == [0, 700, 0, 128]
    close(whole.prefill(1, tokens(400, 5), 99), chunks.prefill(1, tokens(400, 5), 99))  # 128 tokens fill a ring: none has left
    close(whole.prefill(0, tokens(100, 6), 99), chunks.prefill(0, tokens(100, 6), 99))  # here many have
    got, want = (np.array([session.decode([token, token]) for token in tokens(10, 4)]) for session in (whole, chunks))
    if name == "exact":
        close(got, want)
    else:  # an index that grew in other pieces has other means, and draws other keys
        assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.9


@needs_library
def test_pieces_that_a_device_has_memory_for(pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that was asked for is kept; without one, a prompt that does not fit is a mistake of the user's, with a remedy."""
    chunks, pieces, whole = (opened(pairs["exact"][1], "library", **more) for more in ({}, {"chunk": 300}, {}))
    pieces.device = whole.device = "cuda"
    seen: list[int] = []
    got = pieces.prefill(0, tokens(700), 90, on_progress=lambda _, done, __: seen.append(done))
    close(got, chunks.prefill(0, tokens(700), 90))
    assert seen == [0, 300, 600, 700]

    def full(_: Any) -> None:
        raise RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 1")

    whole.prefill(0, tokens(10))
    monkeypatch.setattr(type(whole._step), "run", full)
    with pytest.raises(UserError, match="no memory on the GPU for 90 tokens of a prompt at a time: give the session a chunk"):
        whole.prefill(0, tokens(90))
    assert whole.lengths.tolist() == [0]


@needs_library
def test_rings_of_a_device(pairs: dict[str, Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go through the host to be saved, loaded and copied; small inputs are given again at each run. With ONNX Runtime's own
    memory on the CPU in a device's place."""
    folder = pairs["signature"][1]
    host = opened(folder, "library", batch=2)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "_allocate", lambda self: DeviceCaches(self.artefact, self.batch, "cpu"))
        device = opened(folder, "library", batch=2)
    names = ("0", "0.lsh.near", "1.near")
    assert sorted(device._caches._values) == [f"{kind}.{name}" for kind in ("key", "value") for name in names]
    close(device.prefill(0, tokens(500)), host.prefill(0, tokens(500)))
    device._caches.device = "elsewhere"  # all is bound by now: inputs are again
    close(steps(device, 0, 5), steps(host, 0, 5))
    device.fork(0, 1)
    device.save(tmp_path / "row", 1)
    host.load(tmp_path / "row", 1)
    want = steps(host, 1, 5, 3)
    np.testing.assert_array_equal(steps(device, 1, 5, 3), want)
    device.load(tmp_path / "row", 0)
    np.testing.assert_array_equal(steps(device, 0, 5, 3), want)


def test_memory_of_the_host(pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for before the model is read: all of it on the CPU; beside a GPU whole caches and indexes only."""
    monkeypatch.setattr("attnspan.runtime.memory.available_bytes", lambda: 700_000)
    monkeypatch.setattr(loading, "check_device", lambda _: None)
    monkeypatch.setattr("attnspan.cpu_runtime.session.check_device", lambda _: None)
    monkeypatch.setattr(ort, "InferenceSession", None)
    artefact = Artefact.load(pairs["tables"][1])
    sizes = {kind: sum(p.slots for p in artefact.parts if (p.lsh is None) == kind) * 2 * 16 * 4 for kind in (False, True)}
    for device, kv in (("cpu", sum(sizes.values())), ("cuda", sizes[False])):
        words = f"indexes of {artefact.state_bytes(40) / 1e9:.2f} GB and caches of {40 * kv / 1e9:.2f} GB .40 rows of 1024 tokens"
        with pytest.raises(UserError, match=words):
            Session(artefact, batch=40, device=device)


def test_a_device_without_a_provider_is_refused_before_anything_is_read(
    pairs: dict[str, Pair], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(Artefact, "load", None)
    assert main(["run", str(pairs["sketch"][1]), "-p", "x", "--raw", "--device", "cuda"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "has no CUDAExecutionProvider; pip uninstall onnxruntime, then pip install onnxruntime-gpu, or drop" in printed
    assert main(["run", str(pairs["sketch"][1]), "-p", "x", "--device", "tpu"]) == 2
    with pytest.raises(UserError, match="device is 'tpu': must be one of cpu, cuda"):
        loading.check_device("tpu")


def test_what_a_device_does_not_run_is_refused(pairs: dict[str, Pair], deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", None)
    with pytest.raises(UserError, match="is of target 'cpu', which runs on CPUs here; export with --target hybrid"):
        Session(pairs["sketch"][0], device="cuda")
    with pytest.raises(UserError, match="computes in float32: a GPU takes float16 or bfloat16; export with --dtype fp16"):
        Session(pairs["sketch"][1], device="cuda")
    with pytest.raises(UserError, match="drop --no-library"):
        Session(deep, device="cuda", use_library=False)


def ours(op: str) -> bool:
    return op in ("SpanAttention", "LshAttention", "LshHash", "MergeAttention")


def placed(providers: list[str], **where: str) -> Any:
    """A session with these providers, and nodes of these types on them."""
    nodes = {op: SimpleNamespace(name=f"its {op}", op_type=op, domain="attnspan" * ours(op)) for op in where}
    parts = [SimpleNamespace(ep_name=ep, get_nodes=lambda op=op: [nodes[op]]) for op, ep in where.items()]
    return SimpleNamespace(get_providers=lambda: providers, get_provider_graph_assignment_info=lambda: parts)


def test_nodes_on_the_wrong_device_are_refused() -> None:
    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    loading._check_placement(placed([cuda, cpu], SpanAttention=cuda, MergeAttention=cuda, LshAttention=cpu), "cuda")
    words = r"does not take node 'its LshHash' \(LshHash\), it would run on CPUExecutionProvider: .*build it"
    with pytest.raises(UserError, match=words):
        loading._check_placement(placed([cuda, cpu], SpanAttention=cuda, LshHash=cpu), "cuda")
    loading._check_placement(placed([cuda, cpu], MatMul=cuda, Concat=cpu), "cuda")
    with pytest.raises(UserError, match=r"has no kernel for node 'its Gemm' \(Gemm\), .* pip install -U onnxruntime-gpu"):
        loading._check_placement(placed([cuda, cpu], Gemm=cpu), "cuda")
    with pytest.raises(UserError, match=r"CUDAExecutionProvider did not start .*onnxruntime-gpu\[cuda,cudnn\]"):
        loading._check_placement(placed([cpu]), "cuda")


@needs_library
def test_a_provider_that_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Libraries that pip installed are loaded first. ONNX Runtime goes on with the CPU, which refuses bf16: told."""
    folder = export_tiny(tmp_path, target="hybrid", cache_dtype=None, dtype="bf16").folder
    loaded: list[str] = []
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: loaded.append("all") or print("Failed to load libcudnn"), raising=False)
    create = ort.InferenceSession
    monkeypatch.setattr(
        ort, "InferenceSession", lambda *given, **more: create(*given, **more | {"providers": ["CPUExecutionProvider"]})
    )
    with pytest.raises(UserError, match=r"CUDAExecutionProvider could not start: .*onnxruntime-gpu\[cuda,cudnn\]"):
        Session(folder, device="cuda", library=op_library())
    assert loaded == ["all"]
    assert capsys.readouterr().out == ""


@needs_library
def test_onnx_runtime_tells_where_nodes_run(deep: Path) -> None:
    """What `_check_placement` asks of a real session."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(op_library()))
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(str(deep / "model.onnx"), options, providers=["CPUExecutionProvider"])
    nodes = [node for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()]
    found = {node.op_type for node in nodes if node.domain == "attnspan"}
    assert found == {"SpanAttention", "LshAttention", "LshHash", "MergeAttention"}
    with pytest.raises(UserError, match="CUDAExecutionProvider did not start"):
        loading._check_placement(session, "cuda")


@needs_library
def test_bf16_needs_a_gpu(tmp_path: Path) -> None:
    folder = export_tiny(tmp_path, target="hybrid", cache_dtype=None, dtype="bf16").folder
    with pytest.raises(UserError, match="has no bfloat16 arithmetic: add --device cuda, or export with --dtype fp16 or fp32"):
        opened(folder, "library")


def test_a_plan_without_sampled_heads(tmp_path: Path) -> None:
    """Then it is SpanAttention alone, which a GPU can run."""
    one, two = (opened(export_tiny(tmp_path / x, target=x, dtype="fp32").folder) for x in ("cpu", "hybrid"))
    assert two.state_bytes == 0
    close(two.prefill(0, tokens(200), 200), one.prefill(0, tokens(200), 200))


def test_run(pairs: dict[str, Pair], capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["-p", "a", "--raw", "--max-new-tokens", "3", "--json"]
    told = []
    for folder in pairs["exact"]:
        assert main(["run", str(folder), *argv]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0]["tokens"] == told[1]["tokens"]
    assert told[1]["device"] == "cpu"
    assert main(["inspect", str(pairs["exact"][1])]) == 0
