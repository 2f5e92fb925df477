"""Text to tokens and back: `tokenizers`, incremental decoding for streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from attnspan.planner.errors import UserError
from attnspan.planner.files import read_json

__all__ = ["StreamDecoder", "Tokenizer"]

_BROKEN = "\ufffd"
"""What decoders give for bytes that are not (yet) UTF-8."""


class Tokenizer:
    """The tokenizer files of a folder: tokenizer.json, tokenizer_config.json, chat_template.jinja."""

    def __init__(self, folder: str | Path) -> None:
        from tokenizers import Tokenizer as Backend

        self._folder = Path(folder)
        file = self._folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"{self._folder} has no tokenizer.json: give token ids, or export a model that has one")
        try:
            self._backend = Backend.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"cannot read {file}: {error}") from None
        self._backend.no_truncation()  # settings of the training run, of no use here
        self._backend.no_padding()

    @cached_property
    def _settings(self) -> Mapping[str, Any]:
        file = self._folder / "tokenizer_config.json"
        return read_json(file) if file.is_file() else {}

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text; special False leaves out what the tokenizer would add around it (BOS, EOS).

        UserError when the text is not Unicode (arguments and file names can hold other bytes).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"the text is not valid UTF-8 at character {error.start}; change the prompt") from None
        return list(self._backend.encode(text, add_special_tokens=special).ids)

    def decode(self, tokens: Sequence[int], skip_special: bool = True) -> str:
        """Text of tokens; bytes that are not UTF-8 become U+FFFD."""
        return str(self._backend.decode(list(tokens), skip_special_tokens=skip_special))

    @property
    def has_chat_template(self) -> bool:
        """Whether `render` works."""
        return self._template_source is not None

    @cached_property
    def _template_source(self) -> str | None:
        file = self._folder / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        source = self._settings.get("chat_template")
        if isinstance(source, list):  # several named templates, as older models have them
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        return source if isinstance(source, str) else None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Text of a conversation by the model's chat template; tokens of it: encode(text, special=False).

        messages: mappings with `role` and `content`. UserError when the model has no template or it refuses.
        """
        if self._template_source is None:
            raise UserError(f"{self._folder} has no chat template: give the prompt as plain text (--raw)")
        from attnspan.runtime.template import render

        special = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in self._settings.items()
            if name in ("bos_token", "eos_token", "unk_token", "pad_token") and value is not None
        }
        return render(self._template_source, messages, special | {"add_generation_prompt": add_generation_prompt})


class StreamDecoder:
    """Decodes a growing list of tokens piece by piece: the pieces joined are the decoding of the whole.

    A character whose bytes are spread over tokens comes out once it is complete. A token is decoded together
    with those before it that its spelling may depend on (leading spaces, merged bytes), so that the cost of a
    step does not grow.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._window: list[int] = []
        self._context = 0  # tokens of the window whose text is out
        self._out = 0  # characters of the window's text that are out

    def push(self, token: int) -> str:
        """Text that this token completes; empty when it ends inside a character."""
        self._window.append(token)
        text = self._text()
        # A trailing U+FFFD may be the start of a character; what precedes it is settled.
        settled = text.rstrip(_BROKEN)
        piece = settled[self._out :]
        self._out = max(self._out, len(settled))
        if settled == text and text:
            # Keep the tokens of the last step as context for the next, drop those before.
            del self._window[: self._context]
            self._context = len(self._window)
            self._out = len(self._text())
        return piece

    def flush(self) -> str:
        """Text held back at the end of the stream: bytes that never became a character."""
        piece = self._text()[self._out :]
        self._window.clear()
        self._context = self._out = 0
        return piece

    def _text(self) -> str:
        return self._tokenizer.decode(self._window, self._skip_special)
