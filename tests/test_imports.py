"""Histories of other programs: what is taken of a log of llm (as llm writes it, and as it did) and of a ChatGPT export."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlite_utils import Database

from edgecl import Learner
from edgecl.cli import cli
from edgecl.errors import DataError
from edgecl.imports import History, read_history
from tests import tiny

Chat = list[tuple[str, str]]


def chats(history: History | None) -> list[Chat]:
    assert history is not None
    return [list(example.messages) for example in history.examples]


def qa(question: str, answer: str) -> Chat:
    return [("user", question), ("assistant", answer)]


# --- the log of llm ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log as the installed llm writes it: a chat, one prompt twice, and what text alone does not carry."""
    folder = tmp_path_factory.mktemp("llm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_USER_PATH", str(folder))
        write_log(folder / "logs.db")
    return folder / "logs.db"


@pytest.fixture
def log(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(written, tmp_path / "logs.db"))


def write_log(path: Path) -> None:
    import llm
    from llm.migrations import migrate

    class Echo(llm.Model):
        model_id = "echo"
        attachment_types = {"image/png"}  # noqa: RUF012
        supports_tools = True
        n = 0

        def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any = None) -> Iterator[str]:
            Echo.n += 1
            if prompt.tools and not prompt.tool_results:
                response.add_tool_call(llm.ToolCall(name="now", arguments={}))
            yield f"{prompt.prompt} {Echo.n}"

    def now() -> str:
        """Return the time."""
        return "noon"

    def ask(source: Any, prompt: str, **more: Any) -> Any:
        response = source.prompt(prompt, **more)
        response.text()  # it is asked now, not when it is first looked at
        return response

    model = Echo()
    talk = model.conversation()
    asked = [
        ask(talk, "hello", system="be nice"),
        ask(talk, "and again"),
        ask(model, "twice"),
        ask(model, "twice"),
        ask(model, "file", fragments=["a long text"]),
        ask(model, "picture", attachments=[llm.Attachment(type="image/png", content=b"png")]),
    ]
    chain = model.chain("time", tools=[now])
    assert chain.text()
    with closing(Database(path)) as db:
        migrate(db)
        for response in [*asked, *chain.responses()]:
            response.log_to_db(db)


def test_a_log_of_llm_becomes_an_example_for_each_conversation(log: Path) -> None:
    history = read_history(log)
    first, *others = chats(history)
    assert [role for role, _ in first] == ["system", "user", "assistant", "user", "assistant"]
    assert [text for _, text in first] == ["be nice", "hello", "hello 1", "and again", "and again 2"]
    assert others == [qa("twice", "twice 4")]  # the newest answer to a prompt
    assert history is not None and {(e.task, e.source) for e in history.examples} == {("llm", "logs.db")}
    assert {"prompt from a file": 1, "image or file": 1}.items() <= history.left_out.items()
    assert history.left_out["tool call"] >= 1 and history.left_out["conversation without an answer"] >= 3


ROWS = [  # (id, conversation, began, system, prompt, response)
    ("1", "c1", "2024-01-01", "be brief", "one", "eins"),
    ("2", "c2", "2024-01-02", None, "other", "anders"),
    ("3", "c1", "2024-01-03", "be brief", "two", "zwei"),
    ("4", "c1", "2024-01-04", None, "look it up", "found"),  # with a tool
    ("5", "c1", "2024-01-05", None, "and then?", "never seen"),
    ("6", None, "2024-01-06", None, "alone", "allein"),
    ("7", None, "2024-01-07", None, "no answer", None),
    ("8", None, "2024-01-08", None, "  ", "nothing was asked"),
]


def old_log(path: Path) -> Path:
    """Write a log as llm did until 0.31."""
    names = ("id", "conversation_id", "datetime_utc", "system", "prompt", "response")
    with closing(Database(path)) as db:
        db.table("conversations").insert_all([{"id": key, "name": key, "model": "m"} for key in ("c1", "c2")])
        db.table("responses").insert_all([dict(zip(names, row, strict=True)) | {"model": "m"} for row in reversed(ROWS)])
        db.table("tool_calls").insert({"response_id": "4", "name": "search"})
    return path


def test_an_older_log_ends_a_conversation_before_its_first_tool(tmp_path: Path) -> None:
    history = read_history(old_log(tmp_path / "old.db"), "german")
    brief = [("system", "be brief"), *qa("one", "eins"), *qa("two", "zwei")]
    assert chats(history) == [brief, qa("other", "anders"), qa("alone", "allein")]
    assert history is not None and history.examples[0].task == "german" and history.n_conversations == 5
    assert history.left_out == {"tool call": 1, "empty turn": 2, "conversation without an answer": 2}


