"""Text to tokens and back: the model's own tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from madjax.interop.guard import shown
from madjax.interop.huggingface import LanguageFiles


class Encoded(NamedTuple):
    """Tokens of prompts.

    Attributes:
      tokens: a list for each prompt that could be encoded; index: its place among those given.
      refused: by place, why a prompt could not be.
    """

    tokens: list[list[int]]
    index: list[int]
    refused: dict[int, str]


class ChatTokenizer:
    """A tokenizer with a chat template; without one, a prompt is taken as the beginning of a text.

    Attributes:
      end_tokens: those that end a completion.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        end_tokens: Sequence[int] = (),
    ):
        self.tokenizer, self.end_tokens = tokenizer, tuple(end_tokens)
        self._special_tokens = dict(special_tokens or {})
        # control tokens, which end a turn or begin one, are not for a prompt to write
        self._control = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
        self._template = None
        if template is not None:
            environment = ImmutableSandboxedEnvironment(
                trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], undefined=jinja2.StrictUndefined
            )
            environment.globals["raise_exception"] = _raise
            environment.filters["tojson"] = json.dumps
            self._template = environment.from_string(template)

    @classmethod
    def from_files(cls, files: LanguageFiles) -> ChatTokenizer:
        """The tokenizer in a model's files.

        Raises:
          ValueError: where there is none, it or its template is damaged, or it has tokens that the model has not.
        """
        if files.tokenizer is None:
            raise ValueError(f"path: {files.path} has no tokenizer.json that can be read")
        try:
            tokenizer = Tokenizer.from_str(files.tokenizer)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"path: the tokenizer of {files.path} cannot be read ({shown(error)})") from error
        highest, vocab_size = (
            max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1),
            files.config.get("vocab_size"),
        )
        if isinstance(vocab_size, int) and highest >= vocab_size:
            raise ValueError(
                f"path: {files.path}: the tokenizer goes up to token {highest}, the model has {vocab_size}"
            )
        told = files.config.get("eos_token_id")
        # chat models end a turn with a token of its own, which config.json need not tell
        told = [
            *(told if isinstance(told, list) else [told]),
            tokenizer.token_to_id(files.special_tokens.get("eos_token", "")),
        ]
        ends = sorted({token for token in told if isinstance(token, int)})
        try:
            return cls(tokenizer, files.chat_template, files.special_tokens, ends)
        except jinja2.TemplateError as error:
            raise ValueError(f"path: the chat template of {files.path} is damaged ({shown(error)})") from error

    def render(self, prompt: str) -> str:
        """What the model is shown when a user says `prompt` and it is its turn to answer."""
        if self._template is None:
            return self._special_tokens.get("bos_token", "") + prompt
        messages = [{"role": "user", "content": prompt}]
        return self._template.render(messages=messages, add_generation_prompt=True, **self._special_tokens)

    def encode_prompts(self, prompts: Sequence[Any], longest: int) -> Encoded:
        """Tokens of what `render` returns.

        A prompt is refused, and the others are not lost, where it is no text or an empty one, where it writes control
        tokens itself, or where it has more than `longest` tokens: none is cut.
        """
        tokens, index, refused = [], [], {}
        for place, prompt in enumerate(prompts):
            try:
                tokens.append(self._encode_prompt(prompt, longest))
                index.append(place)
            except ValueError as error:
                refused[place] = f"prompt {place}: {error}"
        return Encoded(tokens, index, refused)

    def _encode_prompt(self, prompt: Any, longest: int) -> list[int]:
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"wanted text, got {shown(repr(prompt))}")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"is no valid Unicode ({shown(error)})") from error
        if inside := [token for token in self._control if token in prompt]:
            raise ValueError(f"writes the control token {shown(inside[0])} itself")
        try:
            rendered = self.render(prompt)
        except Exception as error:  # whatever a template raises
            raise ValueError(f"the chat template fails on it ({shown(error)})") from error
        tokens = self.tokenizer.encode(rendered, add_special_tokens=False).ids
        if len(tokens) > longest:
            raise ValueError(f"has {len(tokens)} tokens, wanted at most {longest}")
        return tokens

    def encode_completion(self, text: str) -> list[int]:
        """Tokens of an answer, with the token that ends it."""
        return [*self.tokenizer.encode(text, add_special_tokens=False).ids, *self.end_tokens[-1:]]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text, without control tokens."""
        return self.tokenizer.decode(list(map(int, tokens)), skip_special_tokens=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
