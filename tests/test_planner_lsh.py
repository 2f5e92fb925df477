"""Sampled heads in plans: size and probability of an index, its projection, how heads are grouped, and `attnspan plan lsh`."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from attnspan.export.cli import main
from attnspan.planner.cost import allocated_bytes, cost_table, index_table, state_bytes
from attnspan.planner.errors import UserError
from attnspan.planner.inspect import summarise
from attnspan.planner.lsh import inclusion, index_bytes_per_token, projection, projection_of, signs
from attnspan.planner.lsh import state_bytes as layer_bytes
from attnspan.planner.lsh_command import MAX_HAMMING
from attnspan.planner.parts import identity, layer_parts, plan_parts
from attnspan.planner.plan import ModelShape, Plan
from attnspan.planner.rules import HeadRule, LshParams
from attnspan.planner.uniform import sampled

SHAPE = ModelShape("tiny", layers=3, heads=8, kv_heads=4, head_dim=64)
SIGNATURE = LshParams("signature", 64, signature_bits=128, max_hamming=47)
TABLES = LshParams("tables", 64, bits=10, tables=150, min_collisions=2)
EXACT = LshParams("exact", 64)
SKETCH = LshParams("sketch", 64)


def head(params: LshParams) -> HeadRule:
    return HeadRule("lsh", lsh=params)


@pytest.mark.parametrize("capacity", [64, 1000, 32768, 131072])
def test_state_bytes(capacity: int) -> None:
    """Section by section, 8 KV heads of size 128."""
    n64 = math.ceil(capacity / 64) * 64
    fixed = 256 + 16 * 8 * 128 * 4 + 8 * 128 * 8
    assert layer_bytes(EXACT, 8, 128, capacity) == fixed
    assert layer_bytes(SIGNATURE, 8, 128, capacity) == fixed + 8 * n64 * 16
    segments = math.ceil(n64 / 65536)
    lists, buckets, ids = (math.ceil(x / 64) * 64 for x in (segments * 600, segments * 150 * 1025 * 2, n64 * 300))
    assert layer_bytes(TABLES, 8, 128, capacity) == fixed + 8 * (lists + buckets + ids)
    assert index_bytes_per_token(TABLES, capacity, None) == (lists + buckets + ids) / capacity
    assert layer_bytes(SKETCH, 8, 128, capacity) == fixed + 8 * n64 // 64 * (32 * 64 + 128)


@pytest.mark.parametrize(("dim", "each"), [(128, 34), (64, 18), (80, 22), (65, 19), (3, 3), (1, 3)])
def test_bytes_of_sketches(dim: int, each: int) -> None:
    """A quarter of a byte a dimension, rounded up, and two; for whole groups of 64 tokens. One KV head."""
    assert index_bytes_per_token(SKETCH, 1024, dim) == each
    assert index_bytes_per_token(SKETCH, 1024, None) is None
    one, two = (layer_bytes(SKETCH, 1, dim, tokens) for tokens in (64, 65))
    assert two - one == 64 * each
    assert one == layer_bytes(EXACT, 1, dim, 64) + 64 * each


def test_bytes_per_token() -> None:
    """16 and 32 bytes for signatures; tables take little over half of the reference's 600 from 16k tokens on."""
    for bits in (64, 128, 256):
        assert index_bytes_per_token(dataclasses.replace(SIGNATURE, signature_bits=bits), 8192, None) == bits / 8
    long, short = (index_bytes_per_token(TABLES, capacity, 128) for capacity in (131072, 16384))
    assert long is not None
    assert short is not None
    assert 300 < long < short < 320


