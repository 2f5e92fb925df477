"""Sessions over artefacts with sampled heads: prompts exact, steps sampled, rows apart, memory counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sampled_artefacts import ATOL, LIBRARIES, N_MAX, export_kinds, needs_library, opened, sample_always, steps, tokens

from attnspan.export.cli import main
from attnspan.planner.errors import UserError
from attnspan.runtime.generate import IDLE

Kinds = dict[str, Path]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    return export_kinds(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def sampling(kinds: Kinds) -> Kinds:
    """The sampled artefacts, changed to sample from the first indexed key on."""
    found = {}
    for name in ("sketch", "signature", "tables"):
        folder = found[name] = kinds[name].parent / "sampling"
        shutil.copytree(kinds[name], folder)
        sample_always(folder)
    return found


@needs_library
@pytest.mark.parametrize("name", ["exact", "sketch", "signature", "tables"])
def test_prompts_are_exact(name: str, kinds: Kinds) -> None:
    """And steps too, where the index is `exact`."""
    fast, slow = opened(kinds[name], "library"), opened(kinds[name])
    assert fast.library is not None
    for count in (600, 90):
        prompt = tokens(count, count)
        np.testing.assert_allclose(fast.prefill(0, prompt, 50), slow.prefill(0, prompt, 50), atol=ATOL)
    if name == "exact":
        np.testing.assert_allclose(steps(fast, 0, 10), steps(slow, 0, 10), atol=ATOL)


@needs_library
@pytest.mark.parametrize("count", [513, 512, 511, 514])
def test_the_last_token_of_a_prompt_is_exact(count: int, kinds: Kinds) -> None:
    """Chunks of 128: the last one would be a single token, that is a step, for 513."""
    fast, slow = opened(kinds["signature"], "library", chunk=128), opened(kinds["signature"])
    prompt = tokens(count)
    np.testing.assert_allclose(fast.prefill(0, prompt, 200), slow.prefill(0, prompt, 200), atol=ATOL)


@needs_library
def test_prefill_reports_its_chunks(kinds: Kinds) -> None:
    seen: list[tuple[int, int, int]] = []
    opened(kinds["tables"], "library", chunk=128).prefill(0, tokens(257), on_progress=lambda *x: seen.append(x))
    assert seen == [(0, 0, 257), (0, 128, 257), (0, 255, 257), (0, 257, 257)]


@pytest.mark.parametrize("how", LIBRARIES)
@pytest.mark.parametrize("name", ["sketch", "signature", "tables"])
def test_rows_do_not_see_each_other(name: str, how: str, kinds: Kinds) -> None:
    """Ragged rows with idle steps, one empty, one full to the last slot; then a second turn and a row that starts over."""
    prompts = [tokens(700, 1), tokens(3, 2), tokens(N_MAX, 3)]
    together = opened(kinds[name], how, batch=4)
    alone = [opened(kinds[name], how) for _ in prompts]
    for row, prompt in enumerate(prompts):
        np.testing.assert_allclose(together.prefill(row, prompt), alone[row].prefill(0, prompt), atol=ATOL)
    for step, token in enumerate(tokens(12, 4)):
        feed = [token, token if step % 2 else IDLE, IDLE, IDLE]
        logits = together.decode(feed)
        for row in (0, 1):
            if feed[row] != IDLE:
                np.testing.assert_allclose(logits[row], alone[row].decode([token])[0], atol=ATOL)
    assert together.lengths.tolist() == [712, 9, N_MAX, 0]
    together.reset([2])
    alone[2].reset()
    for row, more in ((0, tokens(90, 5)), (2, tokens(500, 6))):
        np.testing.assert_allclose(together.prefill(row, more), alone[row].prefill(0, more), atol=ATOL)
        np.testing.assert_allclose(steps(together, row, 3), steps(alone[row], 0, 3), atol=ATOL)


@needs_library
@pytest.mark.parametrize("name", ["span", "sketch", "tables"])
def test_a_prompt_that_is_interrupted_leaves_its_row_empty(name: str, kinds: Kinds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches are ahead of the length when Ctrl-C is heard behind a chunk: the row must not go on, the others must."""
    session, whole = (opened(kinds[name], "library", batch=2, chunk=128) for _ in range(2))
    for each in (session, whole):
        each.prefill(1, tokens(300, 2))
    session.prefill(0, tokens(800, 1))
    compute = session._compute_chunk

    def interrupted(*arguments: Any) -> None:
        compute(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "_compute_chunk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.prefill(0, tokens(200, 3))
    monkeypatch.undo()
    assert session.lengths.tolist() == [0, 300]
    for each in (session, whole):
        each.prefill(0, tokens(500, 4))
    for row in (1, 0):
        np.testing.assert_array_equal(steps(session, row, 5), steps(whole, row, 5))


@needs_library
@pytest.mark.parametrize("name", ["sketch", "signature", "tables"])
def test_a_row_that_starts_without_the_library_forgets_the_index(name: str, sampling: Kinds, tmp_path: Path) -> None:
    """The functions do not index, but what they pass on is trusted by the library."""
    fast, slow, fresh = opened(sampling[name], "library"), opened(sampling[name]), opened(sampling[name])
    fast.prefill(0, tokens(800, 1))
    fast.save(tmp_path / "row")
    slow.load(tmp_path / "row")
    slow.reset()
    found = []
    for session in (slow, fresh):
        session.prefill(0, tokens(900, 2))
        session.save(tmp_path / "row")
        fast.load(tmp_path / "row")
        found.append(steps(fast, 0, 5))
    np.testing.assert_array_equal(*found)


@needs_library
@pytest.mark.parametrize("name", ["sketch", "signature", "tables"])
def test_steps_after_a_long_prompt_sample(name: str, sampling: Kinds, tmp_path: Path) -> None:
    """They are near the exact ones; copies of an index, saved or forked, give the same to the bit, while new tokens enter it."""
    sampled, exact = opened(sampling[name], "library"), opened(sampling[name])
    prompt = tokens(700)
    np.testing.assert_allclose(sampled.prefill(0, prompt), exact.prefill(0, prompt), atol=ATOL)
    got, want = steps(sampled, 0, 5), steps(exact, 0, 5)
    assert np.abs(got - want).max() > 10 * ATOL
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.7
    sampled.save(tmp_path / "row")
    other = opened(sampling[name], "library", batch=2)
    other.load(tmp_path / "row", 1)
    other.fork(1, 0)
    want = steps(sampled, 0, 100, 6)
    np.testing.assert_array_equal(steps(other, 1, 100, 6), want)
    np.testing.assert_array_equal(steps(other, 0, 100, 6), want)


@needs_library
@pytest.mark.parametrize("name", ["sketch", "signature"])
def test_ragged_sampled_rows_equal_rows_alone(name: str, sampling: Kinds) -> None:
    prompts = [tokens(700, 1), tokens(40, 2), tokens(450, 3)]
    together = opened(sampling[name], "library", batch=3)
    alone = [opened(sampling[name], "library") for _ in prompts]
    for row, prompt in enumerate(prompts):
        together.prefill(row, prompt)
        alone[row].prefill(0, prompt)
    for token in tokens(20, 4):
        for row, logits in enumerate(together.decode([token] * 3)):
            np.testing.assert_allclose(logits, alone[row].decode([token])[0], atol=ATOL)
    # A second turn, then more steps.
    together.prefill(1, tokens(500, 5))
    alone[1].prefill(0, tokens(500, 5))
    np.testing.assert_allclose(steps(together, 1, 10), steps(alone[1], 0, 10), atol=ATOL)


@needs_library
@pytest.mark.parametrize("name", ["sketch", "signature"])
def test_a_state_of_another_layer_is_refused(name: str, sampling: Kinds) -> None:
    """The session cannot mix them up, the op would notice."""
    session = opened(sampling[name], "library")
    session.prefill(0, tokens(400))
    states = dict(zip(session._caches.names, session._caches.past, strict=True))
    states["state.1"][0, : states["state.0.lsh"].shape[1]] = states["state.0.lsh"][0]
    with pytest.raises(Exception, match="past_state has kv_num_heads 1; this node's is 2"):
        session.decode([1])


def test_bytes_of_states(kinds: Kinds) -> None:
    session = opened(kinds["tables"], batch=2)
    sizes = {name: array.nbytes for name, array in zip(session._caches.names, session._caches.past, strict=True)}
    assert session.state_bytes == sizes["state.0.lsh"] + sizes["state.1"] > 0
    assert session.kv_bytes + session.state_bytes == sum(sizes.values())
    assert opened(kinds["span"]).state_bytes == 0
    for array in session._caches.past:
        assert array.ctypes.data % 64 == 0
        assert array.strides[0] % 64 == 0


@needs_library
def test_bench_generate_does_not_guess_what_was_drawn(kinds: Kinds, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    figures = ["--new-tokens", "4", "--repeat", "1", "--threads", "1", "--json", str(file)]
    for tokens_, known in ((40, True), (600, False)):
        assert main(["bench", "generate", str(kinds["sketch"]), "--prompt-tokens", str(tokens_), *figures]) == 0
        result = json.loads(file.read_text())["results"][0]
        assert result["index_bytes"] == opened(kinds["sketch"]).state_bytes > 0
        for name in ("kv_bytes_read_per_step", "bytes_read_per_step", "bandwidth_share"):
            assert (result[name] is not None) == known
        assert capfd.readouterr().out.splitlines()[1].endswith("  -") != known


def test_indexes_that_do_not_fit_are_refused(kinds: Kinds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnspan.runtime.memory.available_bytes", lambda: 1_000_000)
    with pytest.raises(UserError, match=r"indexes of 0\.00 GB and caches of 0\.00 GB \(9 rows of 1024 tokens\).*lower the batch"):
        opened(kinds["tables"], batch=9)
    opened(kinds["tables"], batch=9, check_memory=False)
    opened(kinds["span"], batch=9)
