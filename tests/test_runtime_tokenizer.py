"""Tokenizer files, streaming and chat templates, on small tokenizers made here."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from attnspan.planner.errors import UserError
from attnspan.runtime.tokenizer import StreamDecoder, Tokenizer

CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def byte_level() -> Backend:
    """One token a byte, with the spelling of GPT-2; `he` is a merge, `<s>` and `</s>` are special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate([*alphabet, "he"])}
    backend = Backend(models.BPE(vocab, [("h", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 257)])
    return backend


def byte_fallback() -> Backend:
    """SentencePiece style, as Llama 2: a leading space per word, unknown characters as bytes `<0xE2>`."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    vocab |= {char: 257 + index for index, char in enumerate("▁abcdefghij")}
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


@pytest.fixture(params=[byte_level, byte_fallback], scope="module")
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    request.param().save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@settings(max_examples=80, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_pieces_of_a_stream_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, special=False)
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(token) for token in ids]
    pieces.append(stream.flush())
    assert "".join(pieces) == tokenizer.decode(ids)


def test_a_character_comes_out_whole_and_at_once(tokenizer: Tokenizer) -> None:
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode("aé日🙂b", special=False)]
    assert [piece for piece in pieces if piece][-4:] == ["é", "日", "🙂", "b"]


def test_bytes_that_never_become_a_character_come_out_at_the_end(tokenizer: Tokenizer) -> None:
    stream = StreamDecoder(tokenizer)
    for token in tokenizer.encode("a日", special=False)[:-1]:
        stream.push(token)
    assert set(stream.flush()) == {"\ufffd"}
    assert stream.flush() == ""


def test_the_window_of_a_stream_does_not_grow(tokenizer: Tokenizer) -> None:
    stream = StreamDecoder(tokenizer)
    for token in tokenizer.encode("abc é " * 200, special=False):
        stream.push(token)
        assert len(stream._window) < 10


@pytest.fixture
def chat_folder(tmp_path: Path) -> Path:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    settings_ = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_), encoding="utf-8")
    return tmp_path


def test_encode_adds_what_the_tokenizer_adds(chat_folder: Path) -> None:
    tokenizer = Tokenizer(chat_folder)
    assert tokenizer.encode("he")[0] == 257
    assert tokenizer.encode("he", special=False) == [256]
    assert tokenizer.decode([257, 256, 258]) == "he"
    assert tokenizer.decode([257, 256, 258], skip_special=False) == "<s>he</s>"


def test_text_that_is_not_unicode_is_a_user_error(chat_folder: Path) -> None:
    with pytest.raises(UserError, match="not valid UTF-8 at character 1"):
        Tokenizer(chat_folder).encode("a\udcff")


def test_chat_template_from_either_file(chat_folder: Path) -> None:
    messages = [{"role": "user", "content": "hé"}]
    assert Tokenizer(chat_folder).render(messages) == "<s>user\nhé</s>\n<s>assistant\n"
    assert Tokenizer(chat_folder).render(messages, add_generation_prompt=False) == "<s>user\nhé</s>\n"
    # The file of its own goes first. Line breaks after tags vanish, as under transformers.
    template = (
        "{{ bos_token }}{% for m in messages %}\n"
        "{% generation %}{{ m['content'] | tojson }}{% endgeneration %}\n"
        "{% if m['content'] == 'skip' %}{% continue %}{% endif %}\n{% endfor %}\n"
    )
    (chat_folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert Tokenizer(chat_folder).render([*messages, {"role": "user", "content": "<"}]) == '<s>"hé""<"'


def test_named_templates(chat_folder: Path) -> None:
    named = {"chat_template": [{"name": "tool", "template": "x"}, {"name": "default", "template": "y"}]}
    (chat_folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    assert Tokenizer(chat_folder).render([]) == "y"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system role') }}",
        "{% for %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].x.y }}",
    ],
)
def test_a_template_that_refuses_is_a_user_error(chat_folder: Path, template: str) -> None:
    (chat_folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(UserError, match="chat template"):
        Tokenizer(chat_folder).render([{"role": "user", "content": ""}])


def test_missing_and_broken_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        Tokenizer(tmp_path)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert not tokenizer.has_chat_template
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.render([])
