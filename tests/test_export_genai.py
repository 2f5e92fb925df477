"""`attnspan export --genai`: onnxruntime-genai generates what the session does, and refuses what it cannot carry."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import demo_model
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import span_op
from tiny_models import export_rules, export_tiny

from attnspan.cpu_runtime.session import Session
from attnspan.export import genai
from attnspan.export.cli import main
from attnspan.export.graph import Recorder, value
from attnspan.export.pipeline import Options, export_model
from attnspan.planner.errors import UserError
from attnspan.planner.plan import ModelShape, Plan
from attnspan.planner.rules import HeadRule, LshParams
from attnspan.runtime.artefact import Artefact

og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")

PAD = 258
DEMO_PLAN = Path(__file__).parents[1] / "samples" / "data" / "smollm2_135m_plan.json"
MOBY_DICK = DEMO_PLAN.with_name("moby_dick_1.txt")


def tokens(count: int, seed: int = 0) -> list[int]:
    """Random ids of bytes."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, 256, count)]


def exported(folder: Path, **options: Any) -> Path:
    return export_tiny(folder, library=span_op.library(), genai=True, **options).folder


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KV heads of 128 and 384 tokens of 512, caches in fp32."""
    return exported(tmp_path_factory.mktemp("genai"))


@pytest.fixture(scope="module")
def model(artefact: Path) -> Any:
    return og.Model(str(artefact))


def generator(model: Any, batch: int = 1, **search: Any) -> Any:
    params = og.GeneratorParams(model)
    params.set_search_options(**{"max_length": 512, "batch_size": batch} | search)
    return og.Generator(model, params)


def opened(folder: Path, batch: int = 1) -> Session:
    return Session(folder, library=span_op.library(), threads=1, batch=batch)


def logits(source: Any) -> np.ndarray:
    """Those of the last position of each row, [batch, vocab]."""
    found = np.array(source.get_logits())
    return found.reshape(-1, found.shape[-1])


def check_same(folder: Path, prompts: list[list[int]], steps: int, tolerance: float = 1e-5, turn: int = 0) -> None:
    """genai and the session give the same logits for prompts and greedy steps, then for `turn` more tokens and a step."""
    batch = len(prompts)
    theirs, ours = generator(og.Model(str(folder)), batch), opened(folder, batch)
    theirs.append_tokens(np.array(prompts, np.int32))
    expected = np.stack([ours.prefill(row, prompt)[-1] for row, prompt in enumerate(prompts)])
    for _ in range(steps):
        np.testing.assert_allclose(logits(theirs), expected, atol=tolerance)
        theirs.generate_next_token()
        token = theirs.get_next_tokens()
        np.testing.assert_array_equal(token, expected.argmax(axis=1))
        assert PAD not in token, "the text ended: choose another"
        expected = ours.decode(token)
    np.testing.assert_allclose(logits(theirs), expected, atol=tolerance)
    if turn:
        theirs.append_tokens(tokens(turn, 99))
        np.testing.assert_allclose(logits(theirs)[0], ours.prefill(0, tokens(turn, 99))[-1], atol=tolerance)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "int8"])
def test_same_as_the_session(dtype: str, tmp_path: Path) -> None:
    """A prompt that wraps the smaller rings, steps, and another prompt, which wraps the larger ones."""
    check_same(exported(tmp_path, cache_dtype=dtype), [tokens(300)], 40, turn=100)


def test_windows_of_the_model(tmp_path: Path) -> None:
    """A layer of 70 tokens without sinks beside one of 256."""
    check_same(exported(tmp_path, family="gemma3_text"), [tokens(200)], 30, turn=80)


def test_rows_of_equal_length(artefact: Path) -> None:
    check_same(artefact, [tokens(200, 6), tokens(200, 7), tokens(200, 8)], 5)


def test_caches_are_updated_in_place(artefact: Path) -> None:
    """What genai allocates is as large as the plan says, and memory that is past and present at once is enough."""
    session = ort.InferenceSession(artefact / genai.GRAPH, options(), providers=["CPUExecutionProvider"])
    inputs = {x.name: x for x in session.get_inputs()}
    assert inputs["past_key_values.1.key"].shape[1:] == [128 + 384, 1, 16]
    caches = {name: np.zeros((1, *x.shape[1:]), np.float32) for name, x in inputs.items() if name.startswith("past")}
    expected = opened(artefact).prefill(0, tokens(140))[-1]
    for first, last in ((0, 60), (60, 139), (139, 140)):
        binding = session.io_binding()
        for name, x in caches.items():
            present = name.replace("past_key_values", "present")
            binding.bind_input(name, "cpu", 0, np.float32, x.shape, x.ctypes.data)
            binding.bind_output(present, "cpu", 0, np.float32, x.shape, x.ctypes.data)
        binding.bind_cpu_input("input_ids", np.array([tokens(140)[first:last]], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, last), np.int64))
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
    # Chunks see S of their own ends, which is 128 at all three.
    np.testing.assert_allclose(binding.copy_outputs_to_cpu()[-1][0, 0], expected, atol=1e-5)
    assert caches["past_key_values.2.key"].astype(int).reshape(32) @ 2 ** np.arange(32) == 140


def options() -> ort.SessionOptions:
    wanted = ort.SessionOptions()
    wanted.log_severity_level = 4
    wanted.register_custom_ops_library(str(span_op.library()))
    return wanted


def test_spans_are_those_of_the_plan() -> None:
    """At every length, with rules whose spans are far from multiples of 64, and a window."""
    rng = np.random.default_rng(3)
    n_max = 5000
    rules = [[HeadRule("span", rng.uniform(-300, 900), rng.uniform()) for _ in range(4)] for _ in range(3)]
    rules[1][2] = HeadRule("dense")
    plan = Plan(ModelShape("tiny", 3, 8, 4, 16), n_max, rules, windows=(None, 701, None))
    record, total = Recorder("spans"), value("total", ir.DataType.INT64, ["batch"])
    span = genai.spans(record, total, plan)
    span.name = "span"
    graph = ir.Graph(
        [total], [span], nodes=record.nodes, initializers=list(record.initializers.values()), opset_imports={"": 24}, name="spans"
    )
    content = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    (found,) = ort.InferenceSession(content).run(None, {"total": np.arange(1, n_max + 1)})
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, np.stack([plan.spans(n) for n in range(1, n_max + 1)], axis=1))


def after(source: Any, prompt: list[int], steps: int = 4) -> list[int]:
    source.append_tokens(prompt)
    said = []
    for _ in range(steps):
        source.generate_next_token()
        said.append(int(source.get_next_tokens()[0]))
    return said


def test_taking_back(model: Any, tmp_path: Path) -> None:
    """As long as no ring has wrapped, and to the beginning: right; otherwise refused, and not wrong."""
    text = tokens(200, 1)
    source = generator(model)
    said = after(source, text[:100])
    source.rewind_to(70)
    assert after(source, text[70:100]) == said
    source.rewind_to(0)
    said = after(source, text)
    source.rewind_to(130)
    with pytest.raises(Exception, match=rf"SpanAttention: length of row 0 is {genai.REWOUND}"):
        source.append_tokens(text[130:])
    source.rewind_to(0)
    assert after(source, text) == said

    dense = generator(og.Model(str(exported(tmp_path, density=1.0))))
    said = after(dense, text)
    dense.rewind_to(130)
    assert after(dense, text[130:]) == said


def test_a_token_after_the_end(model: Any) -> None:
    """genai computes the last token once more then, which displaces nothing that it needs."""
    source = generator(model)
    source.append_tokens(tokens(200, 1))
    for _ in range(40):
        source.generate_next_token()
        if source.is_done():
            break
    else:
        pytest.fail("the text did not end")
    length = source.token_count()
    source.generate_next_token()
    assert source.token_count() <= length + 1


def test_a_token_that_was_never_computed(model: Any) -> None:
    """genai does not run the token it generated last when more text is appended, unless its logits were asked for."""
    source = generator(model)
    after(source, tokens(50, 1))
    with pytest.raises(Exception, match=rf"SpanAttention: length of row 0 is {genai.SKIPPED}"):
        source.append_tokens(tokens(10))
    source.rewind_to(0)
    after(source, tokens(50, 1))
    logits(source)
    source.append_tokens(tokens(10))
    assert source.token_count() == 50 + 4 + 10


def test_padded_rows_are_refused(model: Any) -> None:
    source = generator(model, 2)
    with pytest.raises(Exception, match="SpanAttention: length of row 1 is -20"):
        source.append_tokens(np.array([tokens(60), [*tokens(40, 1), *[PAD] * 20]], np.int32))


def test_beams_and_longer_texts_are_refused(model: Any) -> None:
    with pytest.raises(Exception, match="Beam search"):
        generator(model, num_beams=2)
    with pytest.raises(Exception, match="512"):
        generator(model, max_length=513)


def test_what_genai_cannot_carry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Indexes of sampled heads, other targets; nothing is written."""
    sampled = HeadRule("lsh", lsh=LshParams("exact", 64))
    with pytest.raises(UserError, match="KV head 1 of layer 0 has mode 'lsh': onnxruntime-genai keeps keys and values of one"):
        export_rules(tmp_path, [[HeadRule(), sampled], [HeadRule()] * 2], library=span_op.library(), genai=True)
    assert not (tmp_path / "artefact").exists()
    command = ["export", str(tmp_path / "model"), str(tmp_path / "artefact"), "--target", "portable", "--genai", "--no-verify"]
    assert main(command) == 2
    assert "--genai with --target portable: onnxruntime-genai loads what target 'cpu' writes" in capsys.readouterr().err
    assert not (tmp_path / "artefact").exists()


