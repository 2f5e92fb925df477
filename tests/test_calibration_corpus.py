"""The calibration corpus: what it asks, whose answers it holds, the user's own documents."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_coder import FakeCoder
from hypothesis import given
from hypothesis import strategies as st

from attnspan.calibration.corpus import DATA_TOKENS, MIX, UserDocument, _kinds, build_corpus, read_data
from attnspan.calibration.corpus_kinds import FACTS, KINDS, PROSE_TOKENS
from attnspan.calibration.items import Item
from attnspan.calibration.texts import CALIBRATION, TextSource, load
from attnspan.planner.errors import UserError

PLAIN, CHAT = FakeCoder(), FakeCoder(True)
SOURCES = {
    coder: TextSource(lambda text, coder=coder: coder.encode(text, special=False), [load(CALIBRATION[0])[:100_000]])  # type: ignore[misc]
    for coder in (PLAIN, CHAT)
}


class Model:
    """Answers with tokens of its own, fewer than asked for now and then; writes down what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int, list[int]]] = []

    def __call__(self, tokens: list[int], limit: int) -> list[int]:
        reply = [1 + (len(tokens) + i) % 50 for i in range(limit - (len(self.asked) % 3 == 2 and limit > 1))]
        self.asked.append((tokens, limit, reply))
        return reply


def corpus(
    coder: FakeCoder = PLAIN, answer: Any = None, lengths: Any = (600, 900), per_length: int = 8, **more: Any
) -> list[Item]:
    more = {"answers": "given" if answer is None else "model", "progress": False, "source": SOURCES[coder]} | more
    return build_corpus(coder, answer, lengths, per_length, **more)


@pytest.mark.parametrize("coder", [PLAIN, CHAT])
def test_lengths_kinds_and_seeds(coder: FakeCoder) -> None:
    items = corpus(coder)
    assert [item.length for item in items] == [600] * 8 + [900] * 8
    assert all(item.length - 45 <= len(item.tokens) <= item.length for item in items)
    assert {item.kind for item in items} == set(KINDS)
    assert len({item.id for item in items}) == 16
    assert [item.id for item in corpus(coder)] == [item.id for item in items]
    assert not {item.id for item in corpus(coder, seed=1)} & {item.id for item in items}


def test_facts_are_asked_for_in_the_words_of_the_document() -> None:
    for item in corpus(PLAIN, mix={"facts": 1}):
        text = PLAIN.decode(item.tokens.tolist())
        end = item.tokens[: item.targets[0]]
        asked = text.split("\n\n")[-FACTS:]
        assert all(text.count(line.rstrip(".")) >= 2 for line in asked), asked
        assert asked[-1].split()[-1] in PLAIN.decode(end.tolist())


def test_copies_go_on_as_the_sentence_did() -> None:
    for item in corpus(PLAIN, mix={"copies": 1}):
        text = PLAIN.decode(item.tokens.tolist())
        document = PLAIN.decode(item.tokens[: item.targets[0]].tolist()).rsplit("\n\n", 1)[0]
        words = " ".join(document.split())
        for line in text[len(document) :].split("\n\n")[1:]:
            assert line.rstrip(".") in words


def test_prose_is_its_own_answer() -> None:
    model = Model()
    for item in corpus(PLAIN, model, mix={"prose": 1}):
        assert PROSE_TOKENS - 5 <= len(item.targets) <= PROSE_TOKENS
        assert PLAIN.decode(item.tokens.tolist()) in load(CALIBRATION[0])
    assert not model.asked


@pytest.mark.parametrize("coder", [PLAIN, CHAT])
@pytest.mark.parametrize("kind", ["facts", "copies", "records"])
def test_answers_are_the_models(coder: FakeCoder, kind: str) -> None:
    model = Model()
    items = corpus(coder, model, mix={kind: 1}, lengths=[700], per_length=4)
    given = corpus(coder, mix={kind: 1}, lengths=[700], per_length=4)
    asked = iter(model.asked)
    for item, expected in zip(items, given, strict=True):
        targets = item.targets.tolist()
        held = 0
        while held < len(targets):
            prompt, _, reply = next(asked)
            assert item.tokens[: len(prompt)].tolist() == prompt
            assert targets[held : held + len(reply)] == list(range(len(prompt), len(prompt) + len(reply)))
            assert item.tokens[len(prompt) : len(prompt) + len(reply)].tolist() == reply
            held += len(reply)
        first = expected.targets[0]
        assert item.targets[0] == first
        assert (item.tokens[:first] == expected.tokens[:first]).all()
    assert next(asked, None) is None


def test_chat_documents_are_conversations() -> None:
    texts = [CHAT.decode(item.tokens.tolist()) for item in corpus(CHAT, mix={"facts": 1})]
    chats = [text for text in texts if text.startswith("[user]")]
    assert 0 < len(chats) < len(texts)
    assert all(text.count("[user]") == text.count("[assistant]") == FACTS for text in chats)
    assert not any("[user]" in CHAT.decode(item.tokens.tolist()) for item in corpus(CHAT, mix={"facts": 1}, plain=True))


def test_wordings_are_not_those_of_the_evaluation() -> None:
    text = "".join(PLAIN.decode(item.tokens.tolist()) for item in corpus(per_length=12))
    assert "pass key" not in text
    assert "magic number" not in text


