"""Histories of other programs as examples: the log of the `llm` command, and a ChatGPT export (conversations.json).

A file is known by what is in it: SQLite's magic bytes, or a JSON list whose items have a `mapping`. A conversation becomes one
example, for training has its loss on every answer of a chat: with an example for each answer, the first one would be taught as
often as the conversation has turns. A conversation is taken as far as text carries it: it ends before the first exchange with a
tool, an image or a file, on which the rest depends. Whoever sent a prompt, to whatever model, all of a file is taken, oldest
first; of equal prompts the last one.

Nobody accepted these answers or corrected them: they are read only where a user names the file, into tasks of their own ("llm",
"chatgpt"), and are to be observed with `replace=False`, so that none takes the place of an answer that is stored.

*Does not cover*: branches that a chat has left (edited questions, other answers), a log of llm before 0.5, a file in a pipe.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .data import Example, parse_example
from .errors import DataError

SQLITE, ZIP, BOM = b"SQLite format 3\0", b"PK\x03\x04", b"\xef\xbb\xbf"
LLM_TABLES = {"responses": {"responses"}, "threads": {"threads", "messages", "parts"}}  # until llm 0.31, and since
TOOL, FILE, FRAGMENT, REASONING, EMPTY = "tool call", "image or file", "prompt from a file", "reasoning", "empty turn"
SYSTEM, UNANSWERED, BROKEN = "system prompt", "conversation without an answer", "conversation that is not Unicode"


class Turn(NamedTuple):
    """A message: its text; or, where `reason` says why, none that could be learned. `ends`: the rest depends on it."""

    role: str
    text: str = ""
    reason: str = ""
    ends: bool = False


@dataclass
class History:
    """What a file held.

    Attributes:
        examples: one for each conversation that has an answer, oldest first, each prompt once.
        left_out: how often something was not taken, by what it was.
    """

    examples: list[Example] = field(default_factory=list)
    n_conversations: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def read_history(path: Path, task: str | None = None) -> History | None:
    """Return the conversations of a file; None where it is neither a database nor a ChatGPT export.

    Args:
        task: of the examples; by default "llm" or "chatgpt".

    Raises:
        DataError: it is one of these, but damaged or of another kind; or the task is not a possible one.
    """
    if not path.is_file():
        return None  # a pipe can be read only once
    with open(path, "rb") as handle:
        head = handle.read(4096)
    if head.startswith(SQLITE):
        return _history(_llm_log(path), task or "llm", path.name)
    if head.startswith(ZIP):
        raise DataError(f"{path}: is a ZIP archive; unpack it, and name the conversations.json in it")
    if head.removeprefix(BOM).lstrip().startswith(b"["):
        conversations = _chatgpt_export(path)
        if conversations is not None:
            return _history(map(_chatgpt_turns, conversations), task or "chatgpt", path.name)
    return None


def _history(conversations: Iterable[Iterable[Turn]], task: str, source: str) -> History:
    history = History()
    by_prompt: dict[str, Example] = {}
    for turns in conversations:
        history.n_conversations += 1
        messages = _chat(turns, history.left_out)
        if not messages:
            history.left_out[UNANSWERED] += 1
            continue
        try:
            "".join(text for _, text in messages).encode("utf-8")
        except UnicodeEncodeError:
            history.left_out[BROKEN] += 1
            continue
        record = {"messages": [{"role": role, "content": text} for role, text in messages]}
        example = parse_example(record, task, source)
        by_prompt.pop(example.prompt_hash, None)  # the last one also comes last
        by_prompt[example.prompt_hash] = example
    history.examples = list(by_prompt.values())
    return history


def _chat(turns: Iterable[Turn], left_out: Counter[str]) -> list[tuple[str, str]]:
    """Return a conversation as far as text carries it: questions and answers by turns, an answer last; maybe nothing."""
    chat: list[tuple[str, str]] = []
    for turn in turns:
        before = chat[-1][0] if chat else ""
        reason = turn.reason or ("" if turn.text.strip() else EMPTY)
        if not reason and turn.role == "system" and chat:
            reason = SYSTEM  # templates know it as the first turn only
        if reason:
            left_out[reason] += 1
        if turn.ends:
            if turn.role != "user" and before == "assistant":
                chat.pop()  # what was said before the tool was called is no answer yet
            break
        if reason or (turn.role == "assistant" and before in ("", "system")):
            continue
        if turn.role == before:
            chat[-1] = before, f"{chat[-1][1]}\n\n{turn.text}"
        else:
            chat.append((turn.role, turn.text))
    while chat and chat[-1][0] != "assistant":
        chat.pop()
    return chat


# --- the log of llm ---------------------------------------------------------------------------------------------------


def _llm_log(path: Path) -> list[list[Turn]]:
    """Return the conversations of a log, in the order in which they began; one in both generations of tables once."""
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
            db.text_factory = lambda data: data.decode("utf-8", "replace")
            tables = {name for (name,) in db.execute("select name from sqlite_master where type = 'table'")}
            has = {name: parts <= tables for name, parts in LLM_TABLES.items()}
            if not any(has.values()):
                raise DataError(f"{path}: is a database, but not the log of the llm command (`llm logs path` names that)")
            found = _responses(db, tables) if has["responses"] else {}
            found |= _threads(db) if has["threads"] else {}
    except sqlite3.Error as error:
        raise DataError(f"{path}: cannot be read as the log of the llm command: {error}") from None
    return [turns for _, turns in sorted(found.values(), key=lambda pair: pair[0])]


def _responses(db: sqlite3.Connection, tables: set[str]) -> dict[str, tuple[str, list[Turn]]]:
    """Return (beginning, turns) of the conversations that llm wrote until 0.31: a row is a question and its answer."""
    reasons: dict[str, str] = {}
    for reason, names in (
        (FRAGMENT, ("prompt_fragments", "system_fragments")),
        (FILE, ("prompt_attachments",)),
        (TOOL, ("tool_calls", "tool_results")),
    ):
        for name in tables.intersection(names):
            reasons |= {row_id: reason for (row_id,) in db.execute(f"select response_id from {name}")}
    found: dict[str, tuple[str, list[Turn]]] = {}
    query = "select id, coalesce(conversation_id, id), datetime_utc, system, prompt, response from responses order by 3, 1"
    for row_id, conversation, began, system, prompt, response in db.execute(query):
        turns = found.setdefault(conversation, (str(began), []))[1]
        if system and not turns:
            turns.append(Turn("system", str(system)))
        reason = reasons.get(row_id, "")
        turns.append(Turn("user", str(prompt or ""), reason, ends=bool(reason)))
        turns.append(Turn("assistant", str(response or "")))
    return found


def _threads(db: sqlite3.Connection) -> dict[str, tuple[str, list[Turn]]]:
    """Return (beginning, turns) of the conversations that llm writes since 0.32: a message knows the one before it."""
    messages = {key: (parent, role) for key, parent, role in db.execute("select hash, parent_hash, role from messages")}
    parts: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
    for key, kind, text in db.execute("select message_hash, type, text from parts order by position"):
        parts[key].append((kind, text))
    found = {}
    for thread, tip, began in db.execute("select id, tip_message_hash, datetime_utc from threads"):
        turns: list[Turn] = []
        while tip in messages and len(turns) < len(messages):
            parent, role = messages[tip]
            turns.append(_message(role, parts[tip]))
            tip = parent
        found[thread] = str(began).replace(" ", "T"), turns[::-1]  # as the older tables write it
    return found


def _message(role: str, parts: list[tuple[str, str | None]]) -> Turn:
    kinds = {kind for kind, _ in parts}
    if role == "tool" or kinds & {"tool_call", "tool_result"}:
        return Turn(role, reason=TOOL, ends=True)
    if "attachment" in kinds:
        return Turn(role, reason=FILE, ends=True)
    texts = [text for kind, text in parts if kind == "text"]
    if None in texts:
        return Turn(role, reason=FRAGMENT, ends=True)
    return Turn(role, "\n".join(text for text in texts if text))


# --- a ChatGPT export -------------------------------------------------------------------------------------------------


def _chatgpt_export(path: Path) -> list[dict[str, Any]] | None:
    """Return the conversations of an export, oldest first; None where it is none."""
    data = path.read_bytes()
    try:
        items = json.loads(data)
    except (ValueError, RecursionError) as error:
        if b'"mapping"' not in data:
            return None
        raise DataError(f"{path}: begins like a ChatGPT export, but is not whole JSON: {error}; unpack it again") from None
    found = [item for item in items if isinstance(item, dict) and isinstance(item.get("mapping"), dict)]
    return sorted(found, key=_time) if found else None


def _time(conversation: dict[str, Any]) -> float:
    value = conversation.get("create_time")
    return value if isinstance(value, int | float) else 0


def _chatgpt_turns(conversation: dict[str, Any]) -> Iterator[Turn]:
    """Yield the branch of a conversation that was shown last: from `current_node` up to the root, and back."""
    nodes = conversation["mapping"]
    key = conversation.get("current_node")
    if not isinstance(key, str) or key not in nodes:
        key = next(reversed(nodes), None)
    branch: dict[str, Any] = {}
    while isinstance(key, str) and key not in branch and isinstance(nodes.get(key), dict):
        branch[key] = nodes[key].get("message")
        key = nodes[key].get("parent")
    for message in reversed(branch.values()):
        if isinstance(message, dict):
            yield _chatgpt_turn(message)


def _chatgpt_turn(message: dict[str, Any]) -> Turn:
    author, content, facts = (_table(message.get(key)) for key in ("author", "content", "metadata"))
    role, kind = author.get("role"), content.get("content_type", "text")
    parts = content.get("parts")
    parts = [part for part in parts if part is not None] if isinstance(parts, list) else []
    is_hidden = facts.get("is_visually_hidden_from_conversation") is True or message.get("weight") == 0
    if role == "system" or is_hidden or kind in ("user_editable_context", "model_editable_context"):
        return Turn("system", reason=SYSTEM)  # ChatGPT's own, which the learner will not be shown
    if kind in ("thoughts", "reasoning_recap"):
        return Turn("assistant", reason=REASONING)
    if role not in ("user", "assistant") or message.get("recipient", "all") not in ("all", None):
        return Turn("tool", reason=TOOL, ends=True)
    if facts.get("attachments") or not all(isinstance(part, str) for part in parts):
        return Turn(role, reason=FILE, ends=True)
    if kind not in ("text", "multimodal_text"):
        return Turn("tool", reason=TOOL, ends=True)  # code that was run, pages that were read
    return Turn(role, "\n".join(parts).strip())


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
