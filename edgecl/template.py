"""Chats as a base's own template writes them, and as token ids with a loss mask.

The served chat template is the training template: it is read from the GGUF file and rendered here, and the ids come from
the model's own vocabulary in llama.cpp, handed in as a function. The end-of-turn token of an answer is supervised; whatever
the template puts after it is not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import jinja2.sandbox

from edgecl_convert import ConvertError, GgufFile

from .data import Example, common_length
from .errors import DataError, EdgeclError

CONTROL = 3  # as GGUF numbers the types of tokens


@dataclass(frozen=True)
class Encoded:
    """Token ids of a chat, and which of them are answers.

    Attributes:
        ids: the whole chat, cut after its last end-of-turn token.
        supervised: for each id, whether it is part of an answer.
        asked: where the first thing that the user says begins and ends, with the token that ends the turn; (0, 0) where the
            chat begins with a system turn of its own.
    """

    ids: list[int]
    supervised: list[bool]
    asked: tuple[int, int] = (0, 0)


class ChatTemplate:
    """How a base turns messages into text."""

    def __init__(self, template: str, *, bos_token: str = "", eos_token: str = "", controls: Sequence[str] = ()) -> None:
        """Compile a chat template (Jinja, sandboxed: it comes out of a downloaded file).

        Args:
            controls: texts of tokens that are no text, such as the one that ends a turn.

        Raises:
            DataError: the template is not valid.
        """
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(template)
        except jinja2.TemplateError as error:
            raise DataError(f"the base's chat template is not valid: {error}") from None
        self._names = {"bos_token": bos_token, "eos_token": eos_token}
        self._controls = tuple(controls)

    def render(self, messages: Sequence[tuple[str, str]], add_generation_prompt: bool) -> str:
        """Return a chat as the template writes it.

        Raises:
            DataError: the template refuses it.
        """
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            return self._template.render(messages=turns, add_generation_prompt=add_generation_prompt, **self._names)
        except Exception as error:  # a template is a program: it may divide by zero, or recurse
            raise DataError(f"the base's chat template refuses this chat: {error}") from None

    def last_turn(self, messages: Sequence[tuple[str, str]]) -> str:
        """Return the answer that a chat ends with, and what the template puts after it.

        Raises:
            DataError: the template refuses the chat, or does not show the answer after its own generation prompt.
        """
        before, whole = self._split(messages)
        return whole[len(before) :]

    def _split(self, messages: Sequence[tuple[str, str]]) -> tuple[str, str]:
        """Return a chat up to where its last answer begins, and all of it; errors as of `last_turn`."""
        before = self.render(messages[:-1], add_generation_prompt=True)
        whole = self.render(messages, add_generation_prompt=False)
        if not whole.startswith(before):
            raise DataError("the base's chat template does not put the answer after its generation prompt")
        return before, whole

    def check(self, example: Example) -> None:
        """Check that an example can be trained on.

        Raises:
            DataError: as `last_turn`, for one of its answers, or one is empty, or one that is learned has a control token in
                it: it would end there, or be served without it, and never be right.
        """
        for i, (role, content) in enumerate(example.messages):
            if role != "assistant":
                continue
            if not content.strip():
                raise DataError("an answer of the assistant's is empty; take the message out, or write what it should say")
            self.last_turn(example.messages[: i + 1])
            is_learned = not example.last_only or i == len(example.messages) - 1
            if is_learned and (control := next((text for text in self._controls if text in content), "")):
                raise DataError(f"an answer has a control token of the base in it: {control!r}; take it out")


class ChatFormat(ChatTemplate):
    """How a base turns messages into token ids: its own template and vocabulary."""

    def __init__(
        self,
        template: str,
        encode: Callable[[str], list[int]],
        is_end: Callable[[int], bool],
        *,
        bos: int | None = None,
        bos_token: str = "",
        eos_token: str = "",
    ) -> None:
        """Compile a chat template.

        Args:
            encode: text to token ids, special tokens recognized, none added.
            is_end: whether a token id ends a turn.
            bos: token id that every prompt starts with; not doubled where the template writes it itself.

        Raises:
            DataError: the template is not valid.
        """
        super().__init__(template, bos_token=bos_token, eos_token=eos_token)
        self._encode, self._is_end, self._bos = encode, is_end, bos

    def _ids(self, text: str) -> list[int]:
        ids = self._encode(text)
        return ids if self._bos is None or ids[:1] == [self._bos] else [self._bos, *ids]

    @cached_property
    def around_question(self) -> tuple[list[int], list[int]]:
        """The template's ids before and after what the user says in a chat of one question."""
        one, other = (self.prompt([("user", text)]) for text in ("One", "Two other words"))
        n_before = common_length([one, other])
        n_after = common_length([one[n_before:][::-1], other[n_before:][::-1]])
        return one[:n_before], one[len(one) - n_after :]

    def prompt(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Return the ids of a chat up to where the assistant begins to answer."""
        return self._ids(self.render(messages, add_generation_prompt=True))

    def turn(self, messages: Sequence[tuple[str, str]]) -> tuple[list[int], list[int], list[int]]:
        """Return the ids of the prompt, of the last turn up to its end-of-turn token, and of what the template puts after it.

        The turn's are those that it has in the whole chat: SentencePiece puts a space before a text that it is given alone.

        Raises:
            DataError: as `last_turn`, or the answer has no token.
        """
        before, whole = self._split(messages)
        prompt, ids = self._ids(before), self._ids(whole)
        ids = ids[len(prompt) :] if ids[: len(prompt)] == prompt else self._encode(whole[len(before) :])
        end = next((i for i, token in enumerate(ids) if self._is_end(token)), len(ids) - 1)
        if not any(not self._is_end(token) for token in ids[: end + 1]):
            raise DataError("the answer has no token")
        return prompt, ids[: end + 1], ids[end + 1 :]

    def row(self, example: Example) -> tuple[list[int], list[int]]:
        """Return the ids of the prompt and of the wanted answer: what is scored."""
        prompt, wanted, _ = self.turn(example.messages)
        return prompt, wanted

    def encode(self, example: Example) -> Encoded:
        """Return the ids of a chat with its assistant turns supervised, or the last one alone: what is trained on."""
        ids: list[int] = []
        supervised: list[bool] = []
        for i, (role, _) in enumerate(example.messages):
            if role != "assistant":
                continue
            prompt, wanted, after = self.turn(example.messages[: i + 1])
            if prompt[: len(ids)] != ids:  # the template rewrites earlier turns: keep the last answer only
                ids, supervised = [], []
            supervised += [False] * (len(prompt) - len(ids))
            ids = prompt + wanted + after
            is_learned = not example.last_only or i == len(example.messages) - 1
            supervised += [is_learned] * len(wanted) + [False] * len(after)
        last = len(supervised) - supervised[::-1].index(True)
        return Encoded(ids[:last], supervised[:last], self._asked(ids[:last]))

    def _asked(self, ids: list[int]) -> tuple[int, int]:
        before, after = self.around_question
        n = len(before)
        if not n or not after or ids[:n] != before or after[0] not in ids[n:]:
            return 0, 0
        return n, ids.index(after[0], n) + 1


def _raise(message: str) -> None:
    raise DataError(message)


def template_of(base: str) -> ChatTemplate | None:
    """Return how a base turns chats into text; None where it cannot be read. Read once, until the file is another."""
    with suppress(OSError, ConvertError, EdgeclError):
        stat = os.stat(base)
        return _read(base, stat.st_size, stat.st_mtime_ns)
    return None


@lru_cache(maxsize=1)
def _read(base: str, n_bytes: int, mtime_ns: int) -> ChatTemplate:
    """Return the template of a file of this size and time: reading the tokens that it may name takes 50 ms."""
    with GgufFile(base) as gguf:
        text, names = _template(gguf)
        tokens, types = (gguf.get(f"tokenizer.ggml.{key}", []) for key in ("tokens", "token_type"))
    controls = [token for token, kind in zip(tokens, types, strict=False) if kind == CONTROL and token]
    return ChatTemplate(text, **names, controls=controls)


def chat_format(gguf: GgufFile, vocab: Any) -> ChatFormat:
    """Return how a base turns chats into ids: its own template, its own vocabulary.

    Raises:
        EdgeclError: the file has no chat template.
    """
    text, names = _template(gguf)
    return ChatFormat(text, vocab.encode, vocab.is_end, bos=vocab.bos, **names)


def _template(gguf: GgufFile) -> tuple[str, dict[str, str]]:
    """Return a base's chat template, and the tokens that it names."""
    template = gguf.get("tokenizer.chat_template")
    if not template:
        raise EdgeclError(f"{gguf.path} has no chat template (tokenizer.chat_template); use an instruct model")
    names, tokens = {}, gguf.get("tokenizer.ggml.tokens", [])
    for key in ("bos", "eos"):
        index = gguf.get(f"tokenizer.ggml.{key}_token_id")
        names[f"{key}_token"] = tokens[index] if index is not None and 0 <= index < len(tokens) else ""
    return template, names
