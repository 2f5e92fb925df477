"""LshAttention and what it must refuse: bad attributes and tensors, states that are not this node's, damaged states.

A damaged state may give an error or any numbers; a crash ends the test run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lsh_op
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lsh_op import Case
from lsh_reference import Hashing

PROJECTION = np.random.default_rng(0).standard_normal((16, 128), np.float32)
SIGNATURE = Hashing("signature", PROJECTION, max_hamming=(50, 54))
TABLES = Hashing("tables", PROJECTION[:, :48], 4, 12)
SKETCH = Hashing("sketch", np.sign(PROJECTION[:, :4]), fraction=0.1)
ALL = (SKETCH, SIGNATURE, TABLES)
EACH = pytest.mark.parametrize("hashing", ALL, ids=[hashing.index for hashing in ALL])


def refusal(case: Case, feeds: dict[str, np.ndarray] | None = None, **session: Any) -> str:
    """The message that feeds (a decode step unless given) are refused with, by the case's node or one with another session."""
    node = {"hashing": case.hashing, "sink": case.sink, "window": case.window} | session
    with pytest.raises(Exception, match=r"attnspan\.LshAttention: ") as error:
        lsh_op.session(case.heads, case.kv_heads, **node, cache=case.cache, shapes=False).run(
            None, feeds or case.feeds(case.tokens(1))
        )
    return str(error.value)


@pytest.mark.parametrize(
    ("hashing", "attributes", "message"),
    [
        (TABLES, {"bits": 0}, "bits is 0; allowed are 1 to 15"),
        (TABLES, {"bits": 16}, "bits is 16; allowed are 1 to 15"),
        (TABLES, {"tables": 0}, "tables is 0; allowed are 1 to 1024"),
        (TABLES, {"tables": 1025}, "tables is 1025; allowed are 1 to 1024"),
        (TABLES, {"min_collisions": 0}, "min_collisions is 0; allowed are 1 to 4"),
        (TABLES, {"min_collisions": 5}, "min_collisions is 5; allowed are 1 to 4"),
        (SIGNATURE, {"signature_bits": 96}, "signature_bits is 96; allowed are 64, 128"),
        (SIGNATURE, {"max_hamming": [50, -1]}, "max_hamming is -1; allowed are 0 to 128"),
        (SIGNATURE, {"max_hamming": [129, 50]}, "max_hamming is 129; allowed are 0 to 128"),
        (SIGNATURE, {"max_hamming": [50]}, "max_hamming has 1 entries; kv_num_heads is 2"),
        (SIGNATURE, {"index": "graph"}, "index is 'graph'; allowed are sketch, signature"),
        (SKETCH, {"fraction": 0.0}, "fraction is 0.000000; allowed are above 0, up to 0.5"),
        (SKETCH, {"fraction": 0.6}, "fraction is 0.600000; allowed are above 0, up to 0.5"),
        (SKETCH, {"fraction": float("nan")}, "fraction is nan; allowed are above 0"),
        (SKETCH, {"min_inclusion": 0.1}, "sketches know what they draw: leave it 0"),
        (SIGNATURE, {"index": "sketch"}, "projection has shape [16, 128]; it must be [head_dim, 4]"),
        (SIGNATURE, {"window": 0}, "window is 0; allowed are 1 to"),
        (SIGNATURE, {"sink": -1}, "sink is -1"),
        (SIGNATURE, {"dense_below": -2}, "dense_below is -2; allowed are -1 to"),
        (SIGNATURE, {"kv_num_heads": 3}, "num_heads is 4 and kv_num_heads 3"),
        (SIGNATURE, {"softcap": -1.0}, "softcap must be at least 0"),
        (TABLES, {"tables": 11}, "projection has shape [16, 48]; it must be [head_dim, 44]"),
        (SIGNATURE, {"signature_bits": 64}, "projection has shape [16, 128]; it must be [head_dim, 64]"),
    ],
)
def test_malformed_attributes_are_errors(hashing: Hashing, attributes: dict[str, Any], message: str) -> None:
    assert message in refusal(Case(hashing), **attributes)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query", lambda x: x[..., :-1], "query has shape"),
        ("key", lambda x: x[:, :0], "key has shape"),
        ("value", lambda x: x[..., :16], "value has shape"),
        ("past_kv", lambda x: x[:, :-1], "past_kv has shape [1, 2047, 32]"),
        ("past_kv", lambda x: x[:, :8], "past_kv has shape [1, 8, 32]"),
        ("past_kv", lambda x: x[..., :16], "past_kv has shape [1, 2048, 16]"),
        ("past_state", lambda x: x[:, :-1], "past_state has shape"),
        ("past_state", lambda x: x[:, :256], "past_state has shape [1, 256]"),
        ("past_state", lambda x: np.tile(x, 2), "past_state has shape"),
        ("length", lambda x: np.tile(x, 2), "length has shape [2]; it must be [1]"),
        ("length", lambda x: x - 401, "length of row 0 is -1"),
        ("length", lambda x: x * 0 + 1024, "length of row 0 is 1024"),
        ("length", lambda x: x * 0 + (2**31 - 1), "length of row 0 is 2147483647"),
    ],
)
def test_malformed_tensors_are_errors(name: str, change: Any, message: str) -> None:
    case = Case(SIGNATURE)
    case.step(case.tokens(400))
    feeds = case.feeds(case.tokens(1))
    feeds[name] = np.ascontiguousarray(change(feeds[name]))
    assert message in refusal(case, feeds)


