"""Text in, text out: prompts of every form, streaming, and conversations that go on in the same cache."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from attnspan.planner.errors import UserError
from attnspan.planner.plan import ModelShape
from attnspan.planner.uniform import uniform
from attnspan.runtime.generate import IDLE
from attnspan.runtime.state import SequenceState
from attnspan.runtime.text import TextGenerator, as_prompts
from attnspan.runtime.tokenizer import Tokenizer

EOS = 257
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


class Parrot:
    """Backend that says `reply`, then EOS, after every prefill."""

    vocab_size = 258

    def __init__(self, replies: list[list[int]], batch: int = 1) -> None:
        self.state = SequenceState(uniform(ModelShape("parrot", 1, 1, 1, 8, None), 1.0, 1024), batch)
        self.replies = replies
        self.prefilled: list[tuple[int, list[int]]] = []
        self._left: list[list[int]] = [[] for _ in range(batch)]

    def _logits(self, row: int) -> np.ndarray:
        token = self._left[row].pop(0) if self._left[row] else EOS
        return np.eye(self.vocab_size, dtype=np.float32)[token]

    def prefill(self, row, tokens, keep=1, on_progress=None):  # type: ignore[no-untyped-def]
        self.prefilled.append((row, list(tokens)))
        self.state.advance(row, tokens)
        self._left[row] = [*self.replies[row], EOS]
        return self._logits(row)[None]

    def decode(self, tokens):  # type: ignore[no-untyped-def]
        rows = [self._logits(row) if token != IDLE else np.zeros(258) for row, token in enumerate(tokens)]
        for row, token in enumerate(tokens.tolist()):
            if token != IDLE:
                self.state.advance(row, [token])
        return np.stack(rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return tmp_path


def generator(folder: Path, *replies: str) -> tuple[TextGenerator, Parrot]:
    tokenizer = Tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    said = [tokenizer.encode(reply) if tokenizer else [ord(char) for char in reply] for reply in replies]
    parrot = Parrot(said, batch=len(replies))
    artefact: Any = SimpleNamespace(folder=folder, stop_tokens=frozenset([EOS]))
    return TextGenerator(parrot, artefact), parrot


def test_streamed_text_is_the_text_without_special_tokens(folder: Path) -> None:
    text, _ = generator(folder, "héllo 🙂", "x")
    pieces: list[tuple[int, str]] = []
    results = text.generate(["a", "b"], on_text=lambda row, piece: pieces.append((row, piece)))
    assert [result.text for result in results] == ["héllo 🙂", "x"]
    assert "".join(piece for row, piece in pieces if row == 0) == "héllo 🙂"
    assert (0, "🙂") in pieces
    assert results[0].tokens[-1] == EOS
    assert results[0].finish_reason == "stop"


def test_a_conversation_computes_only_what_is_new(folder: Path) -> None:
    text, parrot = generator(folder, "yes")
    messages = [{"role": "user", "content": "hi"}]
    reply = text.generate(messages)[0].text
    messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": "more"}]
    second = text.generate(messages, continue_=True)[0]
    spell = text.tokenizer.encode
    assert parrot.prefilled[0][1] == spell("<s>user\nhi</s>\n<s>assistant\n")
    assert parrot.prefilled[1][1] == [EOS, *spell("\n<s>user\nmore</s>\n<s>assistant\n")]
    assert second.text == "yes"
    held = text.tokenizer.decode([*parrot.state.tokens[0], parrot.state.pending[0]], skip_special=False)
    assert held == parrot.state.text[0]
    assert held == text.tokenizer.render([*messages, {"role": "assistant", "content": "yes"}], False).rstrip("\n")


def test_a_reply_cut_by_the_limit_is_closed_by_the_next_turn(folder: Path) -> None:
    text, parrot = generator(folder, "yes")
    messages = [{"role": "user", "content": "hi"}]
    assert text.generate(messages, 2)[0].text == "ye"
    messages += [{"role": "assistant", "content": "ye"}, {"role": "user", "content": "more"}]
    text.generate(messages, continue_=True)
    assert parrot.prefilled[1][1][1:] == text.tokenizer.encode("</s>\n<s>user\nmore</s>\n<s>assistant\n")


def test_a_rewritten_conversation_starts_over(folder: Path) -> None:
    text, parrot = generator(folder, "yes")
    text.generate([{"role": "user", "content": "hi"}])
    text.generate([{"role": "user", "content": "ho"}], continue_=True)
    assert parrot.prefilled[1][1] == text.tokenizer.encode("<s>user\nho</s>\n<s>assistant\n")
    assert parrot.state.lengths[0] == len(parrot.prefilled[1][1]) + 3


def test_plain_text_goes_on_without_new_specials(folder: Path) -> None:
    text, parrot = generator(folder, "b")
    text.generate("a")
    text.generate("c", continue_=True)
    assert parrot.prefilled[1][1] == [EOS, *text.tokenizer.encode("c")]
    assert parrot.state.text[0] == "ab</s>cb</s>"
    text.generate("a")
    assert len(parrot.prefilled[2][1]) == 1


def test_ids_need_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    text, parrot = generator(folder, "ab")
    result = text.generate(np.array([1, 2, 3]))[0]
    assert result.tokens == [97, 98, EOS]
    assert result.text is None
    assert parrot.prefilled == [(0, [1, 2, 3])]
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        text.generate("a")


def test_stop_tokens_can_be_left_out(folder: Path) -> None:
    text, _ = generator(folder, "ab")
    assert text.generate("x", 6, stop_tokens=frozenset())[0].tokens[2:] == [EOS] * 4


@pytest.mark.parametrize(
    ("prompts", "count"),
    [
        ("ab", 1),
        (["a", "b"], 2),
        ([1, 2], 1),
        ([[1], [2, 3]], 2),
        (np.array([[1, 2], [3, 4]]), 2),
        ([np.array([1, 2]), np.array([3])], 2),
        ([{"role": "user"}], 1),
        ([[{"role": "user"}], "text"], 2),
    ],
)
def test_forms_of_prompts(prompts: Any, count: int) -> None:
    assert len(as_prompts(prompts)) == count


def test_more_prompts_than_rows_and_none(folder: Path) -> None:
    text, _ = generator(folder, "a")
    with pytest.raises(UserError, match="2 prompts: the session takes 1 to 1"):
        text.generate(["a", "b"])
    with pytest.raises(UserError, match="no prompt"):
        text.generate([])
