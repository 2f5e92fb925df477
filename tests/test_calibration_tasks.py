"""Items and the evaluation tasks: what they ask, where the answer lies, how long they are."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_coder import LEAD, FakeCoder
from hypothesis import given
from hypothesis import strategies as st

from attnspan.calibration.items import Item, load_items, save_items
from attnspan.calibration.prompts import build_item, encode_sample, lead_tokens, turns
from attnspan.calibration.tasks import TASKS, Sample, multikey, task_named
from attnspan.calibration.tasks.lines import word_lists
from attnspan.calibration.texts import EVALUATION, TextSource
from attnspan.planner.errors import UserError

PLAIN = ("passkey", "multikey", "perplexity")
"""Tasks that go on with the text and ask no question."""

BARE, CHAT = FakeCoder(), FakeCoder(True)
# Both number a piece when they first see it: what one of them counts holds for the other.
SOURCE = TextSource.named(lambda text: BARE.encode(text, special=False), EVALUATION)


class Made:
    """An item with its text."""

    def __init__(
        self, name: str, length: int = 1500, depth: float = 0.5, index: int = 0, chat: bool = False, plain: bool = False
    ):
        self.coder = CHAT if chat else BARE
        self.item = build_item(TASKS[name], self.coder, SOURCE, length, depth, seed=7, index=index, plain=plain)
        self.text = self.coder.decode(self.item.tokens.tolist())
        self.prompt = self.coder.decode(self.item.tokens[: self.item.targets[0]].tolist())
        self.answer = self.coder.decode(self.item.tokens[self.item.targets].tolist())

    def place(self, needle: str) -> float:
        """Share of the tokens before the first appearance of a text."""
        return len(self.coder.encode(self.text[: self.text.index(needle)])) / len(self.item.tokens)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(("length", "chat"), [(700, False), (2000, True)])
def test_every_task_fills_its_length_and_ends_with_the_answer(name: str, length: int, chat: bool) -> None:
    made = Made(name, length, 0.3, chat=chat)
    item = made.item
    # A line of a record or a word of a list may be missing.
    assert length - 45 <= len(item.tokens) <= length == item.length
    assert item.kind == name
    assert item.depth == (0.3 if TASKS[name].by_depth else None)
    assert item.targets.tolist() == list(range(item.targets[0], len(item.tokens)))
    asks = chat and name not in PLAIN
    assert made.text.startswith("[user]") == asks
    assert ("[assistant]" in made.prompt) == asks
    assert (item.tokens[0] == LEAD) == (not asks)
    again, other = Made(name, length, 0.3, chat=chat).item, Made(name, length, 0.3, index=1, chat=chat).item
    assert again.id == item.id != other.id
    if chat:
        assert not Made(name, length, 0.3, chat=True, plain=True).text.startswith("[user]")


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("name", ["passkey", "needle", "multikey", "lines", "variables"])
def test_the_answer_lies_at_its_depth(name: str, depth: float) -> None:
    made = Made(name, 3000, depth)
    needle = {
        "passkey": f"The pass key is {made.answer}.",
        "needle": "The best thing to do in San Francisco is eat",
        "multikey": made.prompt.rsplit("\n\n", 1)[-1] + made.answer,
        "lines": f" <{made.answer}>\n",
        "variables": "= " + "".join(re.findall("assigned the value ([0-9]{5}) in", made.prompt)) + ".",
    }[name]
    assert made.place(needle) == pytest.approx(depth, abs=0.06)
    assert needle in made.prompt


def test_passkey() -> None:
    made = Made("passkey")
    assert re.fullmatch("[1-9][0-9]{4}", made.answer)
    assert made.prompt.endswith("\n\nThe pass key is ")
    assert made.prompt.count(f"The pass key is {made.answer}. Remember it. {made.answer} is the pass key.") == 1


def test_multikey_has_distractors() -> None:
    made = Made("multikey")
    asked = made.prompt.rsplit("\n\n", 1)[-1]
    needles = re.findall(multikey.PATTERN, made.prompt[: -len(asked)])
    assert len(needles) == multikey.KEYS
    assert len({key for key, _ in needles}) == multikey.KEYS
    assert [value for key, value in needles if key in asked] == [made.answer]


def test_lines_are_those_of_longeval() -> None:
    made = Made("lines", 2000, 0.5)
    lines = re.findall(r"line (\S+-\S+): REGISTER_CONTENT is <(\d+)>", made.prompt)
    assert len(lines) == len({key for key, _ in lines}) > 50
    _, nouns = word_lists()
    assert {key.rsplit("-", 1)[-1] for key, _ in lines} <= {noun.rsplit("-", 1)[-1] for noun in nouns}
    assert all(1 <= int(value) <= 50_000 for _, value in lines)
    asked = re.findall(r"in line (\S+)\? I need the number\.", made.prompt)[0]
    assert dict(lines)[asked] == made.answer
    assert made.prompt.endswith(f"The <REGISTER_CONTENT> in line {asked} is <")


def test_variables_form_a_chain() -> None:
    made = Made("variables", 2500, 0.2)
    of = dict(re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|[0-9]{5})\.", made.prompt))
    assert len(of) == 6
    value = re.findall(r"assigned the value ([0-9]{5})", made.prompt)[0]

    def end(name: str) -> str:
        return name if name.isdigit() else end(of[name])

    assert set(re.findall("[A-Z]{5}", made.answer)) == {name for name in of if end(name) == value}
    assert len(re.findall("[A-Z]{5}", made.answer)) == 3
    places = [made.prompt.index(f"VAR {name} =") for name in re.findall("[A-Z]{5}", made.answer)]
    assert places == sorted(places)


def test_frequency_counts() -> None:
    made = Made("frequency", 2000)
    counts = Counter(re.findall(r"\d+\. ([a-z]+)", made.prompt))
    common = [word for word, _ in counts.most_common(3)]
    assert set(re.findall("[a-z]+", made.answer)) == set(common)
    assert [counts[word] for word in common] == [10] * 3
    assert set(counts.values()) == {10, 2}
    numbers = [int(number) for number in re.findall(r"(\d+)\. [a-z]+", made.prompt)]
    assert numbers == list(range(1, sum(counts.values()) + 1))


def test_perplexity_predicts_the_last_half() -> None:
    made = Made("perplexity", 2000)
    assert 1000 - 4 <= len(made.item.targets) <= 1000
    assert 1024 - 4 <= len(Made("perplexity", 5000).item.targets) <= 1024


@pytest.mark.parametrize(
    ("name", "length"), [("passkey", 20), ("lines", 100), ("multikey", 60), ("passkey", 10**6), ("frequency", 60_000)]
)
def test_lengths_that_do_not_fit(name: str, length: int) -> None:
    with pytest.raises(UserError, match="change --lengths"):
        Made(name, length)


def test_unknown_task() -> None:
    with pytest.raises(UserError, match="'passkeys': must be one of passkey, needle"):
        task_named("passkeys")


class Merging(FakeCoder):
    """Puts a token behind every text too, and merges a colon with what follows it."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        merged = re.sub(r": (\w)", r"\1", text)
        return super().encode(merged, special) + ([LEAD] if special else [])