def test_a_conversation_in_both_generations_of_tables_is_taken_once(log: Path) -> None:
    with closing(sqlite3.connect(log)) as db:
        (thread,) = db.execute("select id from threads order by datetime_utc, id limit 1").fetchone()
        db.execute(
            "insert into responses (id, conversation_id, datetime_utc, prompt, response) values ('1', ?, '2020', 'hello', 'x')",
            [thread],
        )
        db.execute("insert into responses (id, datetime_utc, prompt, response) values ('2', '2020', 'older', 'y')")
        db.commit()
    found = chats(read_history(log))
    assert found[0] == qa("older", "y") and [chat for chat in found if ("user", "hello") in chat] == [found[1]]
    assert len(found[1]) == 5


def test_reading_changes_no_byte_of_a_log(log: Path) -> None:
    before = log.read_bytes()
    read_history(log)
    assert log.read_bytes() == before


# --- a ChatGPT export -------------------------------------------------------------------------------------------------


def message(role: str, *parts: Any, kind: str = "text", **more: Any) -> dict[str, Any]:
    return {"author": {"role": role}, "content": {"content_type": kind, "parts": list(parts)}, **more}


def conversation(*messages: Any, began: float = 1.0, **more: Any) -> dict[str, Any]:
    """A conversation whose messages follow each other, below a root without one."""
    nodes = {"0": {"id": "0", "parent": None, "message": None}}
    nodes |= {str(i): {"id": str(i), "parent": str(i - 1), "message": m} for i, m in enumerate(messages, 1)}
    return {"title": "t", "create_time": began, "mapping": nodes, "current_node": str(len(messages)), **more}


def export(path: Path, *conversations: Any) -> Path:
    path.write_text(json.dumps(conversations))
    return path


HELLO = [message("user", "hello"), message("assistant", "hi")]
PICTURE = {"content_type": "image_asset_pointer", "asset_pointer": "file-service://x"}


def taken(tmp_path: Path, *messages: Any) -> tuple[list[Chat], dict[str, int]]:
    history = read_history(export(tmp_path / "conversations.json", conversation(*messages)))
    assert history is not None
    return chats(history), dict(history.left_out)


def test_an_export_is_read_oldest_first_with_the_last_answer_to_a_prompt(tmp_path: Path) -> None:
    path = export(
        tmp_path / "conversations.json",
        conversation(message("user", "when"), message("assistant", "today"), began=3.5),
        conversation(message("user", "when"), message("assistant", "never"), began=2),
        conversation(*HELLO, message("user", "more"), message("assistant", "of it"), began=1),
        {"title": "no conversation"},
    )
    path.write_bytes(b"\xef\xbb\xbf\n" + path.read_bytes())
    history = read_history(path)
    assert chats(history) == [[*qa("hello", "hi"), *qa("more", "of it")], qa("when", "today")]
    assert history is not None and history.examples[0].task == "chatgpt" and not history.left_out


def test_the_branch_that_was_shown_last_is_taken(tmp_path: Path) -> None:
    one = conversation(*HELLO, message("user", "edited away"), message("assistant", "gone"))
    one["mapping"] |= {
        "5": {"parent": "2", "message": message("user", "edited")},
        "6": {"parent": "5", "message": message("assistant", "stays")},
    }
    for current in ("6", None, "no such node"):  # without one: the last node of the file
        one["current_node"] = current
        assert chats(read_history(export(tmp_path / "c.json", one))) == [[*qa("hello", "hi"), *qa("edited", "stays")]]
    one["mapping"]["0"]["parent"] = "6"  # a circle ends
    assert len(chats(read_history(export(tmp_path / "c.json", one)))[0]) == 4


def test_what_is_hidden_or_thought_is_left_out_and_the_chat_goes_on(tmp_path: Path) -> None:
    found, left_out = taken(
        tmp_path,
        message("system", ""),
        message("user", kind="user_editable_context"),
        message("user", "profile", metadata={"is_visually_hidden_from_conversation": True}),
        message("assistant", "greeting before any question"),
        message("user", "hello", None),
        message("assistant", kind="thoughts"),
        message("assistant", "hi"),
        message("assistant", ""),
        message("assistant", "there", recipient="all"),
        message("user", "bye"),
    )
    assert found == [qa("hello", "hi\n\nthere")]
    assert left_out == {"system prompt": 3, "reasoning": 1, "empty turn": 1}


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        ([message("user", PICTURE, "what is it?", kind="multimodal_text")], "image or file"),
        ([message("user", "sum it up", metadata={"attachments": [{"name": "a.pdf"}]})], "image or file"),
        (
            [message("user", "the news?"), message("assistant", "I look."), message("assistant", "q", recipient="web")],
            "tool call",
        ),
        ([message("user", "the news?"), message("assistant", "I look."), message("tool", "page")], "tool call"),
        ([message("user", "2 ** 9?"), message("assistant", kind="code")], "tool call"),
    ],
)
def test_a_chat_ends_before_the_first_exchange_that_text_does_not_carry(tmp_path: Path, rest: list[Any], reason: str) -> None:
    found, left_out = taken(tmp_path, *HELLO, *rest, message("assistant", "an answer"), *HELLO)
    assert found == [qa("hello", "hi")] and left_out == {reason: 1}
    found, left_out = taken(tmp_path, *rest, message("assistant", "an answer"))
    assert found == [] and left_out == {reason: 1, "conversation without an answer": 1}