def test_the_folder(artefact: Path, tmp_path: Path) -> None:
    """Both graphs share the weights; the description lists the files; nothing of it without the option."""
    listed = Artefact.load(artefact).info["files"]
    assert {genai.GRAPH, genai.CONFIG, "model.onnx.data"} <= set(listed)
    assert listed[genai.GRAPH]["bytes"] < listed["model.onnx.data"]["bytes"]
    config = json.loads((artefact / genai.CONFIG).read_text(encoding="utf-8"))
    assert config["model"]["context_length"] == config["search"]["max_length"] == 512
    assert config["model"]["eos_token_id"] == [PAD]
    assert config["model"]["decoder"]["session_options"]["custom_ops_library"] == span_op.library().name
    assert genai.CONFIG not in Artefact.load(export_tiny(tmp_path, library=span_op.library()).folder).info["files"]


def test_its_tokenizer_and_moved_folder(artefact: Path, tmp_path: Path) -> None:
    """A copy of the folder elsewhere is all that genai needs."""
    moved = shutil.copytree(artefact, tmp_path / "moved")
    model = og.Model(str(moved))
    tokenizer = og.Tokenizer(model)
    assert tokenizer.encode("Ahab").tolist() == list(b"Ahab")
    assert after(generator(model), tokenizer.encode("Ahab"), 3) == opened(moved).generate("Ahab", 3)[0].tokens