def test_projection() -> None:
    matrix = projection(64, 150, 7)
    assert matrix.shape == (64, 150)
    assert matrix.dtype == np.float32
    assert matrix.flags.c_contiguous
    np.testing.assert_array_equal(matrix, matrix.astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(matrix, projection(64, 150, 7))
    for other in (projection(64, 150, 8), projection(64, 151, 7)[:, :150]):
        assert abs(np.corrcoef(matrix.ravel(), other.ravel())[0, 1]) < 0.05
    assert abs(matrix.mean()) < 0.03
    assert matrix.std() == pytest.approx(1, abs=0.03)
    gram = matrix.T @ matrix / 64
    off = gram[:64, :64] - np.eye(64)
    assert np.abs(off).max() > 0.2


def test_projection_refuses() -> None:
    with pytest.raises(UserError, match="seed of the projection is -1"):
        projection(64, 64, -1)


def test_signs() -> None:
    got = signs(128, 3)
    assert (got.shape, got.dtype, got.flags.c_contiguous) == ((128, 4), np.float32, True)
    assert set(got.ravel()) == {-1, 1}
    np.testing.assert_array_equal(got, signs(128, 3))
    wanted = np.random.Generator(np.random.PCG64([3, 4, 128])).integers(0, 2, (128, 4))
    np.testing.assert_array_equal(got < 0, wanted == 1)
    for other in (signs(128, 4), signs(129, 3)[:128], got[:, [1, 2, 3, 0]]):
        assert abs((got == other).mean() - 0.5) < 0.12
    with pytest.raises(UserError, match="seed of the signs is -1"):
        signs(64, -1)


def test_the_projection_of_each_index() -> None:
    np.testing.assert_array_equal(projection_of(dataclasses.replace(SKETCH, seed=5), 64), signs(64, 5))
    np.testing.assert_array_equal(projection_of(SIGNATURE, 64), projection(64, 128, 0))
    np.testing.assert_array_equal(projection_of(TABLES, 64), projection(64, 1500, 0))
    assert SKETCH.columns == 4


def binomial(n: int, p: float, wanted: range) -> float:
    return math.fsum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in wanted)


@pytest.mark.parametrize("cos", [-1.0, -0.3, 0.0, 0.2, 0.7, 0.999, 1.0])
def test_inclusion(cos: float) -> None:
    p = 1 - math.acos(cos) / math.pi
    assert inclusion(SIGNATURE, cos) == pytest.approx(binomial(128, 1 - p, range(48)), rel=1e-9, abs=1e-300)
    assert inclusion(TABLES, cos) == pytest.approx(binomial(150, p**10, range(2, 151)), rel=1e-9, abs=1e-300)
    assert inclusion(EXACT, cos) == 1


def test_inclusion_broadcasts_and_clips() -> None:
    bounds = np.array([[20], [128]])
    drawn = inclusion(SIGNATURE, [-1.5, 0.0, 1.0000001], bounds)
    assert drawn.shape == (2, 3)
    assert drawn.dtype == np.float64
    assert (drawn[1] == 1).all()
    assert drawn[0, 2] == 1
    assert inclusion(SIGNATURE, 1.0 + 1e-7) == 1


def test_sketches_have_no_probability_of_an_angle() -> None:
    with pytest.raises(ValueError, match="'sketch' does not draw by the angle"):
        inclusion(SKETCH, 0.5)


def test_keys_are_drawn_as_often_as_predicted() -> None:
    """Over many projections: the share of draws of one key, at a cosine of 0.3 to the query, within 4 standard errors."""
    dim, draws = 16, 400
    query = np.eye(dim)[0]
    key = 0.3 * query + math.sqrt(1 - 0.09) * np.eye(dim)[1]
    few = dataclasses.replace(TABLES, bits=4, tables=20)
    for params in (SIGNATURE, few):
        hits = 0
        for seed in range(draws):
            matrix = projection(dim, params.columns, seed)
            differ = (query @ matrix > 0) != (key @ matrix > 0)
            if params.index == "signature":
                hits += int(differ.sum() <= 47)
            else:
                hits += int((~differ.reshape(20, 4).any(1)).sum() >= 2)
        expected = float(inclusion(params, 0.3))
        assert abs(hits / draws - expected) < 4 * math.sqrt(expected * (1 - expected) / draws)


def test_the_defaults_draw_what_their_help_says() -> None:
    cos = np.random.default_rng(0).normal(0, 0.1, 200_000)
    shares = [inclusion(LshParams("signature", 64, signature_bits=b, max_hamming=h), cos).mean() for b, h in MAX_HAMMING.items()]
    assert [round(100 * share, 1) for share in shares] == [0.5, 0.9, 1.0]
    assert round(100 * inclusion(TABLES, cos).mean(), 1) == 1.8