def test_the_answer_starts_where_the_prompt_alone_ends() -> None:
    coder = Merging()
    assert lead_tokens(coder) == [LEAD]
    tokens, first = encode_sample(coder, Sample("One two.", "", " Key: ", "three", None))
    assert coder.decode(tokens[:first]) == "One two."
    assert coder.decode(tokens[first:]) == " Keythree"


class Forgetful(FakeCoder):
    """Its template drops all but the last message, as some do with earlier replies."""

    def render(self, messages: Any, add_generation_prompt: bool = True) -> str:
        return super().render(messages[-1:])


def test_templates_that_drop_replies() -> None:
    assert turns(FakeCoder(True), ["a", "b"]) == ["[user]a[end][assistant]", "[end][user]b[end][assistant]"]
    with pytest.raises(UserError, match="--plain"):
        turns(Forgetful(True), ["a", "b"])


ITEMS = st.builds(
    lambda tokens, data, depth, extra: Item(
        np.array(tokens),
        np.array(sorted(data.draw(st.sets(st.integers(1, len(tokens) - 1), min_size=1)))),
        "k",
        len(tokens) + extra,
        depth,
    ),
    st.lists(st.integers(0, 10**6), min_size=2, max_size=30),
    st.data(),
    st.none() | st.floats(0, 1),
    st.integers(0, 9),
)


@given(st.lists(ITEMS, max_size=4))
def test_items_survive_a_file(items: list[Item]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "items.jsonl"
        save_items(items, path)
        back = load_items(path)
    assert [item.to_dict() for item in back] == [item.to_dict() for item in items]


def item(**changes: Any) -> Item:
    values: dict[str, Any] = {"tokens": np.arange(8), "targets": np.array([5, 6]), "kind": "k", "length": 8, "depth": 0.5}
    return Item(**values | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": np.zeros((2, 4), np.int64)}, "tokens of an item is int64 [2, 4]"),
        ({"tokens": np.zeros(8)}, "tokens of an item is float64"),
        ({"tokens": -np.arange(8)}, "token -7: must be 0 or more"),
        ({"targets": np.array([], np.int64)}, "targets of an item is int64 [0]"),
        ({"targets": np.array([0])}, "lie in 1 to 7"),
        ({"targets": np.array([8])}, "lie in 1 to 7"),
        ({"targets": np.array([5, 5])}, "must increase"),
        ({"length": 7}, "length of an item is 7: must be an integer of at least its 8"),
        ({"depth": 1.5}, "depth of an item is 1.5"),
        ({"kind": ""}, "kind of an item is ''"),
    ],
)
def test_items_that_are_none(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        item(**changes)


def test_ids_depend_on_everything() -> None:
    same = item()
    others = [item(targets=np.array([6, 7])), item(tokens=np.arange(1, 9)), item(kind="l"), item(length=9), item(depth=None)]
    assert len({same.id, *(other.id for other in others)}) == 6
    assert item().id == same.id
    assert same.first == 4
    with pytest.raises(ValueError, match="read-only"):
        same.tokens[0] = 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 of {path} is not JSON"),
        ("[]", "line 2 of {path} holds list"),
        (json.dumps(item().to_dict() | {"more": 1}), "line 2 of {path} holds"),
        (json.dumps(item().to_dict() | {"tokens": list(range(1, 9))}), "line 2 of {path}: id is"),
        (json.dumps(item().to_dict() | {"tokens": "ab"}), "line 2 of {path}: tokens of an item"),
        (json.dumps(item().to_dict() | {"targets": [[1], [1, 2]]}), "line 2 of {path}: tokens and targets must be lists"),
    ],
)
def test_files_that_hold_no_items(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(item().to_dict()) + "\n" + line + "\n")
    with pytest.raises(UserError, match=re.escape(words.format(path=path))):
        load_items(path)
    with pytest.raises(UserError, match="cannot read"):
        load_items(tmp_path / "nowhere")
