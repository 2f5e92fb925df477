"""Plans under the windows of models that slide: spans, sinks, files, sessions' rows, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnspan.planner.errors import UserError
from attnspan.planner.inspect import summarise, table
from attnspan.planner.lsh import LshParams
from attnspan.planner.parts import layer_parts
from attnspan.planner.plan import ModelShape, Plan
from attnspan.planner.rules import HeadRule
from attnspan.planner.windows import limit_plan
from attnspan.runtime.state import SequenceState

N_MAX = 2048
SHAPE = ModelShape("tiny", layers=3, heads=4, kv_heads=2, head_dim=16)
RULES = [[HeadRule("span", 0, 0.25), HeadRule("dense")]] * 3
WINDOWS = [None, 700, 100]


@pytest.fixture
def plan() -> Plan:
    return limit_plan(Plan(SHAPE, N_MAX, RULES), WINDOWS)


@given(
    n=st.integers(0, N_MAX),
    windows=st.lists(st.none() | st.integers(1, 3000), min_size=3, max_size=3),
    beta=st.floats(0, 1),
    alpha=st.integers(-500, 2000),
)
def test_spans_are_the_smaller_of_rule_and_window(n: int, windows: list[int | None], beta: float, alpha: int) -> None:
    free = Plan(SHAPE, N_MAX, [[HeadRule("span", alpha, beta), HeadRule("dense")]] * 3)
    plan = limit_plan(free, windows)
    bound = np.array([N_MAX * 2 if w is None else w for w in windows])
    np.testing.assert_array_equal(plan.spans(n), np.minimum(free.spans(n), bound[:, None]))
    assert plan.sinks == tuple(64 if w is None or w >= N_MAX else 0 for w in windows)
    assert plan.density(max(n, 1)) <= free.density(max(n, 1))
    assert limit_plan(plan, windows) == plan
    assert Plan.from_dict(plan.to_dict()) == plan


def test_a_file_keeps_them(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path) == plan
    assert '"windows"' not in str(Plan(SHAPE, N_MAX, RULES).to_dict())


def test_a_plan_can_only_be_tightened(plan: Plan) -> None:
    assert limit_plan(plan, [50, None, 200]).windows == (50, 700, 100)
    longer = dataclasses.replace(limit_plan(dataclasses.replace(plan, n_max=512, windows=()), WINDOWS), n_max=N_MAX)
    assert longer.windows == (None, None, 100)  # 700 bound nothing at 512 tokens
    assert limit_plan(longer, WINDOWS).windows == (None, 700, 100)


def test_sampled_heads_of_layers_that_slide_see_their_window() -> None:
    rules = [[HeadRule("lsh", lsh=LshParams("sketch", 64)), HeadRule("dense")]] * 3
    plan = limit_plan(Plan(SHAPE, N_MAX, rules), WINDOWS)
    assert [[rule.mode for rule in layer] for layer in plan.rules] == [["lsh", "dense"], ["dense"] * 2, ["dense"] * 2]
    assert plan.capacities().tolist() == [[2048, 2048], [700, 700], [100, 100]]
    with pytest.raises(UserError, match="KV head 0 of layer 1 has mode 'lsh'"):
        Plan(SHAPE, N_MAX, rules, windows=WINDOWS)


def test_parts_say_that_they_have_no_sinks(plan: Plan) -> None:
    parts = [layer_parts(plan, i)[0] for i in range(3)]
    assert [part.sink for part in parts] == [64, 0, 0]
    assert [part.describe(16).get("sink") for part in parts] == [None, 0, 0]
    assert [part.capacity for part in parts] == [(512, 2048), (512, 700), (100, 100)]


def test_rows_of_a_session_see_them(plan: Plan) -> None:
    """Spans of active rows are the plan's; those of idle rows lie in every bound that the op checks."""
    state = SequenceState(plan, 2)
    lengths = np.array([1500, 60], np.int32)
    spans = state.spans(lengths, np.array([True, True]))
    for row in range(2):
        np.testing.assert_array_equal(spans[:, row], plan.spans(int(lengths[row])))
    idle = state.spans(lengths, np.array([False, True]))[:, 0]
    sinks = np.array(plan.sinks)[:, None]
    assert (idle > sinks).all()
    assert (idle <= plan.capacities()).all()


def test_inspect_names_them(plan: Plan) -> None:
    assert "windows   the model's own, by layer: 1 without, 1 of 700 tokens, 1 of 100 tokens; no sinks" in table(summarise(plan))
    assert "windows" not in table(summarise(Plan(SHAPE, N_MAX, RULES)))


@pytest.mark.parametrize(
    ("windows", "message"),
    [([700], "for each of 3 layers"), ("abc", "for each of 3 layers"), ([None, 0, 5], "window of layer 1 is 0"),
     ([None, "700", 5], "window of layer 1 is '700'")],
)  # fmt: skip
def test_refusals(windows: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Plan.from_dict(Plan(SHAPE, N_MAX, RULES).to_dict() | {"windows": windows})


def test_windows_of_another_model() -> None:
    with pytest.raises(UserError, match="windows for 2 layers: the plan has 3"):
        limit_plan(Plan(SHAPE, N_MAX, RULES), [None, 64])