def test_a_context_over_the_capacity_is_refused() -> None:
    """Whole, before anything is written; the last token that fits is taken."""
    case = Case(SIGNATURE)
    case.step(case.tokens(1000))
    before = {name: x.copy() for name, x in case.past.items()}
    message = refusal(case, case.feeds(case.tokens(25)))
    assert "length of row 0 is 1000 and the call adds 25" in message
    assert "1024" in message
    for name, x in before.items():
        np.testing.assert_array_equal(case.past[name], x)
    case.step(case.tokens(24))


@EACH
@pytest.mark.parametrize("left", ["key_scale", "value_scale"])
def test_int8_needs_scales(hashing: Hashing, left: str) -> None:
    case = Case(hashing, cache=np.int8)
    feeds = case.feeds(case.tokens(1))
    feeds[left] = np.zeros_like(feeds[left])
    assert "must be positive" in refusal(case, feeds)
    feeds[left] = feeds[left][:1] + 1
    assert f"{left} has shape [1]; it must be [2]" in refusal(case, feeds)


@EACH
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"layer": 3}, "past_state has layer 0; this node's is 3"),
        ({"identity": 12345}, "past_state has identity 0; this node's is 12345"),
        ({"sink": 5}, "past_state has sink 4; this node's is 5"),
        ({"projection": PROJECTION + 1e-3}, "past_state has projection "),
    ],
)
def test_the_state_of_another_node_is_refused(hashing: Hashing, other: dict[str, Any], message: str) -> None:
    case = Case(hashing)
    case.step(case.tokens(400))
    if "projection" in other:
        changed = -hashing.projection if hashing is SKETCH else other["projection"][:, : hashing.projection.shape[1]]
        other = {"hashing": replace(hashing, projection=changed)}
    assert message in refusal(case, **other)
    fresh = case.feeds(case.tokens(1))  # what the buffer holds does not matter to a row that begins
    fresh["length"] = np.zeros(1, np.int32)
    node = {"hashing": case.hashing, "sink": case.sink, "window": case.window} | other
    got = lsh_op.run(lsh_op.session(4, 2, **node), fresh)
    np.testing.assert_allclose(got["output"].reshape(4, 16), np.repeat(fresh["value"].reshape(2, 16), 2, 0), rtol=1e-6)


