"""The plan file: round trips, densities, and what it refuses."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnspan.planner.errors import UserError
from attnspan.planner.plan import ModelShape, Plan, ladder
from attnspan.planner.rules import HeadRule, LshParams
from attnspan.planner.uniform import uniform

SHAPE = ModelShape("tiny", layers=2, heads=6, kv_heads=3, head_dim=64, config_hash="0123456789abcdef")

WINDOW = st.integers(1, 64)
SEED = st.integers(0, 2**63 - 1)
LSH = st.one_of(
    st.builds(LshParams, st.just("sketch"), WINDOW, fraction=st.none() | st.floats(1e-6, 0.5), seed=SEED),
    st.builds(LshParams, st.just("exact"), WINDOW),
    st.builds(
        LshParams,
        st.just("tables"),
        WINDOW,
        bits=st.integers(1, 15),
        tables=st.integers(2, 400),
        min_collisions=st.integers(1, 2),
        seed=SEED,
    ),
    st.builds(
        LshParams,
        st.just("signature"),
        WINDOW,
        signature_bits=st.sampled_from([64, 128, 256]),
        max_hamming=st.integers(0, 64),
        seed=SEED,
        min_inclusion=st.sampled_from([0.0, 0.05, 1.0]),
    ),
)
RULES = st.one_of(
    st.builds(HeadRule, st.just("span"), st.floats(-1e4, 1e5), st.floats(0, 1)),
    st.just(HeadRule("dense")),
    st.builds(HeadRule, st.just("lsh"), lsh=LSH),
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    layers, kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    head_dim = draw(st.none() | st.integers(1, 256))
    shape = ModelShape(draw(st.text(max_size=9)), layers, kv_heads * group, kv_heads, head_dim)
    row = st.lists(RULES, min_size=kv_heads, max_size=kv_heads)
    return Plan(
        shape,
        n_max=draw(st.integers(128, 100_000)),
        rules=draw(st.lists(row, min_size=layers, max_size=layers)),
        provenance={"method": draw(st.text(max_size=9))},
        predicted_loss=draw(st.dictionaries(st.integers(1, 9999), st.floats(-1e9, 1e9), max_size=2)),
        solver_gap=draw(st.none() | st.floats(0, 1)),
    )


@given(plans())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    assert Plan.load(tmp_path) == plan  # a folder that holds plan.json
    assert Plan.from_dict(plan.to_dict()) == plan
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]  # no temporary file stays


@given(plans(), st.data())
def test_spans_grow_with_length_and_fit_the_capacity(plan: Plan, data: st.DataObject) -> None:
    n, m = sorted(data.draw(st.tuples(*[st.integers(1, plan.n_max)] * 2)))
    assert plan.spans(n).shape == (plan.model.layers, plan.model.kv_heads)
    assert plan.spans(n).dtype == np.int32
    assert (plan.spans(n) <= plan.spans(m)).all()
    assert (plan.spans(m) <= plan.capacities()).all()
    assert 0 < plan.density(n) <= 1
    spans = [min(rule.span(n), n) for layer in plan.rules for rule in layer]
    assert plan.density(n) == pytest.approx(sum(spans) / len(spans) / n)


def test_ladder() -> None:
    assert ladder(1000) == [1000]
    assert ladder(8192) == [2048, 4096, 8192]
    assert ladder(10_000) == [2048, 4096, 8192, 10_000]


def test_lengths_beyond_n_max_are_refused() -> None:
    plan = uniform(SHAPE, 0.5, 8192)
    for call in (plan.spans, plan.density):
        with pytest.raises(UserError, match=r"8193.*8192.*--n-max"):
            call(8193)
    with pytest.raises(UserError, match=r"127.*--n-max"):
        uniform(SHAPE, 0.5, 127)


def change(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of data where the entry at a dotted path is value (REMOVE drops it)."""
    data = copy.deepcopy(data)
    *parents, last = path.split(".")
    node: Any = data
    for key in parents:
        node = node[int(key) if isinstance(node, list) else key]
    last = int(last) if isinstance(node, list) else last  # type: ignore[assignment]
    if value is REMOVE:
        del node[last]
    else:
        node[last] = value
    return data