def test_caches_of_other_shapes_are_refused() -> None:
    """The op takes [batch, slots, 1, dim], and nothing else of four axes."""
    slots = 128 + 192
    feeds = {name: np.zeros((1, 2, 64), np.float32) for name in ("key", "value")}
    feeds |= {"query": np.zeros((1, 2, 128), np.float32)}
    feeds |= {"length": np.zeros(1, np.int32), "span": np.array([[128, 192]], np.int32)}
    session = span_op.session(4, [128, 192], shapes=False)
    good = np.zeros((1, slots, 1, 32), np.float32)
    assert session.run(None, feeds | {"past_key": good, "past_value": good})[1].shape == good.shape
    for bad in (good.reshape(1, 1, slots, 32), good.reshape(1, slots // 2, 2, 32), good[..., None]):
        with pytest.raises(Exception, match="past_key has shape"):
            session.run(None, feeds | {"past_key": bad, "past_value": bad})
    with pytest.raises(Exception, match="past_value has shape"):
        session.run(None, feeds | {"past_key": good, "past_value": good[:, :, 0]})


@pytest.mark.model
def test_the_real_model_says_the_same(tmp_path: Path) -> None:
    """64 greedy tokens after a prompt that wraps the smaller rings, with the tokenizer that genai reads."""
    out = tmp_path / "out"
    export_model(Options(str(demo_model.gguf()), out, plan=DEMO_PLAN, n_max=1024, library=span_op.library(), genai=True))
    model = og.Model(str(out))
    tokenizer, session = og.Tokenizer(model), opened(out)
    prompt = tokenizer.encode(MOBY_DICK.read_text(encoding="utf-8"))[:600].tolist()
    assert prompt == session.tokenizer.encode(MOBY_DICK.read_text(encoding="utf-8"))[:600]
    expected = session.generate(prompt, 64, stop_tokens=frozenset())[0].tokens
    assert after(generator(model, max_length=1024), prompt, 64) == expected