def test_the_state_of_another_index_is_refused() -> None:
    """Of the same size: 64 positions more of half the bits, tables of other bits but the same columns."""
    case = Case(SIGNATURE)
    case.step(case.tokens(400))
    feeds = case.feeds(case.tokens(1))
    half = replace(SIGNATURE, projection=PROJECTION[:, :64])
    feeds["past_kv"] = np.zeros((1, 2 * 2048, 32), np.float32)
    assert "past_state has " in refusal(case, feeds, hashing=half)
    exact = Case(None)
    exact.past["past_state"] = np.ascontiguousarray(case.past["past_state"][:, : exact.past["past_state"].shape[1]])
    assert "past_state has " in refusal(exact, exact.feeds(exact.tokens(1), [400]))


def test_a_projection_of_sketches_is_signs() -> None:
    message = refusal(Case(SKETCH), hashing=replace(SKETCH, projection=PROJECTION[:, :4]))
    assert "of index sketch it is signs, 1 and -1" in message


def test_tables_do_not_rewind() -> None:
    case = Case(TABLES)
    case.step(case.tokens(400))
    message = refusal(case, case.feeds(case.tokens(1), [300]))
    assert "384 positions, length is 300" in message
    assert "signature" in message
    case.reference[0].rewind(390)  # the index has not come so far yet
    case.step(case.tokens(1))


LENGTH = 2320  # of the row that is damaged: its tables hold nearly as many ids unsorted as make the next steps sort them


def grown(hashing: Hashing) -> tuple[Case, np.ndarray]:
    """A row and its state."""
    case = Case(hashing, capacity=2432)
    for count in (1300, LENGTH - 1300):
        lsh_op.run(case.session, case.feeds(case.tokens(count), [0 if count == 1300 else 1300]))
    return case, case.past["past_state"][0].copy()


def survives(case: Case, state: np.ndarray, length: int = LENGTH) -> int:
    """Runs decode steps, a chunk and a step from a state; how many calls were refused."""
    case.past["past_state"][0] = state
    refused = []
    for count in (1, 1, 1, 1, 1, 1, 40, 1):
        try:
            lsh_op.run(case.session, case.feeds(case.tokens(count), [length]))
        except Exception as error:
            refused.append(str(error))
        length += count
    assert all("attnspan.LshAttention: " in message and "past_state" in message for message in refused)
    return len(refused)


@EACH
def test_every_word_of_the_header(hashing: Hashing) -> None:
    case, state = grown(hashing)
    assert survives(case, state) == 0
    refused = 0
    for at in range(0, 256, 4):
        for value in (1, 17, 2304, 2**16, 2**31, 2**32 - 1):
            damaged = state.copy()
            damaged[at : at + 4] = np.frombuffer(np.uint32(value).tobytes(), np.uint8)
            refused += survives(case, damaged) > 0
    assert refused > 80
    case.past["past_state"][0] = state
    case.past["past_state"][0, 8] += 1
    assert "past_state has version 3; this node's is 2" in refusal(case, case.feeds(case.tokens(1), [LENGTH]))


@EACH
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_random_bytes_anywhere(hashing: Hashing, data: st.DataObject) -> None:
    draw, (case, state) = data.draw, GROWN[hashing.index]
    damaged = state.copy()
    for _ in range(draw(st.integers(1, 4))):
        first = draw(st.one_of(st.integers(0, 255), st.integers(256, len(state) - 1)))
        part = damaged[first : first + draw(st.sampled_from([1, 2, 8, 64, 4096]))]
        noise = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, 256, len(part), np.uint8)
        part[:] = draw(st.sampled_from([noise, noise * 0, noise | 255]))
    survives(case, damaged, draw(st.sampled_from([LENGTH, LENGTH, LENGTH - 16, LENGTH + 60])))


@EACH
def test_whole_states_of_noise(hashing: Hashing) -> None:
    """Refused by their header; behind a good header, all the rest is noise."""
    case, state = grown(hashing)
    for seed in range(40):
        noise = np.random.default_rng(seed).integers(0, 256, len(state), np.uint8)
        assert survives(case, noise) == 8
        noise[:256] = state[:256]
        survives(case, noise)
    assert survives(case, np.zeros_like(state)) == 0  # an empty one: everything is indexed again


GROWN = {hashing.index: grown(hashing) for hashing in ALL}
