"""The unified planner: spans, dense heads and sampled heads under one budget, against brute force and separate accounting."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspan.calibration.target_plan import read_size
from attnspan.planner.choices import Choices
from attnspan.planner.cost import device_bytes
from attnspan.planner.decode_cost import DecodeCost
from attnspan.planner.errors import UserError
from attnspan.planner.hybrid import hybrid_parts
from attnspan.planner.inspect import summarise
from attnspan.planner.limit_text import enough
from attnspan.planner.limits import Limits
from attnspan.planner.lsh_cost import LshCost, timed_as
from attnspan.planner.lsh_grid import lsh_grid
from attnspan.planner.plan import ModelShape, Plan
from attnspan.planner.problem import SLACK, InfeasibleError
from attnspan.planner.rules import HeadRule, LshParams
from attnspan.planner.unified import plan_unified, plans_by_kinds

N_MAX = 8192
SHAPE = ModelShape("m", 3, 4, 2, 64)
SPANS = tuple(HeadRule("span", 0.0, beta) for beta in (0.0, 0.125, 0.5))
SAMPLED = tuple(
    HeadRule("lsh", lsh=p) for p in (
        LshParams("sketch", 64, fraction=0.01), LshParams("sketch", 256, fraction=0.05),
        LshParams("signature", 64, signature_bits=64, max_hamming=18),
        LshParams("tables", 64, bits=10, tables=150, min_collisions=2),
    )
)  # fmt: skip
READ = (18.0, 18.0, 8.0, 8.5)


def choices(seed: int, shape: ModelShape = SHAPE, lengths: tuple[int, ...] = (4096, N_MAX)) -> Choices:
    """Heavy-tailed losses that fall with what is kept; dense loses nothing."""
    rng = np.random.default_rng(seed)
    rules = (*SPANS, HeadRule("dense"), *SAMPLED)
    size = (len(lengths), shape.layers, shape.kv_heads)
    spans = np.sort(np.exp(rng.normal(-4, 2, (*size, len(SPANS)))))[..., ::-1]
    samples = np.exp(rng.normal(-6, 2, (*size, len(SAMPLED))))
    loss = np.concatenate([spans, np.zeros((*size, 1)), samples], -1)
    drawn, read = np.zeros((2, shape.layers, shape.kv_heads, len(rules)))
    drawn[..., -len(SAMPLED) :] = rng.uniform(0.005, 0.1, (shape.layers, shape.kv_heads, len(SAMPLED)))
    read[..., -len(SAMPLED) :] = READ
    return Choices(shape, N_MAX, rules, lengths, loss, drawn, read)


def read_share(made: Choices, plan: Plan, n: int, element: int) -> float:
    """Bytes that a token reads over those of dense attention, head by head."""
    row, total = 2 * 64 * element, 0.0
    for i, layer in enumerate(plan.rules):
        for h, rule in enumerate(layer):
            if rule.lsh is None:
                total += min(rule.span(n), n) * row
                continue
            at = made.rules.index(rule)
            if n < (4096 if rule.lsh.index == "tables" else 2048):
                total += n * row  # such a step is exact
                continue
            far = n - 64 - rule.lsh.window
            total += (64 + rule.lsh.window + made.drawn[i, h, at] * far) * row + READ[SAMPLED.index(rule)] * far
    return total / (n * row * plan.model.layers * plan.model.kv_heads)


def predicted(made: Choices, plan: Plan) -> float:
    indices = [[made.rules.index(rule) for rule in layer] for layer in plan.rules]
    return float(
        np.mean([sum(loss[i, h, r] for i, layer in enumerate(indices) for h, r in enumerate(layer)) for loss in made.loss])
    )


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.06, 0.6), gpu=st.floats(1.0, 12.0), cpu=st.floats(3.0, 12.0))
def test_bounds_and_fewer_kinds(seed: int, share: float, gpu: float, cpu: float) -> None:
    """Every plan keeps its bounds by another accounting, and more kinds are never predicted to lose more."""
    made = choices(seed)
    limits = Limits(gpu_kv=gpu * 2**20, cpu_kv=cpu * 2**20, read={4096: share})
    try:
        plans = plans_by_kinds(made, limits)
    except InfeasibleError:
        return
    whole = plans["span+dense+lsh"]
    for name, plan in plans.items():
        assert {rule.mode for layer in plan.rules for rule in layer} <= set(name.split("+"))
        assert read_share(made, plan, 4096, 2) <= share * (1 + 1e-9)
        sizes = device_bytes(plan, "bf16")
        assert sizes is not None
        assert sizes[0] <= gpu * 2**20
        assert sizes[1] <= cpu * 2**20
        assert predicted(made, whole) <= predicted(made, plan) * (1 + 1e-12)
        assert plan.provenance["read"]["4096"] == pytest.approx(read_share(made, plan, 4096, 2))


@pytest.mark.parametrize("seed", range(6))
def test_brute_force(seed: int) -> None:
    shape = ModelShape("m", 2, 4, 2, 64)
    made = choices(seed, shape)
    limits = Limits(read={8192: 0.15}, cpu_kv=5 * 2**20)
    rows = limits.rows(made)
    best = np.inf
    for flat in itertools.product(range(len(made.rules)), repeat=4):
        choice = np.array(flat).reshape(2, 2)
        if rows.met(choice):
            at = np.indices(choice.shape)
            best = min(best, float(made.loss.mean(0)[at[0], at[1], choice].sum()))
    plan = plan_unified(made, limits, gap=1e-6)
    assert predicted(made, plan) == pytest.approx(best, rel=1e-5)
    assert plan.solver_gap is not None
    assert plan.solver_gap <= 1e-5


def test_memory_is_what_the_targets_allocate() -> None:
    """Rows of the budget against the parts that exporters write: never less, and no more than headers apart."""
    plan = plan_unified(choices(1), Limits(read={4096: 0.2}, cpu_kv=9 * 2**20))
    sizes, row = device_bytes(plan, "bf16"), 2 * 64 * 2
    assert sizes is not None
    parts = hybrid_parts(plan)
    state = sum(part.state_bytes(64) for part in parts)
    assert sizes[0] == sum(part.slots * row for part in parts if part.lsh is None)
    assert sizes[1] == sum(part.slots * row for part in parts if part.lsh is not None) + state
    counted = plan.provenance["memory"]
    assert counted["gpu_kv"] == sizes[0]
    sampled = sum(rule.lsh is not None for layer in plan.rules for rule in layer)
    assert sampled > 2
    assert sizes[1] <= counted["cpu_kv"] <= sizes[1] + 512 * sampled
    alone = plan_unified(choices(1), Limits(kv=14 * 2**20, target="cpu"))
    total = device_bytes(alone, "bf16")
    assert total is not None
    assert total[2] <= alone.provenance["memory"]["kv"] <= min(14 * 2**20, total[2] + 512 * 6)


def test_reads_are_counted_in_the_type_of_the_cache() -> None:
    """An index weighs twice as much beside a cache of half the size; a short text is read whole by sampled heads."""
    made = choices(2).of_kinds(["lsh"])
    for element, dtype in ((4, "fp32"), (2, "bf16"), (1, "int8")):
        plan = plan_unified(made, Limits(read={8192: 0.9}, cache_dtype=dtype, target="cpu"), ["lsh"])
        assert plan.provenance["bounds"]["share of dense bytes read at 8192 tokens"]["cost"] == pytest.approx(
            read_share(made, plan, 8192, element)
        )
    assert made.rows(2047) == pytest.approx(2047)
    assert (made.index_bytes(2047) == 0).all()
    tables = [rule.lsh is not None and rule.lsh.index == "tables" for rule in made.rules]
    assert (made.rows(4095)[..., tables] == 4095).all()
    assert (made.rows(4096)[..., tables] < 4096).all()


def test_out_of_reach() -> None:
    made = choices(3)
    with pytest.raises(InfeasibleError, match=r"1\.00% is the bound; .* raise it to --read \d\.\d\d% \(.*% more\)") as one:
        plan_unified(made, Limits(read={8192: 0.01}))
    plan_unified(made, Limits(read={8192: typed(one, "--read") / 100}))
    # Dense heads need the GPU, sampled ones the CPU: each bound alone can be kept.
    tight = Limits(gpu_kv=4 * 2**20, cpu_kv=4 * 2**20)
    with pytest.raises(InfeasibleError, match=r"with the others as they are it takes --gpu-kv .* or --cpu-kv ") as both:
        plan_unified(made, tight, ["dense", "lsh"])
    assert typed(both, "--gpu-kv") > 4
    plan_unified(made, Limits(gpu_kv=typed(both, "--gpu-kv") * 2**20, cpu_kv=4 * 2**20), ["dense", "lsh"])
    plan_unified(made, Limits(gpu_kv=4 * 2**20, cpu_kv=typed(both, "--cpu-kv") * 2**20), ["dense", "lsh"])
    plan_unified(made, tight)  # spans fit


def typed(error: pytest.ExceptionInfo[Any], option: str) -> float:
    """The value that a message gives an option, without its unit."""
    found = re.search(rf"{option} (\d+(?:\.\d+)?)", str(error.value))
    assert found is not None, str(error.value)
    return float(found[1])


@settings(max_examples=60, deadline=None)
@given(value=st.floats(1e-4, 1e9))
def test_what_is_told_is_enough(value: float) -> None:
    """Values that would do are rounded up, by less than their last digit, as the command line reads them."""
    size = read_size(enough("kv", value), "--kv")
    assert size is not None
    assert value * (1 - SLACK) <= size <= value * 1.01 + 1
    assert value * (1 - SLACK) <= float(enough("milliseconds", value)) <= value * 1.002 + 1e-12
    assert value * (1 - SLACK) <= float(enough("read", value)[:-1]) / 100 <= value + 1.01e-4
    assert enough("kv", 3 * 2**20) == "3.00MiB"


def test_a_bound_of_nothing() -> None:
    """A bound of 0 beside another has no percentage."""
    with pytest.raises(InfeasibleError, match=r"--cpu-kv \d\S+MiB \(more than nothing\)"):
        plan_unified(choices(3), Limits(gpu_kv=4 * 2**20, cpu_kv=0.0), ["dense", "lsh"])


@pytest.mark.parametrize(
    ("limits", "kinds", "told", "kept_back"),
    [
        (Limits(gpu_kv=1.0), ("span", "dense", "lsh"), [], ["(--kinds)", "--grid", "--n-max"]),  # all at the smallest span
        (Limits(gpu_kv=1.0), ("lsh",), [], ["(--kinds)", "--grid", "--n-max"]),  # windows of 64 are as small
        (Limits(gpu_kv=1.0), ("dense",), ["allow span heads", "allow lsh heads", "shorten --n-max"], []),
        (Limits(cpu_kv=1.0), ("lsh",), ["allow span heads", "shorten --n-max"], ["allow lsh"]),
        (Limits(read={4096: 0.001}), ("dense", "lsh"), ["allow span heads", "@4096"], ["--n-max"]),
        (Limits(read={4096: 0.001}), ("span", "lsh"), [], ["(--kinds)", "--grid"]),
    ],
)
def test_remedies_that_help(limits: Limits, kinds: tuple[str, ...], told: list[str], kept_back: list[str]) -> None:
    with pytest.raises(InfeasibleError) as error:
        plan_unified(choices(3), limits, kinds)
    assert all(words in str(error.value) for words in told)
    assert not any(words in str(error.value) for words in kept_back)


def test_smaller_spans_are_a_remedy() -> None:
    made = choices(3)
    keep = [i for i, rule in enumerate(made.rules) if rule.mode == "span" and rule.beta == 0.5]
    one = Choices(SHAPE, N_MAX, (made.rules[keep[0]],), made.lengths, *(x[..., keep] for x in (made.loss, made.drawn, made.read)))
    with pytest.raises(InfeasibleError, match=r"take smaller spans \(--grid fine\), or allow lsh heads .* or shorten --n-max"):
        plan_unified(one, Limits(gpu_kv=2.0**20))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "tensorrt", "kv": 1.0}, "change --target"),
        ({"cache_dtype": "fp8", "kv": 1.0}, "change --cache-dtype"),
        ({"kv": 2.0**30}, "--kv has no meaning for target hybrid"),
        ({"gpu_kv": 2.0**30, "target": "cpu"}, "--gpu-kv has no meaning for target cpu"),
        ({}, "nothing is bounded"),
        ({"read": {4096: 1.5}}, "--read at 4096 is 1.5"),
        ({"read": {16384: 0.5}}, "at most n_max, 8192"),
        ({"milliseconds": {8192: 3.0}}, "give --cost-table"),
        ({"cache_dtype": "int8", "read": {8192: 0.5}}, "must be one of fp16, bf16, fp32 for target hybrid; change --cache-dtype"),
    ],
)
def test_bad_limits(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan_unified(choices(0), Limits(**options))


def test_bad_kinds() -> None:
    with pytest.raises(UserError, match="change --kinds"):
        plan_unified(choices(0), Limits(read={4096: 0.5}), ["spans"])
    for kinds in (["lsh"], ["span", "dense", "lsh"]):  # not without a word what is left of them
        with pytest.raises(UserError, match=r"kind lsh, which --kinds names: leave it out, or measure sampling first"):
            plan_unified(choices(0).of_kinds(["span", "dense"]), Limits(read={4096: 0.5}), kinds)
    assert "lsh" not in plan_unified(choices(0).of_kinds(["span", "dense"]), Limits(read={4096: 0.5})).provenance["kinds"]
    with pytest.raises(UserError, match="change --index"):
        lsh_grid(["exact"])


def bench_lsh(path: Path, plane: tuple[float, float, float], contexts: tuple[int, ...] = (8192, 32768)) -> Path:
    """A report of bench lsh with times on a plane: 32 query heads, 8 KV heads, head_dim 128, bf16."""
    results = []
    for context in contexts:
        for share in (0.01, 0.05):
            keys, rows = context * 8, 8 * (128 + 2 * share * context)
            results.append({
                "kernel": "sketch", "parameters": {"fraction": share}, "dtype": "bf16", "batch": 1, "context": context,
                "heads": 32, "kv_heads": 8, "head_dim": 128, "threads": 2, "index_bytes_per_token": 34.0,
                "kept_bytes": 34.0 * keys + rows * 512, "median_ms": plane[0] + plane[1] * keys + plane[2] * rows,
            })  # fmt: skip
    results.append({"kernel": "attnspan-dense", "dtype": "bf16", "batch": 1})
    path.write_text(json.dumps({"settings": {}, "results": results}))
    return path


def test_times(tmp_path: Path) -> None:
    plane = (0.15, 1e-6, 6e-5)
    known = LshCost.load(bench_lsh(tmp_path / "lsh.json", plane))
    assert set(known) == {"sketch"}
    cost = known["sketch"]
    assert (cost.fixed, cost.per_key, cost.per_row) == pytest.approx(plane, rel=1e-6)
    # Half the head_dim: rows take half; a group of 2 query heads instead of 4: its share of what queries cost.
    assert cost.scaled(SHAPE, "bf16") == pytest.approx((0.15 * 2 / 32, 0.5e-6, 3e-5), rel=1e-6)
    decode = DecodeCost(0.01, 1e-5, 64, 2, "bf16", 2)
    made = choices(4).of_kinds(["span", "dense", "lsh"])
    slow = Limits(milliseconds={8192: 3.0}, decode_cost=decode, lsh_cost=known)
    with pytest.raises(UserError, match="no times of index signature of 64 bits are known"):
        plan_unified(made, slow)
    keep = [i for i, rule in enumerate(made.rules) if rule.lsh is None or rule.lsh.index == "sketch"]
    made = Choices(
        SHAPE,
        N_MAX,
        tuple(made.rules[i] for i in keep),
        made.lengths,
        *(x[..., keep] for x in (made.loss, made.drawn, made.read)),
    )
    bound = 0.35
    plan = plan_unified(made, Limits(milliseconds={8192: bound + 2}, other_ms=2.0, decode_cost=decode, lsh_cost=known))
    total = 0.0
    for i, layer in enumerate(plan.rules):
        for h, rule in enumerate(layer):
            total += 0.01 / 2 + 1e-5 * min(rule.span(8192), 8192) if rule.lsh is None else 0.0
            if rule.lsh is not None:
                far = 8192 - 64 - rule.lsh.window
                rows = 64 + rule.lsh.window + made.drawn[i, h, made.rules.index(rule)] * far
                total += 0.15 * 2 / 32 + 0.5e-6 * far + 3e-5 * rows
    assert total <= bound * (1 + 1e-9)
    assert plan.provenance["bounds"]["milliseconds at 8192 tokens"]["cost"] == pytest.approx(total)
    for bound in (4.0, 5.0, 5.01):  # the rest of the model takes more, all, and nearly all of it
        with pytest.raises(
            InfeasibleError, match=r"--other-ms 5 in it; .* raise it to --ms-per-token 5\.\d+ \(\d.*% more\)"
        ) as error:
            plan_unified(made, Limits(milliseconds={8192: bound}, other_ms=5.0, decode_cost=decode, lsh_cost=known))
        least = typed(error, "--ms-per-token")
        told = re.search(r"\((\S+)% more\)", str(error.value))
        assert told is not None
        assert float(told[1]) == pytest.approx(100 * (least / bound - 1), abs=0.2)  # of what was typed
        plan_unified(made, Limits(milliseconds={8192: least}, other_ms=5.0, decode_cost=decode, lsh_cost=known))


def test_times_of_other_threads_do_not_add_up(tmp_path: Path) -> None:
    """The table of sampled heads must have as many threads as that of the others; of one with several, those are taken."""
    decode, file = DecodeCost(0.01, 1e-5, 64, 2, "bf16", 1), bench_lsh(tmp_path / "lsh.json", (0.1, 1e-6, 1e-6))
    with pytest.raises(UserError, match="--lsh-cost-table has times of 2 threads, --cost-table of 1: must be as many"):
        Limits(milliseconds={8192: 3.0}, decode_cost=decode, lsh_cost=LshCost.load(file))
    with pytest.raises(UserError, match="has times of 2 threads: must be of 1, as --cost-table"):
        LshCost.load(file, threads=1)
    report = json.loads(file.read_text())
    slower = [r | {"threads": 1, "median_ms": 2 * r["median_ms"]} for r in report["results"] if "parameters" in r]
    file.write_text(json.dumps({"results": report["results"] + slower}))
    with pytest.raises(UserError, match="has times of 1, 2 threads: must be of one number"):
        LshCost.load(file)
    assert LshCost.load(file, threads=1)["sketch"].fixed == pytest.approx(0.2)
    assert LshCost.load(file, threads=2)["sketch"].fixed == pytest.approx(0.1)


def test_every_width_has_its_own_times(tmp_path: Path) -> None:
    """Signatures of 256 bits take longer to scan than those of 64; tables are told apart by bits and number."""
    file = tmp_path / "lsh.json"
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("signature", {"signature_bits": 64}), ("signature", {"signature_bits": 256}), ("tables", {"bits": 10, "tables": 150}),
        ("tables", {"bits": 8, "tables": 75}),
    ]  # fmt: skip
    results = []
    for i, (kernel, parameters) in enumerate(kinds, 1):
        records = json.loads(bench_lsh(file, (0.1, i * 1e-6, 1e-6)).read_text())["results"][:-1]
        results += [r | {"kernel": kernel, "parameters": parameters, "index_bytes_per_token": 34.0} for r in records]
    file.write_text(json.dumps({"results": results}))
    known = LshCost.load(file)
    assert list(known) == ["signature of 64 bits", "signature of 256 bits", "tables (10, 150)", "tables (8, 75)"]
    assert known["signature of 256 bits"].per_key == pytest.approx(2 * known["signature of 64 bits"].per_key, rel=1e-3)
    assert timed_as(LshParams("signature", 64, signature_bits=128, max_hamming=44)) not in known
    assert timed_as(LshParams("tables", 64, bits=10, tables=150, min_collisions=2)) in known


def test_bad_time_tables(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 times of index sketch at 1 contexts"):
        LshCost.load(bench_lsh(tmp_path / "one.json", (1, 1, 1), (8192,)))
    with pytest.raises(UserError, match="no times of sampled decoding"):
        LshCost.load(bench_lsh(tmp_path / "type.json", (1, 1, 1)), "fp32")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not from `attnspan bench lsh"):
        LshCost.load(tmp_path / "other.json")
    with pytest.raises(UserError, match="the times are for bf16"):
        LshCost.load(bench_lsh(tmp_path / "good.json", (1, 1e-6, 1e-6)))["sketch"].scaled(SHAPE, "fp32")


def test_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan file, `inspect` and `report` name the three kinds."""
    from attnspan.export.cli import main

    plan = plan_unified(choices(7), Limits(gpu_kv=5 * 2**20, cpu_kv=7 * 2**20, read={4096: 0.4}))
    modes = {rule.mode for layer in plan.rules for rule in layer}
    assert modes == {"span", "dense", "lsh"}
    wide = dataclasses.replace(plan, provenance=plan.provenance | {"cache_dtype": "fp32"})
    summary = summarise(wide, dtype=None)
    assert summary["cache_dtype"] == "fp32"
    assert summary["allocated_bytes"] == 2 * summarise(plan, dtype=None)["allocated_bytes"]
    assert summarise(wide, dtype="bf16")["cache_dtype"] == "bf16"
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").rules == plan.rules
    assert main(["inspect", str(tmp_path / "plan.json"), "--no-png"]) == 0
    out = capsys.readouterr().out
    for mode in modes:
        assert re.search(rf"\d {mode}\b", out)
    assert re.search(r"^sampled +\d KV heads: (sketch|signature|tables)", out, re.M)
    assert re.search(r"^hybrid .* on the GPU, .* on the CPU", out, re.M)
    assert re.search(r"^read .*% at 4096", out, re.M)
    assert main(["report", str(tmp_path / "plan.json"), "-o", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    for words in ("Spans, dense and sampled heads", "KV heads by kind", "share of dense bytes read at 4096 tokens"):
        assert words in page