def test_parts_of_layers() -> None:
    span, dense = HeadRule("span", 0, 0.25), HeadRule("dense")
    wide = dataclasses.replace(SIGNATURE, max_hamming=50)
    plan = Plan(
        SHAPE,
        1024,
        [
            [head(wide), span, head(SIGNATURE), head(TABLES)],
            [head(SIGNATURE), head(wide), head(SIGNATURE), head(dataclasses.replace(SIGNATURE, window=32))],
            [dense, span, dense, span],
        ],
    )
    got = [(p.name, p.op, p.heads, p.capacity, p.max_hamming) for p in plan_parts(plan)]
    assert got == [
        ("0", "SpanAttention", (1,), (256,), None),
        ("0.lsh", "LshAttention", (0, 2), (1024, 1024), (50, 47)),
        ("0.lsh2", "LshAttention", (3,), (1024,), None),
        ("1", "LshAttention", (0, 1, 2), (1024,) * 3, (47, 50, 47)),
        ("1.lsh2", "LshAttention", (3,), (1024,), (47,)),
        ("2", "SpanAttention", (0, 1, 2, 3), (1024, 256, 1024, 256), None),
    ]
    assert len({p.name for p in plan_parts(plan)}) == 6
    first = layer_parts(plan, 0)[1]
    assert first.describe(64)["state_bytes"] == first.state_bytes(64) == layer_bytes(SIGNATURE, 2, 64, 1024)
    assert "state" not in layer_parts(plan, 2)[0].describe(64)
    assert state_bytes(plan) == sum(p.state_bytes(64) for p in plan_parts(plan))


def test_parts_of_sketched_layers() -> None:
    """Heads share an op where window, seed and fraction are equal; what may differ by head with signatures may not here."""
    more, other = dataclasses.replace(SKETCH, fraction=0.05), dataclasses.replace(SKETCH, seed=1)
    rows = [[head(SKETCH), head(more), head(SKETCH), head(SIGNATURE)], [head(SKETCH)] * 4, [head(other), head(SKETCH)] * 2]
    plan = Plan(SHAPE, 1024, rows)
    assert [(p.name, p.heads, p.max_hamming, p.lsh) for p in plan_parts(plan)] == [
        ("0", (0, 2), None, SKETCH),
        ("0.lsh2", (1,), None, more),
        ("0.lsh3", (3,), (47,), dataclasses.replace(SIGNATURE, max_hamming=0)),
        ("1", (0, 1, 2, 3), None, SKETCH),
        ("2", (0, 2), None, other),
        ("2.lsh2", (1, 3), None, SKETCH),
    ]
    assert layer_parts(plan, 1)[0].describe(64)["state_bytes"] == layer_bytes(SKETCH, 4, 64, 1024)


def test_identity_tells_indexes_apart() -> None:
    def of(params: LshParams, layer: int = 0, shape: ModelShape = SHAPE, n_max: int = 1024) -> int:
        return identity(layer_parts(sampled(shape, params, n_max, []), layer)[0], shape, n_max)

    other = dataclasses.replace(SHAPE, id="other")
    seeds = dataclasses.replace(SIGNATURE, seed=1)
    ids = [of(SIGNATURE), of(SIGNATURE, 1), of(SIGNATURE, 0, other), of(SIGNATURE, n_max=2048)]
    ids += [of(SKETCH), of(dataclasses.replace(SKETCH, seed=1)), of(seeds), of(TABLES)]
    assert len(set(ids)) == len(ids)
    assert all(0 <= x < 2**63 for x in ids)
    # These may change under an index.
    assert of(dataclasses.replace(SIGNATURE, max_hamming=3, window=9, min_inclusion=0.1)) == ids[0]
    assert of(dataclasses.replace(TABLES, min_collisions=3)) == ids[-1]
    assert of(dataclasses.replace(SKETCH, fraction=0.1, window=9)) == ids[4]


def test_a_plan_states_what_its_indexes_take(tmp_path: Path) -> None:
    plan = sampled(SHAPE, TABLES, 8192)
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    each = layer_bytes(TABLES, 4, 64, 8192)
    assert data["state_bytes"] == 2 * each == state_bytes(plan)
    assert data["indexes"] == [{"index": "tables", "bits": 10, "tables": 150, "kv_heads": 8, "bytes_per_token": 337.617}]
    assert Plan.load(tmp_path) == plan
    for name in ("indexes", "state_bytes"):
        assert Plan.from_dict({key: value for key, value in data.items() if key != name}) == plan
        with pytest.raises(UserError, match=f"{name} is 1: the rules give"):
            Plan.from_dict(data | {name: 1})
    assert "indexes" not in sampled(SHAPE, TABLES, 8192, [0, 1, 2]).to_dict()


