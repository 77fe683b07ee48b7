"""Examples: from JSONL lines of several dialects, and how answers are judged.

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
from typing import Any

from .errors import DataError

DEFAULT_TASK = "default"
_ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_NUMBER = re.compile(r"[-−]?\d[\d,]*(?:\.\d+)?(?:[eE][+−-]?\d+)?")
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
    def is_free(self) -> bool:
        """Whether an answer in other words may be right: its number or its tests judge it."""
        return self.final is not None or self.program is not None

    @property
    def asked(self) -> str:
        """What the user says first, on one line."""
        return " ".join(next(content for role, content in self.messages if role == "user").split())

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
    return _value(numbers[-1]) == _value(wanted[-1])


def _value(number: str) -> float:
    return float(number.replace(",", "").replace("−", "-"))


def common_length(rows: Sequence[list[int]]) -> int:
    """Return how many ids all rows begin with alike; 0 of none."""
    if not rows:
        return 0
    low, high = min(rows), max(rows)  # what these two share, all that lie between them share
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
