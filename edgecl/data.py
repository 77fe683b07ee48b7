"""Examples: from JSONL lines of several dialects to token ids and a loss mask.

The served chat template is the training template: it is read from the GGUF file and rendered here, and the ids come from
the model's own vocabulary in llama.cpp, handed in as a function. The end-of-turn token of an answer is supervised; whatever
the template puts after it is not.

Dialects, told apart by their keys: `messages` (role/content), `prompt` + `completion` or `response`, alpaca (`instruction`,
`input`, `output`), sharegpt (`conversations` with from/value). Optional in all: `task`, `source`, `final`, and for answers
that are code `tests` (statements, with `setup`) or `test`, `entry_point` and `prompt`, as MBPP and HumanEval have them.

*Does not cover*: tool calls, images, several assistants in one chat.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2.sandbox

from .errors import DataError

Message = dict[str, str]
DEFAULT_TASK = "default"
_ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_TASK = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,100}")


@dataclass(frozen=True)
class Example:
    """One chat whose last turn is the answer to learn.

    Attributes:
        messages: role and content; the last one is the assistant's.
        task: the kind of example, named by the user.
        source: where it came from, such as a file name.
        final: the number an answer must end in, where only that counts.
        program: where the answer is code, what stands before and after it in a program that must run to its end.
        last_only: earlier answers are there for what they led to: nobody accepted them, and they are not learned.
    """

    messages: tuple[tuple[str, str], ...]
    task: str = DEFAULT_TASK
    source: str = ""
    final: str | None = None
    program: tuple[str, str] | None = None
    last_only: bool = False

    @property
    def answer(self) -> str:
        """The last turn."""
        return self.messages[-1][1]

    @property
    def prompt_hash(self) -> str:
        """Identity of everything before the answer: a newer correction replaces an older one of the same prompt."""
        return _digest(self.messages[:-1])

    @property
    def hash(self) -> str:
        """Identity of the whole example; the task is not part of it, since the model is never shown one."""
        return _digest(self.messages)


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:32]


# --- reading ----------------------------------------------------------------------------------------------------------


def parse_example(record: Any, task: str | None = None, source: str = "") -> Example:
    """Return the example that a decoded JSONL line describes.

    Args:
        task: overrides the record's own `task`.

    Raises:
        DataError: no known dialect, an empty answer, or a wrong type; the message says which.
    """
    if not isinstance(record, dict):
        raise DataError(f"expected a JSON object, got {type(record).__name__}")
    messages = tuple(_messages(record))
    if not messages or messages[-1][0] != "assistant":
        raise DataError("the last message must be the assistant's; add the wanted answer")
    for role, content in messages:
        _check_text(f"content of {role}", content)
    if not messages[-1][1].strip():
        raise DataError("the assistant's answer is empty")
    if not any(role == "user" and content.strip() for role, content in messages):
        raise DataError("there is no user message with text")
    name = check_task(task if task is not None else record.get("task", DEFAULT_TASK))
    origin = record.get("source", source)
    origin = origin if isinstance(origin, str) else source
    origin = origin.encode("utf-8", "replace").decode("utf-8")
    return Example(messages, name, origin, _final(record.get("final")), _program(record))


def check_task(name: Any) -> str:
    """Return a task's name.

    Raises:
        DataError: it is not 1 to 100 printable characters.
    """
    if not isinstance(name, str) or not _TASK.fullmatch(name):
        raise DataError(f"task must be 1 to 100 printable characters, got {name!r}")
    return name


def _final(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    _check_text("final", value)
    return str(value)


def _program(record: dict[str, Any]) -> tuple[str, str] | None:
    if "tests" in record:
        tests = record["tests"]
        if not isinstance(tests, list) or not tests:
            raise DataError("tests must be a list with at least one statement")
        lines = [record.get("setup") or "", *tests]
        for line in lines:
            _check_text("tests", line)
        return "", "\n".join(lines)
    if "test" in record and "entry_point" in record:
        before, test, name = record.get("prompt", ""), record["test"], record["entry_point"]
        for key, text in (("prompt", before), ("test", test), ("entry_point", name)):
            _check_text(key, text)
        return before, f"{test}\ncheck({name})"
    return None


def _check_text(what: str, value: Any) -> None:
    if not isinstance(value, str):
        raise DataError(f"{what} must be a string, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{what} has half a character (a lone surrogate); write it as UTF-8") from None


def _messages(record: dict[str, Any]) -> Iterable[tuple[str, str]]:
    if "messages" in record:
        return [_turn(turn, "role", "content", {role: role for role in _ROLES}) for turn in _list(record, "messages")]
    if "conversations" in record:
        return [_turn(turn, "from", "value", _SHAREGPT_ROLES) for turn in _list(record, "conversations")]
    if "instruction" in record and "output" in record:
        prompt, extra = record["instruction"], record.get("input") or ""
        if extra:
            _check_text("instruction", prompt)
            _check_text("input", extra)
            prompt = f"{prompt}\n\n{extra}"
        return [("user", prompt), ("assistant", record["output"])]
    for key in ("completion", "response"):
        if "prompt" in record and key in record:
            return [("user", record["prompt"]), ("assistant", record[key])]
    keys = ", ".join(repr(key[:40]) for key in sorted(record)[:6]) or "(none)"
    raise DataError(
        f"unknown keys {keys}; allowed: messages, prompt + completion (or response), "
        "instruction + output (alpaca), conversations (sharegpt)"
    )


def _list(record: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(record[key], list) or not record[key]:
        raise DataError(f"{key} must be a list with at least one turn")
    turns: list[Any] = record[key]
    return turns


def _turn(turn: Any, role_key: str, text_key: str, roles: dict[str, str]) -> tuple[str, str]:
    if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
        raise DataError(f"each turn needs {role_key} and {text_key}, got {repr(turn)[:60]}")
    role = turn[role_key]
    if not isinstance(role, str) or role not in roles:
        raise DataError(f"{role_key} must be one of {', '.join(roles)}; got {repr(role)[:60]}")
    return roles[role], turn[text_key]


def parse_lines(
    lines: Iterable[Example | str | bytes],
    task: str | None = None,
    source: str = "",
    clean: Callable[[Example], Example] = lambda example: example,
) -> tuple[list[Example], list[tuple[int, str]]]:
    """Return the good examples of JSONL lines, and (line number, reason) of the bad ones; empty lines are skipped.

    Args:
        lines: JSONL, or examples, which are taken as they are.
        clean: returns what is kept of a good example; where it raises DataError the line is a bad one.
    """
    good, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            if isinstance(line, Example):
                good.append(clean(line))
                continue
            text = line.decode("utf-8-sig" if number == 1 else "utf-8") if isinstance(line, bytes) else line
            if text.strip():
                good.append(clean(parse_example(json.loads(text), task, source)))
        except UnicodeDecodeError:
            bad.append((number, "is not UTF-8"))
        except RecursionError:
            bad.append((number, "is nested too deeply"))
        except json.JSONDecodeError as error:
            bad.append((number, f"is not JSON: {error.msg} at column {error.colno}"))
        except (DataError, ValueError) as error:
            bad.append((number, str(error)))
    return good, bad


# --- judging ----------------------------------------------------------------------------------------------------------


def normalize(text: str) -> str:
    """Return an answer as it is compared: case, outer punctuation and runs of white space do not count."""
    return " ".join(text.casefold().split()).strip(" .!\"'`")


def is_correct(example: Example, answer: str) -> bool:
    """Return whether `answer` is right: its last number where the example has `final`, else a normalized exact match."""
    if example.final is None:
        return normalize(answer) == normalize(example.answer)
    numbers = _NUMBER.findall(answer)
    wanted = _NUMBER.findall(example.final)
    if not numbers or not wanted:
        return normalize(answer) == normalize(example.final)
    return float(numbers[-1].replace(",", "")) == float(wanted[-1].replace(",", ""))


# --- templates and tokens ---------------------------------------------------------------------------------------------


def common_length(rows: Sequence[list[int]]) -> int:
    """Return how many ids all rows begin with alike; 0 of none."""
    if not rows:
        return 0
    low, high = min(rows), max(rows)  # what these two share, all that lie between them share
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


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


class ChatFormat:
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
        """Compile a chat template (Jinja, sandboxed: it comes out of a downloaded file).

        Args:
            encode: text to token ids, special tokens recognized, none added.
            is_end: whether a token id ends a turn.
            bos: token id that every prompt starts with; not doubled where the template writes it itself.

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
        self._encode, self._is_end = encode, is_end
        self._bos, self._names = bos, {"bos_token": bos_token, "eos_token": eos_token}

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

    def answer(self, messages: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Return the ids of the last turn, up to its end-of-turn token, and of what the template puts after it.

        Raises:
            DataError: the template does not show the answer after its own generation prompt, or the answer has no token.
        """
        before = self.render(messages[:-1], add_generation_prompt=True)
        whole = self.render(messages, add_generation_prompt=False)
        if not whole.startswith(before):
            raise DataError("the base's chat template does not put the answer after its generation prompt")
        ids = self._encode(whole[len(before) :])
        end = next((i for i, token in enumerate(ids) if self._is_end(token)), len(ids) - 1)
        if not any(not self._is_end(token) for token in ids[: end + 1]):
            raise DataError("the answer has no token")
        return ids[: end + 1], ids[end + 1 :]

    def row(self, example: Example) -> tuple[list[int], list[int]]:
        """Return the ids of the prompt and of the wanted answer: what is scored."""
        return self.prompt(example.messages[:-1]), self.answer(example.messages)[0]

    def encode(self, example: Example) -> Encoded:
        """Return the ids of a chat with its assistant turns supervised, or the last one alone: what is trained on."""
        ids: list[int] = []
        supervised: list[bool] = []
        for i, (role, _) in enumerate(example.messages):
            if role != "assistant":
                continue
            prompt = self.prompt(example.messages[:i])
            if prompt[: len(ids)] != ids:  # the template rewrites earlier turns: keep the last answer only
                ids, supervised = [], []
            supervised += [False] * (len(prompt) - len(ids))
            wanted, after = self.answer(example.messages[: i + 1])
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