def test_a_plan_with_sketches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = sampled(SHAPE, dataclasses.replace(SKETCH, fraction=0.05, seed=7), 8192)
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["rules"][1][0]["lsh"] == {"index": "sketch", "fraction": 0.05, "window": 64, "seed": 7}
    assert data["indexes"] == [{"index": "sketch", "fraction": 0.05, "kv_heads": 8, "bytes_per_token": 18}]
    assert data["state_bytes"] == 2 * layer_bytes(SKETCH, 4, 64, 8192)
    assert Plan.load(tmp_path) == plan
    assert main(["inspect", str(tmp_path / "plan.json"), "--no-png"]) == 0
    assert "index     sketch (fraction 0.05) of 8 KV heads, 18 B a token and KV head" in capsys.readouterr().out


def test_a_plan_may_leave_the_fraction_out() -> None:
    data = sampled(SHAPE, SKETCH, 8192).to_dict()
    for layer in data["rules"]:
        for rule in layer:
            if "lsh" in rule:
                assert rule["lsh"].pop("fraction") == 0.02
    assert Plan.from_dict(data) == sampled(SHAPE, SKETCH, 8192)
    data["rules"][1][2]["lsh"]["max_hamming"] = 3
    with pytest.raises(UserError, match=r"rules\[1\]\[2\].*max_hamming is 3: index 'sketch' does not take it"):
        Plan.from_dict(data)


def test_sketches_of_keys_of_unknown_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = sampled(dataclasses.replace(SHAPE, head_dim=None), SKETCH, 8192)
    assert state_bytes(plan) is None
    assert index_table(plan) == [{"index": "sketch", "fraction": 0.02, "kv_heads": 8, "bytes_per_token": None}]
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path) == plan
    assert main(["inspect", str(tmp_path / "plan.json"), "--no-png"]) == 0
    assert "of 8 KV heads, - B a token and KV head" in capsys.readouterr().out


def test_costs_count_states() -> None:
    plan = sampled(SHAPE, SIGNATURE, 8192)
    row, whole = cost_table(plan, [2048, 8192], batch=3)
    assert whole.state_bytes == state_bytes(plan, 3) == 3 * 2 * layer_bytes(SIGNATURE, 4, 64, 8192)
    assert row.state_bytes == 3 * 2 * layer_bytes(SIGNATURE, 4, 64, 2048)
    assert whole.kept_bytes == whole.dense_bytes == allocated_bytes(plan, "bf16", 3)
    assert [layer["state_bytes"] for layer in summarise(plan)["layers"]] == [0, *[layer_bytes(SIGNATURE, 4, 64, 8192)] * 2]
    unknown = sampled(dataclasses.replace(SHAPE, head_dim=None), SIGNATURE, 8192)
    assert state_bytes(unknown) is None
    assert Plan.from_dict(unknown.to_dict()) == unknown
    assert index_table(unknown)[0]["bytes_per_token"] == 16


SIGNATURES = ["--index", "signature"]
LONG = LshParams("signature", 64, signature_bits=256, max_hamming=101)
SHORT = LshParams("signature", 32, signature_bits=64, max_hamming=20)
COMMAND = ["plan", "lsh", "--layers", "18", "--heads", "8", "--kv-heads", "4", "--head-dim", "64"]