@given(st.dictionaries(st.sampled_from(list(KINDS)), st.floats(0.01, 9), min_size=1), st.integers(1, 60))
def test_kinds_keep_to_their_shares(mix: dict[str, float], count: int) -> None:
    kinds = _kinds(mix, count)
    assert len(kinds) == len(set(kinds)) == count
    got = Counter(kind for kind, _ in kinds)
    for kind, share in mix.items():
        assert abs(got[kind] - share / sum(mix.values()) * count) < len(mix)
        assert {i for k, i in kinds if k == kind} == set(range(got[kind]))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"mix": {"fact": 1.0}}, "shares of 0 or more to facts, copies"),
        ({"mix": {"facts": 0.0}}, "--mix"),
        ({"mix": dict(MIX) | {"prose": -1.0}}, "--mix"),
        ({"answers": "true"}, "answers is 'true': must be one of model, given; change --answers"),
        ({"per_length": 0}, "--items"),
        ({"lengths": []}, "--lengths"),
        ({"lengths": [64]}, "too short"),
        ({"lengths": [32], "mix": {"prose": 1.0}}, "length 32 is too short for documents of kind 'prose'; change --lengths"),
        ({"lengths": [10**6]}, "the longest text has"),
    ],
)
def test_corpora_that_cannot_be(more: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        corpus(PLAIN, **more)


def test_a_model_that_says_nothing() -> None:
    with pytest.raises(UserError, match="answers none of the questions"):
        corpus(PLAIN, lambda tokens, limit: [], mix={"facts": 1}, lengths=[700], per_length=2)


def long(words: int, answer: str | None = "It is so.") -> UserDocument:
    context = " ".join(f"w{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{chr(97 + i // 676)}" for i in range(words))
    return UserDocument(context, "Which word is first?", answer)


@pytest.mark.parametrize("coder", [PLAIN, CHAT])
def test_user_documents(coder: FakeCoder, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model()
    documents = [long(5000), long(100), long(700), long(640)]
    items = corpus(coder, model, lengths=[800], per_length=4, data=documents)
    # 100 words are too few, 640 and a reply are 7 of 8 parts of 800.
    assert [item.kind for item in items] == ["data"] * 3
    assert "length 800: 3 documents instead of 4, 1 are too short" in capsys.readouterr().out
    assert {limit for _, limit, _ in model.asked} == {DATA_TOKENS}
    assert all(700 - 1 <= len(item.tokens) <= 800 for item in items)
    texts = [coder.decode(item.tokens.tolist()) for item in items]
    assert all("Which word is first?" in text for text in texts)
    assert all(text.startswith("[user]") == (coder is CHAT) for text in texts)
    # The longest lost its middle: as many of its first words as of its last are there, and no others.
    whole = coder.encode(documents[0].context, special=False)
    prompt, limit, _ = max(model.asked, key=lambda asked: len(asked[0]))
    assert len(prompt) + limit == 800
    start = next(i for i in range(len(prompt)) if prompt[i : i + 99] == whole[:99])
    asks = coder.encode("x\n\nWhich word is first?" + ("[end][assistant]" if coder is CHAT else "\n\n"), special=False)[1:]
    assert prompt[-len(asks) :] == asks
    kept = prompt[start : -len(asks)]
    half = len(kept) // 2
    assert kept == whole[: len(kept) - half] + whole[-half:]


def test_given_answers_of_user_documents() -> None:
    (item,) = corpus(PLAIN, lengths=[600], per_length=1, data=[long(700)])
    assert PLAIN.decode(item.tokens[item.targets].tolist()) == " It is so."
    with pytest.raises(UserError, match="has no answer, and --answers is 'given'"):
        corpus(PLAIN, lengths=[600], per_length=1, data=[long(700, None)])
    with pytest.raises(UserError, match=r"none of the 1 documents has 900 tokens, or 88% of them; change --lengths or --data"):
        corpus(PLAIN, lengths=[900], per_length=1, data=[long(700)])


GOOD = {"context": "c", "question": "q"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 of {path} is not JSON"),
        ("[1]", "line 2 of {path} must be an object with context, question"),
        (json.dumps({"context": "c"}), "line 2 of {path} must be an object"),
        (json.dumps(GOOD | {"anwser": "x"}), "line 2 of {path} must be an object"),
        (json.dumps(GOOD | {"answer": ""}), "line 2 of {path}: context, question and answer must be text"),
        (json.dumps(GOOD | {"context": 3}), "line 2 of {path}: context, question and answer must be text"),
    ],
)
def test_data_files(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD | {"answer": "a"}) + "\n\n" + json.dumps(GOOD) + "\n")
    assert read_data(path) == [UserDocument("c", "q", "a"), UserDocument("c", "q")]
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(UserError, match=re.escape(words.format(path=path))):
        read_data(path)
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no document"):
        read_data(path)
    with pytest.raises(UserError, match="cannot read"):
        read_data(tmp_path / "nowhere")


def test_greedy_answers_reuse_the_cache() -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    from attnspan.calibration.greedy import GreedyAnswers

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=59, bos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3) if weight.ndim == 2 else None

    def plain(tokens: list[int], limit: int) -> list[int]:
        out: list[int] = []
        with torch.inference_mode():
            while len(out) < limit:
                token = int(model(torch.tensor([tokens + out])).logits[0, -1].argmax())
                if token == 59:
                    break
                out.append(token)
        return out

    fed: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: fed.append(args[0].shape[1]) if args else None, with_kwargs=True)
    answers = GreedyAnswers(model)
    rng = np.random.default_rng(0)
    first = rng.integers(0, 59, 30).tolist()
    more = [*first, *plain(first, 5), *rng.integers(0, 59, 7).tolist()]
    for prompt, new in ((first, 30), (more, 12), (first[:20], 20), (rng.integers(0, 59, 9).tolist(), 9), ([*first[:3], 1], 4)):
        expected = plain(prompt, 5)
        fed.clear()
        assert answers(prompt, 5) == expected
        assert fed[0] <= new
    assert answers(first, 0) == []
    ends = next(p for p in ([i, j] for i in range(59) for j in range(59)) if len(plain(p, 40)) < 40)
    assert answers(ends, 40) == plain(ends, 40)