def test_half_a_character_costs_its_conversation_alone(tmp_path: Path) -> None:
    broken = conversation(message("user", "\ud83d"), message("assistant", "a"))
    history = read_history(export(tmp_path / "c.json", broken, conversation(*HELLO)))
    assert chats(history) == [qa("hello", "hi")] and history is not None
    assert history.left_out == {"conversation that is not Unicode": 1}


@pytest.mark.parametrize("junk", [None, 1, "x", [], {}, {"message": 1, "parent": []}, {"message": {"content": {"parts": 3}}}])
def test_nodes_of_other_shapes_do_no_harm(tmp_path: Path, junk: Any) -> None:
    one = conversation(*HELLO)
    one["mapping"] |= {"x": junk}
    two = conversation(*HELLO, current_node="x")
    two["mapping"] |= {"x": junk}
    three = conversation(junk, *HELLO, create_time=junk)
    history = read_history(export(tmp_path / "c.json", junk, one, two, three))
    assert history is not None and chats(history)[0] == qa("hello", "hi") and len(history.examples) == 1


# --- which file is what -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [b"", b'{"prompt": "a", "completion": "b"}\n', b"[]", b"[1, 2]", b'[{"a": 1}]\n[]\n', b"[oops"]
)
def test_other_files_are_left_to_the_reader_of_jsonl(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "f").write_bytes(data)
    assert read_history(tmp_path / "f") is read_history(tmp_path / "missing") is read_history(tmp_path) is None


def test_bad_files_are_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with closing(Database(path)) as db:
        db.table("notes").insert({"a": 1})
    cases = [(path.read_bytes(), "not the log of the llm command")]
    cases += [(path.read_bytes()[:100] + b"\xa5" * 5000, "cannot be read as the log of the llm command")]
    cases += [(b"PK\x03\x04...", "ZIP archive; unpack it")]
    cases += [(export(path, conversation(*HELLO)).read_bytes()[:-5], "not whole JSON")]
    for data, words in cases:
        path.write_bytes(data)
        with pytest.raises(DataError, match=words) as caught:
            read_history(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# --- observed ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    Learner.init(tiny.build(tmp_path / "tiny.gguf", n_layer=1)[0], tmp_path / "home").close()
    return tmp_path / "home"


def observe(home: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["--home", str(home), "observe", *map(str, arguments)])


def test_observe_tells_the_files_apart_and_says_what_was_left_out(home: Path, tmp_path: Path) -> None:
    done = observe(home, old_log(tmp_path / "old.db"))
    assert done.exit_code == 0 and done.output.startswith("3 stored")
    assert "read 5 conversations; left out: conversation without an answer (2), empty turn (2), tool call (1)" in done.output
    done = observe(home, export(tmp_path / "c.json", conversation(*HELLO)), "--task", "mine", "--json")
    facts = json.loads(done.output)
    assert (facts["added"], facts["conversations"], facts["left_out"], facts["bad"]) == (1, 1, {}, [])
    with Learner(home) as learner:
        assert {task: roles["pending"] for task, roles in learner.status()["tasks"].items()} == {"llm": 3, "mine": 1}
    done = observe(home, export(tmp_path / "c.json", conversation(message("user", "anyone?"))))
    assert done.exit_code == 1 and "c.json: has no example; expected conversations" in done.output


def test_history_takes_the_place_of_no_answer_that_is_stored(home: Path, tmp_path: Path) -> None:
    with Learner(home) as learner:
        learner.observe(['{"prompt": "hello", "completion": "as I corrected it"}'])
    path = export(tmp_path / "c.json", conversation(*HELLO), conversation(message("user", "new"), message("assistant", "row")))
    facts = json.loads(observe(home, path, "--json").output)
    assert (facts["added"], facts["duplicates"], facts["replaced"]) == (1, 1, 0)
    with Learner(home) as learner:
        answers = {row.example.answer for row in learner.store.rows("pending")}
        assert answers == {"as I corrected it", "row"}
        learner.observe(['{"prompt": "new", "completion": "corrected"}'])  # a correction does
        assert {row.example.answer for row in learner.store.rows("pending")} == {"as I corrected it", "corrected"}