@pytest.mark.parametrize(
    ("options", "params"),
    [
        ([], LshParams("sketch", 64, fraction=0.02)),
        (["--index", "sketch", "--fraction", "0.5", "--seed", "3"], LshParams("sketch", 64, fraction=0.5, seed=3)),
        (["--fraction", "0.01", "--window", "32"], LshParams("sketch", 32, fraction=0.01)),
        (SIGNATURES, LONG),
        ([*SIGNATURES, "--signature-bits", "128"], SIGNATURE),
        ([*SIGNATURES, "--signature-bits", "64", "--window", "32"], SHORT),
        ([*SIGNATURES, "--max-hamming", "50", "--seed", "3"], dataclasses.replace(LONG, max_hamming=50, seed=3)),
        (["--index", "tables"], TABLES),
        (
            ["--index", "tables", "--bits", "8", "--tables", "75", "--min-collisions", "1", "--min-inclusion", "0.1"],
            LshParams("tables", 64, bits=8, tables=75, min_collisions=1, min_inclusion=0.1),
        ),
        (["--index", "exact"], EXACT),
    ],
)
def test_plan_lsh(options: list[str], params: LshParams, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.json"
    assert main([*COMMAND, *options, "--n-max", "4096", "-o", str(out)]) == 0
    plan = Plan.load(out)
    assert plan.n_max == 4096
    for i, layer in enumerate(plan.rules):
        assert set(layer) == {HeadRule("dense") if i in (0, 16) else head(params)}
    printed = capsys.readouterr().out
    assert f"index {params.index}: 64 KV heads" in printed
    assert main(["inspect", str(out), "--no-png"]) == 0
    printed = capsys.readouterr().out
    assert f"index     {params.index}" in printed
    assert "a sequence, beside the KV cache" in printed


def test_plan_lsh_takes_the_shape_and_length_from_a_model(tmp_path: Path) -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "p.json"
    assert main(["plan", "lsh", "--model", str(tmp_path), "--dense-layers", "1", "-o", str(out)]) == 0
    plan = Plan.load(out)
    assert plan.model == ModelShape.from_config(tmp_path)
    assert [layer[0].mode for layer in plan.rules] == ["lsh", "dense"]
    assert main(["plan", "lsh", "--model", str(tmp_path), "--dense-layers", "none", "-o", str(out)]) == 0
    assert {rule.mode for layer in Plan.load(out).rules for rule in layer} == {"lsh"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--index", "tree"], "must be one of sketch, signature, tables, exact; change --index"),
        (["--bits", "10"], "index 'sketch' does not take it; remove --bits, or change --index"),
        (["--tables", "150"], "index 'sketch' does not take it; remove --tables"),
        (["--min-collisions", "2"], "index 'sketch' does not take it; remove --min-collisions"),
        (["--signature-bits", "128"], "index 'sketch' does not take it; remove --signature-bits"),
        (["--max-hamming", "50"], "lsh max_hamming is 50: index 'sketch' does not take it; remove --max-hamming"),
        (["--min-inclusion", "0.1"], "lsh min_inclusion is 0.1: index 'sketch' does not take it; remove --min-inclusion"),
        (["--fraction", "0"], "lsh fraction is 0.0: must be above 0 and at most 0.5; change --fraction"),
        (["--fraction", "-0.1"], "change --fraction"),
        (["--fraction", "0.51"], "lsh fraction is 0.51: must be a number from 0 to 0.5; change --fraction"),
        (["--fraction", "nan"], "change --fraction"),
        (["--fraction", "0.02", *SIGNATURES], "lsh fraction is 0.02: index 'signature' does not take it; remove --fraction"),
        (["--fraction", "0.02", "--index", "tables"], "index 'tables' does not take it; remove --fraction, or change --index"),
        (["--fraction", "0.02", "--index", "exact"], "index 'exact' does not take it; remove --fraction"),
        ([*SIGNATURES, "--bits", "10"], "index 'signature' does not take it; remove --bits"),
        (["--index", "tables", "--max-hamming", "10"], "index 'tables' does not take it; remove --max-hamming"),
        (["--index", "tables", "--bits", "16"], "from 1 to 15; change --bits"),
        (["--index", "tables", "--tables", "1025"], "from 1 to 1024; change --tables"),
        ([*SIGNATURES, "--signature-bits", "100"], "64, 128 or 256; change --signature-bits"),
        ([*SIGNATURES, "--max-hamming", "257"], "from 0 to 256; change --max-hamming"),
        (["--window", "0"], "change --window"),
        (["--window", "8129"], "window and 64 sinks must fit in n_max = 8192"),
        (["--dense-layers", "0,18"], "dense layer is 18: must be an integer from 0 to 17"),
        (["--dense-layers", "first"], "--dense-layers is 'first'"),
        (["--seed", "-1"], "change --seed"),
        (["--min-inclusion", "-1"], "change --min-inclusion"),
    ],
)
def test_plan_lsh_refuses(options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, *options, "-o", str(tmp_path / "p.json")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
