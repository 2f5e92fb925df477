"""Fork, save and load of a session's rows, with and without sampled heads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sampled_artefacts import ATOL, LIBRARIES, N_MAX, export_kinds, needs_library, opened, steps, tokens

from attnspan.cpu_runtime.session import Session
from attnspan.export.cli import main
from attnspan.planner.errors import UserError

Kinds = dict[str, Path]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    return export_kinds(tmp_path_factory.mktemp("kinds"))


@pytest.mark.parametrize("how", LIBRARIES)
@pytest.mark.parametrize("name", ["span", "sketch", "signature", "tables"])
def test_fork(name: str, how: str, kinds: Kinds) -> None:
    """A copy goes on as the original would have, into a row that held something longer; neither disturbs the other."""
    session = opened(kinds[name], how, batch=2)
    session.prefill(1, tokens(900, 8))
    session.prefill(0, tokens(600))
    session.state.pending[0], session.state.text[0] = 7, "abc"
    session.fork(0, 1)
    assert session.lengths.tolist() == [600, 600]
    assert session.state.tokens[1] == tokens(600)
    assert session.state.tokens[1] is not session.state.tokens[0]
    assert (session.state.pending, session.state.text) == ([7, 7], ["abc", "abc"])
    first = steps(session, 1, 8, 1)
    other = steps(session, 0, 8, 2)
    alone = opened(kinds[name], how)
    for expected, seed in ((first, 1), (other, 2)):
        alone.reset()
        alone.prefill(0, tokens(600))
        np.testing.assert_allclose(expected, steps(alone, 0, 8, seed), atol=ATOL)
    session.fork(1, 1)
    assert session.lengths.tolist() == [608, 608]
    with pytest.raises(UserError, match="row is 2"):
        session.fork(0, 2)


@pytest.mark.parametrize("how", LIBRARIES)
@pytest.mark.parametrize("name", ["span", "sketch", "signature", "tables"])
@pytest.mark.parametrize("count", [1, 100, 1000])
def test_save_and_load(name: str, how: str, count: int, kinds: Kinds, tmp_path: Path) -> None:
    session = opened(kinds[name], how)
    session.prefill(0, tokens(count))
    session.state.pending[0], session.state.text[0] = 7, "é"
    session.save(tmp_path / "row")
    want = steps(session, 0, 8)
    other = opened(kinds[name], how, batch=2)
    other.prefill(1, tokens(300, 8))
    other.load(tmp_path / "row", row=1)
    assert other.lengths.tolist() == [0, count]
    assert other.state.tokens[1] == tokens(count)
    assert (other.state.pending[1], other.state.text[1]) == (7, "é")
    np.testing.assert_allclose(steps(other, 1, 8), want, atol=ATOL)
    assert [file.name for file in tmp_path.iterdir()] == ["row"]


def test_an_empty_row_and_a_cut_file_size(kinds: Kinds, tmp_path: Path) -> None:
    """Only what is in use is written; an empty row is a few hundred bytes."""
    session = opened(kinds["span"], batch=1)
    session.save(tmp_path / "empty")
    assert (tmp_path / "empty").stat().st_size < 2000
    session.prefill(0, tokens(10))
    session.save(tmp_path / "short")
    caches = 2 * 2 * 2 * 10 * 16 * 4
    assert caches < (tmp_path / "short").stat().st_size < caches + 2000
    session.load(tmp_path / "empty")
    assert session.lengths.tolist() == [0]


@needs_library
def test_a_row_saved_without_the_library_goes_on_with_it(kinds: Kinds, tmp_path: Path) -> None:
    """Its state is empty, and is made from the caches."""
    slow, fast = opened(kinds["sketch"]), opened(kinds["sketch"], "library")
    slow.prefill(0, tokens(600))
    slow.save(tmp_path / "row")
    fast.load(tmp_path / "row")
    np.testing.assert_allclose(steps(fast, 0, 3), steps(slow, 0, 3), atol=ATOL)


def flip(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:-1], "cut short or changed"),
        (lambda data: data[:100], "cut short or changed"),
        (lambda data: data[:20], "cut short or changed"),
        (lambda data: data + b"x", "cut short or changed"),
        (lambda data: b"", "is no saved row"),
        (lambda data: b"hello", "is no saved row"),
        (flip(3), "is no saved row"),
        (flip(18), "cut short or changed"),
        (flip(60), "cut short or changed"),
        (flip(-40), "cut short or changed"),
        (flip(-1), "cut short or changed"),
    ],
)
def test_damaged_files_are_refused(change: Callable[[bytes], bytes], words: str, kinds: Kinds, tmp_path: Path) -> None:
    session = opened(kinds["signature"])
    session.prefill(0, tokens(20))
    session.save(tmp_path / "row")
    (tmp_path / "row").write_bytes(change((tmp_path / "row").read_bytes()))
    before = [array.copy() for array in session._caches.past]
    with pytest.raises(UserError, match=words):
        session.load(tmp_path / "row")
    assert session.lengths.tolist() == [20]
    for array, old in zip(session._caches.past, before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_rows_of_other_artefacts_are_refused(kinds: Kinds, tmp_path: Path) -> None:
    session = opened(kinds["signature"])
    session.prefill(0, tokens(20))
    session.save(tmp_path / "row")
    for other in ("sketch", "tables", "span", "exact"):
        with pytest.raises(UserError, match=r"saved with another artefact \(model 'model', [0-9a-f]{12}\.\.\.\)"):
            opened(kinds[other]).load(tmp_path / "row")
    with pytest.raises(UserError, match=r"cannot read .*nowhere"):
        session.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot write"):
        session.save(tmp_path / "no_folder" / "row")
    with pytest.raises(UserError, match="row is 1"):
        session.load(tmp_path / "row", 1)


def test_headers_that_lie_are_refused(kinds: Kinds, tmp_path: Path) -> None:
    """Whole files with a right hash whose header is not what the session wants."""
    from attnspan.runtime.snapshot import SavedRow, write_row

    session = opened(kinds["span"])
    of = session.artefact.fingerprint
    good = SavedRow(of, "m", [1, 2], None, None, [])
    views = session._caches.views(0, 2)
    cases = [
        (dataclasses.replace(good, tokens=[1] * (N_MAX + 1)), views, "1025 tokens"),
        (dataclasses.replace(good, tokens=[1]), views, "arrays of other sizes"),
        (good, views[:-1], "arrays of other sizes"),
        (dataclasses.replace(good, tokens=[1, 300]), views, "token id 300"),
        (dataclasses.replace(good, pending=-1), views, "token id -1"),
        (dataclasses.replace(good, tokens=[1, "2"]), views, "does not know"),
        (dataclasses.replace(good, tokens=[1, True]), views, "does not know"),
        (dataclasses.replace(good, tokens=7), views, "does not know"),
        (dataclasses.replace(good, text=5), views, "does not know"),
    ]
    for row, arrays, words in cases:
        write_row(tmp_path / "row", row, arrays)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=words):
            session.load(tmp_path / "row")
    write_row(tmp_path / "row", good, views)
    session.load(tmp_path / "row")
    assert session.lengths.tolist() == [2]


def test_run_saves_loads_and_tells_the_bytes(kinds: Kinds, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, row = str(kinds["signature"]), str(tmp_path / "row")
    common = ["run", folder, "--raw", "--no-library", "--json", "--max-new-tokens"]
    assert main([*common, "6", "-p", "hello"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["state_bytes"] == Session(folder, use_library=False).state_bytes
    assert main([*common, "2", "-p", "hel", "--save", row]) == 0
    begun = json.loads(capsys.readouterr().out)
    assert main([*common, "2", "-p", "lo", "--load", row]) == 0
    went_on = json.loads(capsys.readouterr().out)
    assert went_on["prompt_tokens"] == 1 + 2  # the token that was pending, and the prompt
    session = opened(kinds["signature"])
    session.generate("hel", 2)
    assert session.generate("lo", 2, continue_=True)[0].tokens == went_on["tokens"]
    assert len(begun["tokens"]) == 2
    assert main([*common, "2", "-p", "x", "--load", str(tmp_path / "none")]) == 2
    assert main(["run", folder, "-p", "x", "--load", row]) == 2
    assert "add --raw" in capsys.readouterr().err