REMOVE = object()


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("schema", 2, "schema 2.*reads 1"),
        ("schema", True, "schema True"),
        ("schema", REMOVE, "lacks 'schema'"),
        ("rules", REMOVE, "lacks 'rules'"),
        ("nmax", 8192, "unknown key 'nmax': did you mean 'n_max'"),
        ("colour", "red", "unknown key 'colour'"),
        ("n_max", "8192", "n_max is '8192'"),
        ("n_max", 4096, "density"),
        ("sink", 4, "sink is 4"),
        ("block", 32, "block is 32"),
        ("model.layers", 3, "rules cover 2 layers: the model has 3"),
        ("model.layers", 0, "layers is 0"),
        ("model.heads", 7, "multiple of kv_heads"),
        ("model.kv_heads", 6, "layer 0 cover 3 KV heads: the model has 6"),
        ("model.head_dim", 6.5, "head_dim is 6.5"),
        ("model.id", 5, "model id is 5"),
        ("model.kvheads", 3, "did you mean 'kv_heads'"),
        ("model", [], "must be an object"),
        ("rules", {}, "must be a list of layers"),
        ("rules.0", 1, "must be a list of layers"),
        ("rules.1.2", None, r"rules\[1\]\[2\].*must be an object"),
        ("rules.1.2.beta", 2, r"rules\[1\]\[2\]: beta is 2"),
        ("rules.1.2.beta", REMOVE, r"rules\[1\]\[2\] lacks 'beta'"),
        ("rules.1.2.alhpa", 0, "did you mean 'alpha'"),
        ("rules.0.0.mode", "sparse", r"rules\[0\]\[0\]: mode is 'sparse'"),
        ("rules.0.0.lsh", {"index": "exact", "windo": 64}, "did you mean 'window'"),
        ("rules.0.0.beta", 0.25, "density at .* the rules give"),
        ("density.8192", 0.6, "density at 8192 is 0.6: the rules give 0.5"),
        ("density.8192", REMOVE, "no entry for n_max"),
        ("density.9000", 0.5, "at most n_max = 8192"),
        ("density.abc", 0.5, "must be a length in tokens"),
        ("density", 0.5, "density is 0.5: must be an object"),
        ("solver_gap", -1, "solver_gap is -1"),
        ("predicted_loss", {"2048": "low"}, "predicted_loss at 2048 is 'low'"),
        ("provenance", "me", "provenance is 'me'"),
    ],
)
def test_bad_plan_files_are_refused(tmp_path: Path, path: str, value: Any, words: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(change(uniform(SHAPE, 0.5, 8192).to_dict(), path, value)))
    with pytest.raises(UserError, match=words) as caught:
        Plan.load(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[1]", "holds a list"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"schema": 1, "schema": 1}', "'schema' appears twice"),
        (b'{"schema": NaN}', "NaN"),
        (b'{"schema": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"\xff\xfe", "cannot read"),
        (b'{"alphas": [[0]], "betas": [[1]]}', "attnspan plan import"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=words):
        Plan.load(file)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=5))
def test_any_value_in_any_field_is_refused_or_read(value: Any) -> None:
    data = uniform(SHAPE, 0.5, 8192).to_dict()
    inside = ["rules.0", "rules.0.1", "rules.0.1.alpha", *(f"model.{key}" for key in data["model"])]
    for path in [*data, *inside]:
        with contextlib.suppress(UserError):
            Plan.from_dict(change(data, path, value)).to_dict()


def test_missing_file_and_unwritable_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        Plan.load(tmp_path / "nowhere.json")
    plan = uniform(SHAPE, 0.5, 8192)
    with pytest.raises(UserError, match="cannot write"):
        plan.save(tmp_path / "no_folder" / "plan.json")
    with pytest.raises(UserError, match="it is a folder"):
        plan.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_keeps_the_old_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    uniform(SHAPE, 0.5, 8192).save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        uniform(SHAPE, 0.25, 8192).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_check_model_names_what_differs() -> None:
    plan = uniform(SHAPE, 0.5, 8192)
    plan.check_model(SHAPE)
    plan.check_model(ModelShape("other name", 2, 6, 3))  # unknown head_dim and hash are no difference
    with pytest.raises(UserError, match="layers 2 against 4, kv_heads 3 against 2"):
        plan.check_model(ModelShape("m", 4, 6, 2, 64))
    with pytest.raises(UserError, match="head_dim 64 against 128"):
        plan.check_model(ModelShape("m", 2, 6, 3, 128))
    with pytest.raises(UserError, match="config hash 0123456789abcdef against ffff"):
        plan.check_model(ModelShape("m", 2, 6, 3, 64, "ffff"))
