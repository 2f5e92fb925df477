"""Texts of the package and passages of them."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest
from fake_coder import FakeCoder
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspan.calibration.texts import CALIBRATION, EVALUATION, HELD_OUT, TEXTS, TextSource, load, split_sentences
from attnspan.planner.errors import UserError


def encode(text: str) -> list[int]:
    return FakeCoder().encode(text, special=False)


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_long_english(name: str) -> None:
    text = load(name)
    assert 300_000 < len(text) < 700_000
    assert text == text.strip()
    assert 0.03 < text.count(" the ") / len(text.split()) < 0.08  # English
    assert "_" not in text
    assert "  " not in text


def test_texts_of_each_use_are_others_and_the_readme_names_them() -> None:
    assert len(set(CALIBRATION + HELD_OUT + EVALUATION)) == len(CALIBRATION) + len(HELD_OUT) + len(EVALUATION)
    folder = files("attnspan.calibration").joinpath("data")
    readme = folder.joinpath("README.md").read_text("utf-8")
    held = {entry.name for entry in folder.iterdir()} - {"README.md"}
    assert held == {f"{name}.txt.xz" for name in TEXTS}
    assert all(f"`{name}`" in readme for name in held)
    assert sum(len(folder.joinpath(name).read_bytes()) for name in held) < 500_000


def test_unknown_text() -> None:
    with pytest.raises(UserError, match="'emma': must be one of moby_dick"):
        load("emma")


def test_sentences() -> None:
    text = 'Mr. Elliot met Capt. Wentworth at No. 3. "Indeed!" He left.\n\nIt was 5.30 p.m. when J. Smith came. (Alone?) Yes'
    assert split_sentences(text) == [
        "Mr. Elliot met Capt. Wentworth at No. 3.",
        ' "Indeed!"',
        " He left.",
        "\n\nIt was 5.30 p.m. when J. Smith came.",
        " (Alone?)",
        " Yes",
    ]


@given(st.text(alphabet='aB3 .!?"\n(', max_size=80))
def test_sentences_joined_are_the_text(text: str) -> None:
    text = text.rstrip()
    assert "".join(split_sentences(text)) == text


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), tokens=st.integers(40, 3000))
def test_passages(seed: int, tokens: int) -> None:
    source = SOURCE
    passage = source.passage(np.random.default_rng(seed), tokens)
    text = "".join(passage)
    assert text in WHOLE
    assert passage == source.passage(np.random.default_rng(seed), tokens)
    # Whole sentences but the first, and no more than a word short: words are one token or, with punctuation, few.
    assert tokens - 6 <= sum(len(encode(sentence)) for sentence in passage) <= tokens
    assert set(passage[1:]) <= SENTENCES


def test_passages_come_from_all_over_all_texts() -> None:
    rng = np.random.default_rng(0)
    places = [WHOLE.index("".join(SOURCE.passage(rng, 200))) / len(WHOLE) for _ in range(60)]
    assert np.histogram(places, bins=4, range=(0, 1))[0].min() >= 5


def test_passages_longer_than_the_texts() -> None:
    source = TextSource(encode, ["One two three. Four five six."])
    with pytest.raises(UserError, match="passage of 100 tokens: the longest text has 8; change --lengths"):
        source.passage(np.random.default_rng(0), 100)
    with pytest.raises(UserError, match="too short by 1 tokens for what is hidden in the text; change --lengths"):
        source.passage(np.random.default_rng(0), 0)


WHOLE = load("persuasion")[:60_000] + "\n\n" + load("moby_dick")[:60_000]
SENTENCES = set(split_sentences(WHOLE))
SOURCE = TextSource(encode, [WHOLE[:60_000], WHOLE[60_000:].strip()])
